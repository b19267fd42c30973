"""What the tests of the published code share: its model and its loop, from a checkout."""

import copy
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn

CHECKOUT = os.environ.get("SMI_CHECKOUT")  # a work tree of the authors' code
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="needs SMI_CHECKOUT, a work tree of the published code")


def with_weights_at_random(model: nn.Module) -> nn.Module:
    """Attention that differs from patch to patch, so that rounding does not choose between them."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5)
    return model


def imported(name: str) -> ModuleType:
    """A module of the checkout, whose names are too common to stay in sys.modules."""
    before = set(sys.modules)
    sys.path.insert(0, CHECKOUT)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(CHECKOUT)
        for other in set(sys.modules) - before:
            if other.split(".")[0] == name.split(".")[0]:
                del sys.modules[other]


def published_model(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A copy of a timm model with the forward pass of the published code, on the CPU."""
    monkeypatch.setattr(nn.Module, "cuda", lambda self, device=None: self)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: copy.deepcopy(model))
    return imported("utils.build_model").build_model("", Pretrained=False)


class Normalizer:
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = mean, std

    def __call__(self, images: torch.Tensor, reverse: bool) -> torch.Tensor:
        assert reverse
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return images * std + mean


def published_synthesis(teacher: nn.Module, folder: Path, *, mean, std, patch_size: int, iterations: int, **options):
    """The published loop for two images of 224x224 pixels, as its scripts set it up."""
    folder.mkdir()
    (folder / "0.png").touch()  # its data loader refuses an empty folder
    return imported("synthesis.smi").SMI(
        teacher, "", nn.Identity(), 7, patch_size=patch_size, iterations=iterations, synthesis_batch_size=2,
        sample_batch_size=2, tv2=1e-4, save_dir=str(folder), normalizer=Normalizer(mean, std), **options,
    )  # fmt: skip
