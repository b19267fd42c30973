"""Copies of weights in the dtype and layout of the matrix products, made once instead of in every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.backbones.support import LINEAR, embedding_obstacle, obstacle, weight_and_bias
from smi_fast.kernels.gradients import transformed
from smi_fast.kernels.linear import PackedWeight, can_pack, linear


class Cast:
    """Copies of a weight and a bias in the dtype and layout of the matrix products, made again after a change.

    A change is what replaces, moves or writes to them, except through `.data`, of which torch keeps no count. A copied
    or saved module gets None in the place of its cast.

    Args:
        pack: whether the weight may be laid out for the products of a CPU.
    """

    def __init__(self, pack: bool):
        self.pack = pack
        self.copies: tuple[Tensor | PackedWeight, Tensor | None] | None = None
        self._of: tuple[Tensor | None, Tensor | None] = None, None
        self._state: tuple = ()

    def of(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | PackedWeight, Tensor | None]:
        """Return the copies of a weight and a bias in this dtype."""
        state = weight._version, weight.data_ptr(), bias is not None and bias._version, dtype
        if self._of[0] is not weight or self._of[1] is not bias or self._state != state:
            self.copies = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
            if self.pack and can_pack(dtype, weight.device):
                self.copies = PackedWeight(self.copies[0]), self.copies[1]
            self._of, self._state = (weight, bias), state
        return self.copies

    def __reduce__(self):
        return type(None), ()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks of products on the device of x, or None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def weights(module: nn.Module, *, packed: bool = True) -> tuple[Tensor | PackedWeight, Tensor | None]:
    """Return the weight and bias of a Linear or a convolution, or their copies within `cast_weights`. Weights that get
    gradients are never copied.

    Args:
        packed: whether the caller takes a `PackedWeight`.
    """
    cast, (weight, bias) = module.__dict__.get("_cast_weights"), weight_and_bias(module)
    if cast is None or transformed():
        return weight, bias
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return weight, bias
    if torch.compiler.is_compiling():
        copies = cast.copies
    elif weight.is_inference():  # torch keeps no count of what is written to it
        return weight, bias
    else:
        copies = cast.of(weight, bias, autocast_dtype(weight) or weight.dtype)
    return (weight, bias) if isinstance(copies[0], PackedWeight) and not packed else copies


def frozen_weights(
    module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor | PackedWeight, Tensor | None]:
    """Return `weights` of a Linear whose weight and bias are known and get no gradient, where nothing traces or
    transforms its product. `dtype` is that of autocast, if it is on."""
    cast = module.__dict__.get("_cast_weights")
    return (weight, bias) if cast is None or weight.is_inference() else cast.of(weight, bias, dtype or weight.dtype)


def product(module: nn.Module, x: Tensor) -> Tensor:
    """timm's Linear. Modifications: the product is ours. A module that is not a plain Linear is called as it is."""
    return linear(x, *weights(module)) if obstacle(module, LINEAR) is None else module(x)


@contextmanager
def cast_weights(model: VisionTransformer, dtype: torch.dtype, *, pack: bool = True) -> Iterator[None]:
    """Return a context in which weights that get no gradients are cast to this dtype once, not in every forward pass.

    On a CPU they are also laid out for its products, unless `pack` is False, because torch.compile does not accept that
    layout. The results are the same, but the copies take memory. See `Cast` for what happens if weights change.
    """
    parts = keep_cast(model, dtype, pack=pack)
    try:
        yield
    finally:
        for part in parts:
            part.__dict__.pop("_cast_weights", None)


def keep_cast(model: VisionTransformer, dtype: torch.dtype, *, pack: bool = True) -> list[nn.Module]:
    """Do what `cast_weights` does, for good. Return the modules whose weights are cast."""
    sliced = getattr(getattr(model.blocks[-1], "attn", None), "qkv", None)  # its rows are read in parts
    parts = [module for module in model.modules() if obstacle(module, LINEAR) is None]
    if embedding_obstacle(model) is None:
        parts.append(model.patch_embed.proj)
    parts = [part for part in parts if part.__dict__.get("_cast_weights") is None]
    for part in parts:
        part._cast_weights = Cast(pack and type(part) is nn.Linear and part is not sliced)
        if not part.weight.is_inference():
            part._cast_weights.of(part.weight, part.bias, dtype)
    return parts
