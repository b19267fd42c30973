"""untrained_model(): a model with random weights, for the classes and the images of another model."""

from __future__ import annotations

from functools import partial

import timm
import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.backbones.base import class_names
from smi_fast.backbones.conversion import as_backbone
from smi_fast.data.files import first_line
from smi_fast.models import cifar10_resnet20
from smi_fast.models.loading import INSIDE

# Models of the package that come without weights.
WITHOUT_WEIGHTS = {f"cifar10_resnet{depth}": partial(cifar10_resnet20, depth=depth) for depth in (8, 14)}


def untrained_model(name: str, teacher: nn.Module, seed: int = 0) -> nn.Module:
    """Make a model with random weights that has a teacher's classes and takes the teacher's images, in evaluation mode
    on the CPU.

    Args:
        name: `cifar10_resnet8` or `cifar10_resnet14`, the name of a model that comes with the package, or a name that
            timm knows.
        teacher: a model that `Inverter` takes. The new model gets its number of classes, its image size and its
            normalisation.
        seed: decides the weights.

    Raises:
        ValueError: timm cannot make a model of that name.
        UnsupportedModelError: the teacher is no model that can be inverted.
    """
    backbone = as_backbone(teacher)
    options = {"num_classes": backbone.num_classes}
    model = _make(name, seed, options)
    if isinstance(model, VisionTransformer):
        model = _make(name, seed, options | {"img_size": backbone.image_size})
    model.pretrained_cfg = resolve_data_config(model=teacher) | {
        "architecture": name, "input_size": (backbone.num_channels, *backbone.image_size), "mean": backbone.mean,
        "std": backbone.std, "num_classes": backbone.num_classes, "label_names": tuple(class_names(teacher)),
    }  # fmt: skip
    return model.eval()


def _make(name: str, seed: int, options: dict) -> nn.Module:
    inside = (INSIDE | WITHOUT_WEIGHTS).get(name)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, **options) if inside is None else inside(pretrained=False, **options)
        except (RuntimeError, TypeError, ValueError) as error:  # timm raises the first for a name that it does not know
            raise ValueError(f"{name} cannot be made untrained: {first_line(error)}") from error
