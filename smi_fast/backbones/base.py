"""The protocol of a backbone: what the loop asks of a model that it inverts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from smi_fast.grid import PatchGrid
from smi_fast.packed import PackedTokens


@dataclass(frozen=True)
class Outputs:
    """What a backbone computes of a batch.

    Args:
        logits: (B, num_classes).
        importance: (T,) float32, how much each patch that was given matters, packed as the patches are; None where it
            was not asked for. It carries no gradient.
        features: the places that were asked for by name -> their tokens, with gradients.
    """

    logits: Tensor
    importance: Tensor | None = None
    features: Mapping[str, PackedTokens] = field(default_factory=dict)


@runtime_checkable
class Backbone(Protocol):
    """A model as the loop sees it, which is also an `nn.Module`.

    It is given patches alone, each a row of pixels. A model that needs whole images, such as a CNN, gives a grid of one
    patch an image: its patches are the images as they are seen, jittered and mirrored.

    Attributes:
        device: where the weights are, and where the images have to be.
        compute_dtype: of the matrix products, and of the patches that it is given.
        backend: of the kernels around it: "auto", "triton" or "torch".
        num_channels, image_size: of the images: C and (H, W) in pixels.
        mean, std: the normalisation of the images that the model was trained on, one number a channel.
        num_classes: logits an image.
        num_prefix_tokens: tokens of an image that are no patches.
    """

    device: torch.device
    compute_dtype: torch.dtype
    backend: str
    num_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    num_prefix_tokens: int

    def grid(self, image_size: Sequence[int]) -> PatchGrid:
        """The patches of images of (H, W) pixels.

        Raises:
            ValueError: the model does not take images of this size.
        """
        ...

    def outputs(
        self,
        patches: PackedTokens,
        *,
        grid_size: tuple[int, int] | None = None,
        importance: bool = False,
        features: Sequence[str] = (),
    ) -> Outputs:
        """What the model computes of patches: values (T, C * ph * pw), normalised pixels in the order (C, ph, pw), at
        their positions in a grid of (rows, columns)."""
        ...

    def cast_weights(self, *, pack: bool = True) -> AbstractContextManager[None]:
        """A time in which the weights are frozen, so that they are cast and laid out once."""
        ...


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no weight asks for a gradient; afterwards, also after an error, all as it was."""
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)


def class_names(model: nn.Module) -> list[str]:
    """A name for each class of a timm model: from its `pretrained_cfg`, or of ImageNet; else the number."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if names is not None and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i).split(",")[0] for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]
