"""as_backbone(): a user's model in the form that the inversion loop takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.backbones.base import Backbone
from smi_fast.backbones.batch_norm import batch_norm_layers
from smi_fast.backbones.cnn import CNN
from smi_fast.backbones.support import UnsupportedModelError
from smi_fast.backbones.vit import accelerate


def as_backbone(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    image_size: Sequence[int] | None = None,
) -> Backbone:
    """Return a model that the loop can invert: a `Backbone` unchanged, the accelerated form of a timm ViT, or another
    model with BatchNorm2d as a `CNN`.

    Args:
        dtype, backend: see `accelerate` and `CNN`.
        image_size: (H, W) in pixels, the size of a `CNN`. None: the model's.

    Raises:
        ValueError: a dtype or backend is given for a model that is a backbone already.
        UnsupportedModelError: see `accelerate` and `CNN`.
    """
    if isinstance(model, Backbone):
        if dtype is not None or backend != "auto":
            raise ValueError(f"the model is accelerated already: dtype={dtype} and backend={backend!r} come too late")
        return model
    if not isinstance(model, VisionTransformer) and batch_norm_layers(model):
        return CNN(model, dtype, backend, image_size=image_size)
    try:
        return accelerate(model, dtype=dtype, backend=backend)
    except UnsupportedModelError as error:
        if isinstance(model, VisionTransformer):
            raise
        raise UnsupportedModelError(f"{error}; nor is it a CNN with BatchNorm2d") from None
