"""Copies of weights in the dtype and layout of the matrix products, made once instead of in every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.backbones.support import LINEAR, embedding_obstacle, obstacle
from smi_fast.kernels.linear import PackedWeight, can_pack


def weights(module: nn.Module) -> tuple[Tensor | PackedWeight, Tensor | None]:
    """Return the weight and bias of a Linear or a convolution, or the copies of them that `cast_weights` has made."""
    return getattr(module, "_cast_weights", None) or (module.weight, module.bias)


@contextmanager
def cast_weights(model: VisionTransformer, dtype: torch.dtype, *, pack: bool = True) -> Iterator[None]:
    """Return a context in which weights are cast only once. They must not change while it lasts.

    The weights of matrix products are cast to the compute dtype once, not in every forward pass. On a CPU they are
    also laid out for its products, unless `pack` is False, because torch.compile does not accept that layout. The
    results are the same, but the copies take memory.
    """
    parameter = next(model.parameters())
    pack = pack and can_pack(dtype, parameter.device)
    sliced = getattr(getattr(model.blocks[-1], "attn", None), "qkv", None)  # its rows are read in parts
    parts = [module for module in model.modules() if obstacle(module, LINEAR) is None]
    if embedding_obstacle(model) is None:
        parts.append(model.patch_embed.proj)
    parts = [part for part in parts if not hasattr(part, "_cast_weights")]
    if dtype == parameter.dtype and not pack:
        parts = []
    try:
        for part in parts:
            weight = part.weight.detach().to(dtype)
            bias = None if part.bias is None else part.bias.detach().to(dtype)
            if pack and type(part) is nn.Linear and part is not sliced:
                weight = PackedWeight(weight)
            part._cast_weights = weight, bias
        yield
    finally:
        for part in parts:
            part.__dict__.pop("_cast_weights", None)


class KeptCast:
    """Keeps the weights of a model cast, as `cast_weights` does, and casts them again after a change."""

    def __init__(self, model: VisionTransformer, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.close()

    def close(self) -> None:
        if getattr(self, "context", None) is not None:
            self.context.close()
        self.context: ExitStack | None = None
        self.parts: list[nn.Module] = []
        self.tensors: list[Tensor] = []  # held, so that no other tensor gets the address of one of them
        self.seen: list[tuple[int, int, int]] = []

    def refresh(self) -> None:
        """Cast the weights, unless they are cast and were not replaced, moved or written to since."""
        tensors = self._tensors()
        if self.context is not None and self.seen == [_state(tensor) for tensor in tensors]:
            return
        self.close()
        self.context = ExitStack()
        self.context.enter_context(cast_weights(self.model, self.dtype))
        self.parts = [module for module in self.model.modules() if hasattr(module, "_cast_weights")]
        self.tensors = self._tensors()
        self.seen = [_state(tensor) for tensor in self.tensors]

    def _tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part._parameters.values() if tensor is not None]


def _state(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor._version, tensor.data_ptr()
