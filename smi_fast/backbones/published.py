"""SMIAdaptor: a timm model that is called the way the published SMI code calls its model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smi_fast.backbones.casting import keep_cast
from smi_fast.backbones.support import UnsupportedModelError
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.packed import INTEGER_DTYPES


class SMIAdaptor(nn.Module):
    """A fast ViT for code that calls its model the way the published code of Sparse Model Inversion (ICML 2024) does.

        teacher = SMIAdaptor(model)
        logits, attentions, current_abs_index = teacher(images, current_abs_index, next_relative_index)

    The index tensors of that code count *tokens*: 0 is the class token, which stands in the first column of every row,
    and patch i of the grid (row by row from 0) is token i + 1. With a model of N patches,

    - `current_abs_index` (B, P) names the tokens that are in use, which are all N + 1 of them at first.
    - `next_relative_index` (B, Q) names the columns of `current_abs_index` whose tokens go on. If Q equals P, nothing
      is stopped and the values are ignored, because after a stopping that code keeps passing the same old index.

    Args:
        model: a timm model that `accelerate` takes, or an `AcceleratedViT`, whose only prefix token is a class token.
            The weights are shared.
        dtype, backend: arguments for `accelerate`. They cannot be given with a model that is accelerated already.
        freeze: take a copy of the model whose weights need no gradients, as an inversion does not need them. They are
            cast and laid out for the matrix products once, and again after a change (but not one through `.data`, of
            which torch keeps no count).

    Raises:
        UnsupportedModelError: see `accelerate`; also if the convention cannot be applied to the model, because it has
            no class token, further prefix tokens, attention pooling, or a last block that is not timm's plain `Block`
            with `Attention`.
        ValueError: a dtype or backend is given for a model that is accelerated already.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, backend: str = "auto", *, freeze: bool = False
    ):
        super().__init__()
        if not isinstance(model, AcceleratedViT):
            model = accelerate(model, dtype=dtype, backend=backend)
        elif dtype is not None or backend != "auto":
            raise ValueError(f"the model is accelerated already: dtype={dtype} and backend={backend!r} come too late")
        _check_model(model)
        self.fast = copy.deepcopy(model).requires_grad_(False) if freeze else model
        self.freeze = freeze
        self._keep_cast()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_cast()

    def _keep_cast(self) -> None:
        if self.freeze:
            keep_cast(self.fast, self.fast.compute_dtype)

    def forward(
        self, images: Tensor, current_abs_index: Tensor | None = None, next_relative_index: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """Return logits, attention and the tokens that are in use.

        Args:
            images: (B, C, H, W), normalised as the model wants it. Jitter and flip are left to the caller, who
                maps the indices of images that were rolled.
            current_abs_index: (B, P) int64 or int32 on the images' device, in [0, N], distinct within each row.
            next_relative_index: (B, Q), the same but in [0, P). If both are None, all tokens are in use.

        Returns:
            logits: (B, num_classes) in the images' dtype.
            attentions: a list with an entry for each block, as in the published code. Those before the last are None.
                The last is (B, 1, 1, Q) float32: the class token's attention, averaged over heads, to itself and then
                to the other tokens in use. The axes of heads and of queries have length 1, so that the published
                expression `attentions[-1].mean(dim=1)[:, 0, :][:, 1:]` gives the importance (B, Q - 1), and code that
                asks for a single head or for another token's row fails instead of reading a wrong number. It carries
                no gradient.
            current_abs_index: (B, Q) int64, the tokens in use now, in the order of `next_relative_index`. Pass it to
                the next call as its `current_abs_index`.

        Raises:
            ValueError: only one index is given; a shape, dtype or device is wrong; the first column is not the class
                token; there is no patch; or an index is out of range or named twice. The message names the argument,
                the row and the value. On a GPU, device-side assertions check values, so that nothing synchronises.
        """
        index = self._tokens_in_use(images, current_abs_index, next_relative_index)
        logits, importance = self.fast(images, keep=index[:, 1:] - 1, return_attention=True)
        # A softmax row sums to 1, so the rest is the class token's attention to itself.
        rest = (1 - importance.sum(1, keepdim=True)).clamp(min=0)
        attention = torch.cat((rest, importance), dim=1)[:, None, None]  # [B, 1, 1, Q]
        return logits.to(images.dtype), [None] * (len(self.fast.blocks) - 1) + [attention], index

    def _tokens_in_use(self, images: Tensor, current: Tensor | None, following: Tensor | None) -> Tensor:
        """Return the tokens that are in use now, (B, Q) int64."""
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, C, H, W)")
        tokens = self.fast.grid(images.shape[-2:]).num_patches + 1
        if current is None and following is None:
            return torch.arange(tokens, device=images.device).expand(len(images), -1)
        for name, index in (("current_abs_index", current), ("next_relative_index", following)):
            if index is None:
                raise ValueError(f"{name} is None and the other index is not: give both or neither")
            _check_form(name, index, images)
        _check_values("current_abs_index", current, tokens)
        if following.shape[1] == current.shape[1]:
            return current.long()
        _check_values("next_relative_index", following, current.shape[1])
        return current.long().gather(1, following.long())


def _check_model(model: nn.Module) -> None:
    convention = "the published SMI code's indices and attention"
    if not model.has_class_token:
        raise UnsupportedModelError(f"{convention} need a class token, the model has none")
    if model.num_prefix_tokens != 1:
        further = model.num_prefix_tokens - 1
        raise UnsupportedModelError(f"{convention} have no place for prefix tokens but the class token: {further} more")
    if model.global_pool == "map":
        raise UnsupportedModelError(f"{convention} are the class token's, the model's head is an attention pooling")
    last = model.blocks[-1]
    if type(last) is not Block or type(last.attn) is not Attention:
        kind = type(last).__name__ if type(last) is not Block else type(last.attn).__name__
        raise UnsupportedModelError(f"{convention} need a last block of plain attention, the model's is a {kind}")


def _check_form(name: str, index: Tensor, images: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise ValueError(f"{name} is a {type(index).__name__}, expected a tensor")
    if index.ndim != 2 or len(index) != len(images):
        raise ValueError(f"{name} has shape {tuple(index.shape)}, expected ({len(images)}, tokens)")
    if index.shape[1] < 2:
        raise ValueError(f"{name} has {index.shape[1]} columns, expected the class token and at least one patch")
    if index.dtype not in INTEGER_DTYPES:
        raise ValueError(f"{name} has dtype {index.dtype}, expected torch.int64 or torch.int32")
    if index.device != images.device:
        raise ValueError(f"{name} is on {index.device}, the images are on {images.device}")


def _check_values(name: str, index: Tensor, end: int) -> None:
    """Check that each row of (B, P) starts with 0 and holds distinct values in [0, end)."""
    if torch.compiler.is_compiling():
        return  # a traced graph can neither raise nor branch on values
    headless = index[:, 0] != 0
    if index.is_cuda:  # the gather and the forward pass assert the rest
        torch._assert_async(~headless.any(), f"{name} must hold 0, the class token, in its first column")
        return
    if headless.any():
        row = int(headless.nonzero()[0])
        raise ValueError(f"{name} row {row} starts with {int(index[row, 0])}, expected 0, the class token")
    outside = (index < 0) | (index >= end)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(f"{name} row {row} holds {int(index[row, column])}, outside [0, {end})")
    ordered = index.sort(dim=1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if repeated.any():
        row, column = repeated.nonzero()[0].tolist()
        raise ValueError(f"{name} row {row} names {int(ordered[row, column])} twice")
