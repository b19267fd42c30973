"""Untrained models: they take the images of their teacher, and the seed decides their weights."""

import pytest
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config

from smi_fast.backbones.base import class_names
from smi_fast.backbones.conversion import as_backbone
from smi_fast.models import cifar10_vit
from smi_fast.models.loading import load_model, untrained_model


@pytest.mark.parametrize("name", ["cifar10_resnet8", "cifar10_vit", "test_resnet", "test_vit", "torchvision/resnet18"])
def test_an_untrained_model_takes_its_teachers_images(name, seed):
    teacher, state = cifar10_vit(False, num_classes=7, img_size=48), torch.get_rng_state()
    teacher.pretrained_cfg = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    models = [untrained_model(name, teacher, number) for number in (seed, seed, seed + 1)]
    assert torch.equal(torch.get_rng_state(), state)
    for model in models:
        backbone, config = as_backbone(model), resolve_data_config(model=model)
        assert (backbone.image_size, backbone.num_classes, backbone.mean) == ((48, 48), 7, (0.1, 0.2, 0.3))
        assert (config["input_size"], config["std"]) == ((3, 48, 48), (0.5, 0.6, 0.7))
        assert class_names(model) == class_names(teacher)
        assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    first, same, other = (torch.cat([weight.flatten() for weight in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_untrained_model_leaves_the_random_numbers_of_gpus_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    untrained_model("cifar10_vit", cifar10_vit(False))
    assert seeded == []


def test_a_model_without_weights_is_read_from_a_checkpoint(seed, tmp_path):
    """Such as a student that smi-fast distill has written."""
    model = untrained_model("cifar10_resnet14", cifar10_vit(False, num_classes=4), seed)
    save_file(model.state_dict(), tmp_path / "student.safetensors")
    found = load_model("cifar10_resnet14", checkpoint=tmp_path / "student.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(images), model(images))
    with pytest.raises(ValueError, match="cifar10_resnet14 comes without weights"):
        load_model("cifar10_resnet14")
    with pytest.raises(ValueError, match="did you mean cifar10_resnet"):
        untrained_model("cifar10_resnet9", model)
