"""Two equal models that share nothing, an accelerated one and timm's, and comparisons of what becomes of them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import smi_fast


def small_vit(**options: Any) -> VisionTransformer:
    """Two blocks, width 32, images of 12 x 16 pixels, 3 x 4 patches, float64, every weight random, in training mode."""
    options = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, **options}
    model = VisionTransformer(**{"num_classes": 5, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.0 / parameter.shape[-1] ** 0.5)
    return model.double()


def pair(**options: Any) -> tuple[smi_fast.AcceleratedViT, VisionTransformer]:
    """Return an accelerated model, and timm's with equal weights of its own."""
    model = small_vit(**options)
    return smi_fast.accelerate(copy.deepcopy(model)), model


def images(height: int = 12, width: int = 16, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype)


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    """Compare tensors, also within lists, tuples and dicts: in float64 they differ by rounding only."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Outer(nn.Module):
    """A model that has a vision transformer for a part."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit, self.last = vit, nn.Linear(5, 5).double()

    def forward(self, x):
        return self.last(self.vit(x))


def train(model: Callable, parameters: list[Tensor], x: Tensor, steps: int = 2) -> list[Tensor]:
    """Take steps of gradient descent, and return the losses and what the parameters have become."""
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1, momentum=0.9), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach().clone() for parameter in parameters)]


def assert_trains_alike(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-9) -> None:
    """Train both on the same images. Their parameters, trainable ones only, come in the same order."""
    x = images()
    trained = [train(m, [p for p in m.parameters() if p.requires_grad], x) for m in (ours, theirs)]
    assert_same(*trained, tolerance)
