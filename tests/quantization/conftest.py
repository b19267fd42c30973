"""A small float model to quantise, its images, and random patches to keep of them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from smi_fast.models import cifar10_vit


@pytest.fixture
def model(seed) -> nn.Module:
    """Two blocks, 4x4 patches of 8x8 pixels, float64, every weight random."""
    model = cifar10_vit(pretrained=False, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5)
    return model.double()


@pytest.fixture
def images(model) -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def random_keep() -> Callable[[int, bool], list[torch.Tensor]]:
    """A function of the number of images and whether they keep different numbers of their 16 patches."""

    def draw(batch: int, ragged: bool) -> list[torch.Tensor]:
        counts = torch.randint(1, 17, (batch,)).tolist() if ragged else [6] * batch
        return [torch.randperm(16)[:count] for count in counts]

    return draw
