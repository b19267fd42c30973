"""untrained_model(): a model with random weights, for the classes and the images of another model."""

from __future__ import annotations

import timm
import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.backbones.base import class_names
from smi_fast.backbones.conversion import as_backbone
from smi_fast.models import cifar10_resnet20, cifar10_student, cifar10_vit
from smi_fast.models.loading import check_name

INSIDE = {"cifar10_vit": cifar10_vit, "cifar10_student": cifar10_student, "cifar10_resnet20": cifar10_resnet20}


def untrained_model(name: str, teacher: nn.Module, seed: int = 0) -> nn.Module:
    """Make a model with random weights that has a teacher's classes and takes the teacher's images, in evaluation mode
    on the CPU.

    Args:
        name: the name of a model that comes with the package, `cifar10_resnet8` and `cifar10_resnet14` among them, or a
            name that timm knows.
        teacher: a model that `Inverter` takes. The new model gets its number of classes, its image size and its
            normalisation.
        seed: decides the weights.

    Raises:
        ValueError: the name is unknown.
        UnsupportedModelError: the teacher is no model that can be inverted.
    """
    backbone = as_backbone(teacher)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = _make(name, backbone.num_classes, backbone.num_channels, backbone.image_size)
    size = (backbone.num_channels, *backbone.image_size)
    config = resolve_data_config(model=teacher) | {"input_size": size, "mean": backbone.mean, "std": backbone.std}
    model.pretrained_cfg = config | {"architecture": name, "label_names": tuple(class_names(teacher))}
    return model.eval()
