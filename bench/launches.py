"""The kernel launches that each row of the dispatch table can lead to, on tensors without memory.

Triton compiles a kernel anew for each set of types, of constants, and of arguments that are 1 or multiples of 16. The
cases here are chosen so that each of these differences that the package can meet is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from smi_fast.kernels.attention import MAX_HEAD_DIM, launch_attention, launch_attention_backward
from smi_fast.kernels.backend import Launch, recording
from smi_fast.kernels.class_attention import launch_class_attention, launch_class_attention_backward
from smi_fast.kernels.cross_entropy import launch_cross_entropy, launch_cross_entropy_backward
from smi_fast.kernels.dispatch import choice_of, override, padded_head_dim, table
from smi_fast.kernels.embedding import launch_embed_tokens, launch_embed_tokens_backward
from smi_fast.kernels.mlp import FORMS, launch_bias_gelu, launch_bias_gelu_backward
from smi_fast.kernels.norm import launch_residual_norm, launch_residual_norm_backward
from smi_fast.kernels.patch_entropy import launch_patch_entropy, launch_patch_entropy_backward
from smi_fast.kernels.patches import launch_gather_patches, launch_gather_patches_backward
from smi_fast.kernels.pixels import launch_pixel_step
from smi_fast.kernels.selection import launch_count_mass, launch_select, launch_select_backward

Row = dict[str, Any]
Cases = Iterator[list[Launch]]
IMAGE = 3, 224, 224  # channels, height and width of a CNN's image


def recorded(function: Callable, *args) -> list[Launch]:
    """The launches that `function(*args)` makes. None of them runs."""
    with recording() as launches:
        function(*args)
    return launches


def name_of(launch: Launch) -> str:
    """The file and the function of a kernel, such as "attention.tile_forward"."""
    function = launch.kernel.fn
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__[1:].removesuffix('_kernel')}"


def launches(operation: str, row: Row, *, plainest: bool = False) -> list[Launch]:
    """The launches that a row of the dispatch table can lead to: in every case, or in the plainest case only."""
    with override({operation: choice_of(row)}):
        cases = CASES[operation](row)
        return next(cases) if plainest else [launch for case in cases for launch in case]


def table_launches(arch: str) -> list[Launch]:
    """All launches that the dispatch table can lead to on an architecture."""
    operations = {name: rows for name, rows in table()[arch].items() if name != "source"}
    return [launch for name, rows in operations.items() for row in rows for launch in launches(name, row)]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return _empty(*shape, dtype=dtype)


def _attention_cases(row: Row) -> Iterator[tuple[torch.Tensor, bool]]:
    """qkv of every dtype and head dim that the row is for, and whether its head dim needs no padding. The plainest case
    comes first."""
    dtypes = [torch.float32] if row["dtype"] == "float32" else [torch.bfloat16, torch.float16]
    for head_dim in range(MAX_HEAD_DIM, 0, -8):
        if padded_head_dim(head_dim) == row["head_dim"]:
            plain = head_dim == row["head_dim"]
            for dtype in dtypes if plain else dtypes[:1]:  # the two half precisions compile alike
                for heads in (3, 16) if plain else (3,):  # multiples of 16 are specialised
                    qkv = _empty(8 * row["up_to"], 3, heads, head_dim, dtype=dtype)
                    yield qkv, plain and heads == 3 and dtype == dtypes[0]


def _attention_forward(row: Row) -> Cases:
    for qkv, plain in _attention_cases(row):
        for with_statistics in (True, False):
            for with_class in (True, False):
                if plain or (with_class and with_statistics):
                    outputs = with_class, with_statistics
                    yield recorded(launch_attention, qkv, _integers(9), row["up_to"], 0.125, *outputs)


def _attention_backward(row: Row) -> Cases:
    for qkv, _ in _attention_cases(row):
        out, statistics = torch.empty_like(qkv[:, 0].contiguous()), _empty(2, qkv.shape[2], len(qkv))
        yield recorded(launch_attention_backward, out, qkv, out, statistics, _integers(9), row["up_to"], 0.125)


def _class_attention_forward(row: Row) -> Cases:
    for qkv, _ in _attention_cases(row):
        q, kv = torch.empty_like(qkv[:8, 0].contiguous()), torch.empty_like(qkv[:, 1:].contiguous())
        yield recorded(launch_class_attention, q, kv, _integers(9), row["up_to"], 0.125)


def _class_attention_backward(row: Row) -> Cases:
    for qkv, _ in _attention_cases(row):
        q, kv = torch.empty_like(qkv[:8, 0].contiguous()), torch.empty_like(qkv[:, 1:].contiguous())
        statistics = _empty(*q.shape[:2], 2)
        yield recorded(launch_class_attention_backward, q, q, kv, statistics, _integers(9), row["up_to"], 0.125)


def _select_tokens(row: Row) -> Cases:
    """Dense and packed batches, selection by count and by mass, with values and without. Some of the values have rows
    that can be read 16 bytes at a time, others do not."""
    n = row["up_to"]
    for heads, dtype, channels in ((1, torch.bfloat16, 384), (12, torch.float32, 192), (3, torch.bfloat16, 33)):
        attention, values = _empty(8, heads, n, dtype=dtype), _empty(8, 1 + n, channels, dtype=dtype)
        packed_attention, packed_values = _empty(heads, 8 * (1 + n), dtype=dtype), values.flatten(0, 1)
        starts, limits, positions = _integers(9), _integers(8, 2), _integers(8, n)
        known, counted = (7, 1, 1 + n, 64), (0, 1, 1 + n, 270)
        yield recorded(launch_select, attention, values, None, None, None, None, *known)
        yield recorded(launch_select, attention, None, positions, None, None, None, 7, 0, n, 56)
        yield recorded(launch_count_mass, attention, None, 0.9, 1, 1 + n)
        yield recorded(launch_select, attention, values, positions, None, starts, limits, *counted)
        yield recorded(launch_count_mass, packed_attention, starts, 0.9, 1, 1 + n)
        yield recorded(launch_select, packed_attention, packed_values, None, starts, starts, limits, *counted)
        yield recorded(launch_select, packed_attention, packed_values, None, starts, starts, None, *counted)


def _select_tokens_backward(row: Row) -> Cases:
    for dtype, channels in ((torch.bfloat16, 384), (torch.float32, 192), (torch.bfloat16, 33)):
        yield recorded(launch_select_backward, _empty(270, channels, dtype=dtype), _integers(8, 197))


def _patch_cases(row: Row) -> Iterator[tuple[int, int, int, int, torch.dtype, torch.Tensor | None]]:
    """The patches on a side of the grid, and the channels, height and width of a patch that the row is for, with every
    dtype and kind of view; and the whole images of a CNN, each of which is one patch."""
    sizes = ((3, 8, 8), (1, 16, 16), (3, 14, 14), (3, 16, 16), (3, 32, 32))
    size = max((size for size in sizes if math.prod(size) <= row["up_to"]), key=math.prod)
    for dtype in (torch.bfloat16, torch.float32):
        for view in (None, _integers(3), _integers(8, 3)):
            yield 14, *size, dtype, view
    if math.prod(IMAGE) <= row["up_to"]:
        yield 1, *IMAGE, torch.float32, _integers(3)


def _gather_patches(row: Row) -> Cases:
    for side, channels, ph, pw, dtype, view in _patch_cases(row):
        images = _empty(8, channels, side * ph, side * pw)
        yield recorded(launch_gather_patches, images, _integers(368), _integers(9), view, ph, pw, dtype)


def _gather_patches_backward(row: Row) -> Cases:
    for side, channels, ph, pw, dtype, view in _patch_cases(row):
        grad, inverse = _empty(368, channels * ph * pw, dtype=dtype), _integers(8, side, side)
        args = grad, inverse, view, channels, ph, pw, torch.float32
        yield recorded(launch_gather_patches_backward, *args)


def _pixel_step(row: Row) -> Cases:
    """Both kernels of a step, with every kind of view, prior, norm, gradient and learning rate, and for patches of
    several sizes and whole images."""
    sizes = ((3, 16, 16), (3, 8, 8), (1, 16, 16), (3, 14, 14), (3, 32, 32), IMAGE)
    for channels, ph, pw in sizes:
        side = 1 if (channels, ph, pw) == IMAGE else 14
        images, moments = _empty(8, channels, side * ph, side * pw), _empty(368, channels * ph * pw)
        state = images, moments, moments, _integers(8, dtype=torch.int64), images
        bounds = _integers(368, 4), _empty(channels), _empty(channels)
        usual, rates = (channels, ph, pw) == sizes[0], _empty(4000)
        for view in (_integers(3), _integers(8, 3), None) if usual else (_integers(3),):
            inverse = None if view is None else _integers(8, side, side)
            for dtype in (torch.bfloat16, torch.float32):
                terms = (1e-4, 0.0), (1e-4, 1e-5), (0.0, 1e-5), (0.0, 0.0)
                every = usual and dtype == torch.bfloat16
                for tv_l2, l2 in terms if every else terms[::3] if side == 1 else terms[:1]:
                    args = *state, moments.to(dtype), *bounds, inverse, view, ph, pw, 0.25, 0.5, 0.99, 1e-8, tv_l2, l2
                    yield recorded(launch_pixel_step, *args)
                    if every or side == 1:
                        yield recorded(launch_pixel_step, *args, None, "batch", rates)
                    if every and l2:
                        yield recorded(launch_pixel_step, *args, moments, "batch")
                        yield recorded(launch_pixel_step, *args, moments, "image")
                        yield recorded(launch_pixel_step, *args, None, "image")
                        yield recorded(launch_pixel_step, *args, None, "image", rates)


def _norm_cases(row: Row) -> Iterator[tuple[torch.Tensor, torch.dtype, torch.Tensor | None, torch.Tensor]]:
    """The stream, the dtype of what surrounds it, gamma and weight: for widths of which the row's tile is full, or has
    16 bytes to load at a time, or has not. The plainest case comes first."""
    for channels in (row["up_to"], row["up_to"] * 3 // 4, row["up_to"] // 2 + 1):
        weight = _empty(channels)
        for stream, dtype in ((torch.float32, torch.bfloat16), (torch.float32,) * 2, (torch.bfloat16,) * 2):
            for gamma in (weight, None):
                yield _empty(8, 47, channels, dtype=stream), dtype, gamma, weight.to(stream)


def _residual_norm(row: Row) -> Cases:
    """With an update and without, and for the class tokens' rows, which lie apart."""
    for x, dtype, gamma, weight in _norm_cases(row):
        update = torch.empty_like(x, dtype=dtype)
        yield recorded(launch_residual_norm, x, update, gamma, weight, weight, 1e-6, dtype)
        if gamma is None:
            yield recorded(launch_residual_norm, x, None, None, weight, None, 1e-6, dtype)
            yield recorded(launch_residual_norm, x[:, :1], update[:, :1], None, None, None, 1e-6, dtype)


def _residual_norm_backward(row: Row) -> Cases:
    """With the gradients of the stream and of update, and without; and with those of first tokens."""
    for x, dtype, gamma, weight in _norm_cases(row):
        grad, statistics = torch.empty_like(x, dtype=dtype), _empty(8, 47, 2)
        args = grad, x, statistics, gamma, weight
        yield recorded(launch_residual_norm_backward, x, *args, x.dtype, dtype)
        if gamma is None:
            yield recorded(launch_residual_norm_backward, None, *args, x.dtype, dtype)
            yield recorded(launch_residual_norm_backward, x, *args, x.dtype, None)
            first = x[:, :1].contiguous(), grad[:, :1].contiguous()
            yield recorded(launch_residual_norm_backward, first[0], *args, x.dtype, dtype, first[1])


def _embed_tokens(row: Row) -> Cases:
    """Without position embeddings, with those of patches, and with those of all tokens."""
    for x, dtype, gamma, weight in _norm_cases(row):
        if gamma is None:
            patches, stored = _empty(376, x.shape[-1], dtype=dtype), _empty(197, x.shape[-1], dtype=weight.dtype)
            where = _integers(376), _integers(9), 47
            for pos_embed, embeds_prefix in ((stored, True), (stored, False), (None, False)):
                yield recorded(launch_embed_tokens, patches, *where, stored[:1], pos_embed, embeds_prefix)


def _embed_tokens_backward(row: Row) -> Cases:
    for x, dtype, gamma, _ in _norm_cases(row):
        if gamma is None:
            yield recorded(launch_embed_tokens_backward, x.flatten(0, 1), _integers(9), 46, 368, 1, dtype)


def _cross_entropy(row: Row) -> Cases:
    for x, *_ in _norm_cases(row):
        yield recorded(launch_cross_entropy, x[:, 0], _integers(8, dtype=torch.int64), "mean")


def _cross_entropy_backward(row: Row) -> Cases:
    for x, *_ in _norm_cases(row):
        inputs = x[:, 0], _integers(8, dtype=torch.int64), _empty(8, 2)
        yield recorded(launch_cross_entropy_backward, _empty(), *inputs, "mean")


def _patch_entropy_cases(row: Row) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """x, positions, cumulative lengths and the length of the longest sequence: for channels of which the row's tile is
    full or not, with 3 heads, with 16, which are specialised, and without heads. The plainest case comes first."""
    half = row["up_to"] // 2
    shapes = ((3, 2 * half), (3, half + 4), (16, 2 * half), (2 * half,), (1, half + 8), (3, half // 2), (3, half - 8))
    for shape in shapes[:5] if half > 32 else shapes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if shape == shapes[0] else (torch.bfloat16,):
            yield _empty(376, *shape, dtype=dtype), _integers(376), _integers(9), 47


def _patch_entropy(row: Row) -> Cases:
    for case in _patch_entropy_cases(row):
        for diagonal in (True, False):
            yield recorded(launch_patch_entropy, *case, 0.01, 10, diagonal)


def _patch_entropy_backward(row: Row) -> Cases:
    for x, positions, cu_seqlens, longest in _patch_entropy_cases(row):
        statistics = _empty(376, x.shape[-1]), _empty(376), _empty(10), _empty(8, 10)
        yield recorded(launch_patch_entropy_backward, _empty(8), x, positions, cu_seqlens, *statistics, longest, 0.01)


def _gelu_cases(row: Row) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, str]]:
    """The input, the bias and the form, for widths that allow to read 16 bytes at a time, and for others."""
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (768, 80, 33, 1):
            for bias in (_empty(channels), None):
                for form in FORMS if channels == 768 else FORMS[:1]:
                    yield _empty(376, channels, dtype=dtype), bias, form


def _bias_gelu(row: Row) -> Cases:
    return (recorded(launch_bias_gelu, *case) for case in _gelu_cases(row))


def _bias_gelu_backward(row: Row) -> Cases:
    return (recorded(launch_bias_gelu_backward, x, x, *others) for x, *others in _gelu_cases(row))


def _only(kernel: str, cases: Callable[[Row], Cases]) -> Callable[[Row], Cases]:
    """The same cases with the launches of one kernel only."""
    return lambda row: ([launch for launch in case if name_of(launch) == kernel] for case in cases(row))


CASES = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "class_attention_forward": _class_attention_forward,
    "class_attention_backward": _class_attention_backward,
    "select_tokens": _select_tokens,
    "select_tokens_backward": _select_tokens_backward,
    "gather_patches": _gather_patches,
    "gather_patches_backward": _gather_patches_backward,
    "residual_norm": _residual_norm,
    "residual_norm_backward": _residual_norm_backward,
    "embed_tokens": _embed_tokens,
    "embed_tokens_backward": _embed_tokens_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "bias_gelu": _bias_gelu,
    "bias_gelu_backward": _bias_gelu_backward,
    "patch_entropy": _patch_entropy,
    "patch_entropy_backward": _patch_entropy_backward,
    "prior_sums": _only("pixels.prior_sums", _pixel_step),
    "pixel_step": _only("pixels.pixel_step", _pixel_step),
}
