"""The protocol of a backbone: what the inversion loop needs from a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from smi_fast.backbones.batch_norm import BatchNormStatistics
from smi_fast.grid import PatchGrid
from smi_fast.packed import PackedTokens


@dataclass(frozen=True)
class Outputs:
    """The outputs of a backbone for a batch.

    Args:
        logits: (B, num_classes).
        importance: (T,) float32, the importance of each input patch, packed as the patches are, or None if it was not
            requested. It carries no gradient.
        features: maps the name of each requested place in the model to its tokens, which carry gradients.
        backend: the backend of the kernels that an objective may use: "auto", "triton" or "torch".
        patches: the pixels that the model was given, values (T, C * ph * pw) in normalised space with gradients, at
            their cells in the grid, as a view shows them. The inversion loop adds these, so a backbone need not.
        grid: the patch grid of these pixels, which the loop adds too.
        mean, std: the normalisation of these pixels, one number per channel, which the loop adds too.
        batch_norm: the statistics of the BatchNorm layers in the order of the model's modules, if they were requested
            as the feature "batch_norm".
    """

    logits: Tensor
    importance: Tensor | None = None
    features: Mapping[str, PackedTokens] = field(default_factory=dict)
    backend: str = "auto"
    patches: PackedTokens | None = None
    grid: PatchGrid | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    batch_norm: Sequence[BatchNormStatistics] = ()

    def seen(self) -> tuple[Tensor, Tensor]:
        """Lay the patches out as the model saw them: images (B, C, H, W) in normalised space, 0 where no patch was
        given, with gradients; and which pixels were given, (B, 1, H, W) bool."""
        values, batch = self.patches.values, self.patches.batch_size
        (height, width), channels = self.grid.image_size, values.shape[1] // math.prod(self.grid.patch_size)
        if self.grid.num_patches == 1:  # whole images, in order
            return values.view(batch, channels, height, width), self.grid.mask(self.patches)
        images = self.grid.scatter(values, self.patches, values.new_zeros(batch, channels, height, width))
        return images, self.grid.mask(self.patches)


@runtime_checkable
class Backbone(Protocol):
    """A model as the inversion loop sees it. It is also an `nn.Module`.

    The model takes patches, each as a row of pixels. A model that needs whole images, such as a CNN, has a grid of one
    patch per image. Its patches are then the images as a view shows them, jittered and mirrored.

    Attributes:
        device: the device of the weights, on which the images have to be.
        compute_dtype: the dtype of the matrix products. The loss is scaled if it is float16.
        patch_dtype: the dtype of the patches that the model takes.
        backend: the backend of the kernels around the model: "auto", "triton" or "torch".
        num_channels, image_size: C and (H, W) in pixels of the images.
        mean, std: the normalisation of the images that the model was trained on, one number per channel.
        num_classes: the number of logits per image.
        num_prefix_tokens: the number of tokens per image that are not patches.
    """

    device: torch.device
    compute_dtype: torch.dtype
    patch_dtype: torch.dtype
    backend: str
    num_channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    num_prefix_tokens: int

    def grid(self, image_size: Sequence[int]) -> PatchGrid:
        """Return the patch grid of images of (H, W) pixels.

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
        """Run the model on patches: values (T, C * ph * pw), normalised pixels in the order (C, ph, pw), at their
        positions in a grid of (rows, columns).

        `features` are the names of places in the model, which a backbone chooses. Those of a ViT are in `features.py`,
        and a `CNN` has "batch_norm".
        """
        ...

    def cast_weights(self, *, pack: bool = True) -> AbstractContextManager[None]:
        """Return a context in which the weights do not change, so that they are cast and laid out only once."""
        ...


def check_dtype(weight: Tensor, dtype: torch.dtype | None) -> None:
    """Raise ValueError if a model of such weights cannot compute in this dtype. None is always possible."""
    if dtype is not None and dtype != weight.dtype and weight.dtype != torch.float32:
        raise ValueError(f"the weights are {weight.dtype}: dtype must be None or the same, got {dtype}")
    if dtype not in (None, weight.dtype, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")


def compute_dtype(weight: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of matrix products: the one given, bfloat16 for float32 weights on GPUs that have it, or else
    that of the weights.

    Raises:
        ValueError: the weights have been cast to another dtype than the one given.
    """
    if dtype is not None:
        if weight.dtype not in (torch.float32, dtype):
            raise ValueError(f"the weights are {weight.dtype} now, and the model was accelerated for {dtype}")
        return dtype
    if weight.dtype == torch.float32 and weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0):
        return torch.bfloat16
    return weight.dtype


def autocast_to(weight: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Return the context that casts to `compute_dtype`. If no dtype was given, the caller's autocast counts."""
    wanted = compute_dtype(weight, dtype)
    if wanted != weight.dtype:
        return torch.autocast(weight.device.type, dtype=wanted)
    return nullcontext() if dtype is None else torch.autocast(weight.device.type, enabled=False)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode without gradients of weights. Restore both afterwards, also after an error."""
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
    """Return a name for each class of a timm model: from its `pretrained_cfg`, from ImageNet, or else its number."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if names is not None and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i).split(",")[0] for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]
