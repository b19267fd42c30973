"""From embedded patches to the tokens that a transformer reads: position embeddings and prefix tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import check_floats, gives_way, jit, launch, tl
from .dispatch import choose
from .gradients import any_order
from .norm import MAX_CHANNELS
from .operators import operation
from .rows import prepend, rows_behind_prefix
from .tiles import load_row, store_row


def embed_tokens(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefix: Tensor,
    pos_embed: Tensor | None = None,
    *,
    embeds_prefix: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Add position embeddings to packed patches, and put the prefix tokens before each sequence (Dosovitskiy et al.
    2021, equation 1).

    The Triton kernels compute the gradient of x only. If prefix or pos_embed asks for a gradient, plain torch computes
    everything.

    Args:
        x: (T, C), the embedded patches. Its dtype is float32, bfloat16 or float16, and in plain torch it may be
            float64. Prefix and pos_embed may have any of these dtypes.
        positions: (T,) int32, the cell of each patch in the grid.
        cu_seqlens: (B + 1,) int32, cumulative numbers of patches.
        max_seqlen: the number of patches of the longest sequence.
        prefix: (P, C), the class token and others, the same for all sequences.
        pos_embed: (P + N, C), or (N, C) without `embeds_prefix`; or None.
        embeds_prefix: whether the first P position embeddings are those of the prefix tokens.
        backend: "auto", "triton" or "torch".

    Returns:
        The tokens (T + B P, C) in the dtype that torch gives the sums and their concatenation; their positions (T +
        B P,) int32, which are -P to -1 for prefix tokens; and their cumulative numbers (B + 1,) int32.

    Raises:
        ValueError: a shape, dtype or device is not as described above.
    """
    _check_embed_tokens(x, positions, cu_seqlens, prefix, pos_embed, embeds_prefix)
    if backend == "auto" and x.shape[1] > MAX_CHANNELS:
        backend = "torch"
    arguments = x, positions, cu_seqlens, max_seqlen, prefix, pos_embed, embeds_prefix
    # The kernel rounds sums of prefix tokens to the dtype that they share with their position embeddings.
    alike = pos_embed is None or prefix.dtype == pos_embed.dtype
    if gives_way(backend, (x,), (prefix, pos_embed)) or not alike:
        return embed_tokens_reference(*arguments)
    return _embed_tokens(*arguments)


def _check_embed_tokens(x, positions, cu_seqlens, prefix, pos_embed, embeds_prefix) -> None:
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (tokens, channels)")
    if positions.shape != x.shape[:1] or positions.dtype != torch.int32:
        raise ValueError(f"positions is {tuple(positions.shape)} {positions.dtype}, not ({len(x)},) torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, not (batch + 1,) torch.int32")
    check_floats("x", x, x.shape, x.device)
    for name, rows in (("prefix", prefix), ("pos_embed", pos_embed)):
        if rows is not None:
            check_floats(name, rows, (*rows.shape[:1], x.shape[1]), x.device)
    if pos_embed is not None and embeds_prefix and len(pos_embed) < len(prefix):
        raise ValueError(f"pos_embed has {len(pos_embed)} rows, fewer than the {len(prefix)} prefix tokens")
    for name, tensor in (("positions", positions), ("cu_seqlens", cu_seqlens)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


def embed_tokens_reference(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefix: Tensor,
    pos_embed: Tensor | None,
    embeds_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define `embed_tokens` in plain torch."""
    if pos_embed is not None:
        first = len(prefix) if embeds_prefix else 0
        x = x + _rows(pos_embed[first:], positions)
        prefix = prefix + pos_embed[:first] if first else prefix
    return prepend(x, positions, cu_seqlens, max_seqlen, prefix)


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return values[rows]. index_select is one kernel, but its gradient on a GPU is not deterministic."""
    return values[rows] if values.requires_grad else values.index_select(0, rows)


@jit
def _embed_kernel(
    tokens,
    token_positions,
    token_starts,
    x,
    positions,
    cu_seqlens,
    prefix,
    pos_embed,
    PREFIX: tl.constexpr,
    EMBEDDED: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
):
    """x_t + pos_embed[EMBEDDED + positions_t], or a prefix token and its position embedding, of one token of a sequence
    (Dosovitskiy et al. 2021, equation 1). The first EMBEDDED position embeddings are those of prefix tokens.

    All programs together read x and write the tokens once: 6 bytes for each of T C elements in half precision, and what
    the position embeddings have. They compute one operation for each element.
    """
    sequence, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    if token == 0:
        tl.store(token_starts + sequence, start + (sequence * PREFIX).to(tl.int32))
        tl.store(token_starts + sequence + 1, end + ((sequence + 1) * PREFIX).to(tl.int32))
    if token < end - start + PREFIX:
        out = start + sequence * PREFIX + token  # int64
        if token < PREFIX:
            row, place = load_row(prefix + token * C, C, BC), token - PREFIX
            if EMBEDDED:
                row += load_row(pos_embed + token * C, C, BC)
                row = row.to(pos_embed.dtype.element_ty).to(tl.float32)  # their sum is rounded to their dtype
        else:
            t = start.to(tl.int64) + (token - PREFIX)
            row, place = load_row(x + t * C, C, BC), tl.load(positions + t)
            if pos_embed is not None:
                row += load_row(pos_embed + (EMBEDDED + place.to(tl.int64)) * C, C, BC)
        store_row(tokens + out * C, row, C, BC)
        tl.store(token_positions + out, place)


@jit
def _embed_backward_kernel(grad_x, grad, cu_seqlens, PREFIX: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """dx_t = the gradient of the token that x_t became, of one patch of a sequence (the chain rule on Dosovitskiy et
    al. 2021, equation 1). All programs together read and write each of T C elements once."""
    sequence, patch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    if patch < end - start:
        t = start.to(tl.int64) + patch
        store_row(grad_x + t * C, load_row(grad + (t + (sequence + 1) * PREFIX) * C, C, BC), C, BC)


def launch_embed_tokens(
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    prefix: Tensor,
    pos_embed: Tensor | None,
    embeds_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass in Triton, in one launch."""
    tokens, token_positions, token_starts = _fake_embed_tokens(
        x, positions, cu_seqlens, max_seqlen, prefix, pos_embed, embeds_prefix
    )
    (count, channels), batch = prefix.shape, cu_seqlens.shape[0] - 1
    if tokens.numel():
        _, tiles = choose("embed_tokens", x.device, channels)
        launch(
            _embed_kernel, (batch, count + max_seqlen),
            tokens=tokens, token_positions=token_positions, token_starts=token_starts,
            x=x.contiguous(), positions=positions.contiguous(), cu_seqlens=cu_seqlens, prefix=prefix.contiguous(),
            pos_embed=None if pos_embed is None else pos_embed.contiguous(),
            PREFIX=count, EMBEDDED=count if embeds_prefix and pos_embed is not None else 0, C=channels, **tiles,
        )  # fmt: skip
    else:
        token_starts.zero_()
    return tokens, token_positions, token_starts


embed_tokens_op = torch.library.custom_op("smi_fast::embed_tokens", launch_embed_tokens, mutates_args=())


@embed_tokens_op.register_fake
def _fake_embed_tokens(x, positions, cu_seqlens, max_seqlen, prefix, pos_embed, embeds_prefix):
    rows = x.shape[0] + (cu_seqlens.shape[0] - 1) * prefix.shape[0]
    dtype = x.dtype if pos_embed is None else torch.promote_types(x.dtype, pos_embed.dtype)
    dtype = torch.promote_types(dtype, prefix.dtype) if prefix.shape[0] else dtype
    tokens = x.new_empty(rows, x.shape[1], dtype=dtype)
    return tokens, positions.new_empty(rows), torch.empty_like(cu_seqlens)


def launch_embed_tokens_backward(
    grad: Tensor, cu_seqlens: Tensor, max_seqlen: int, tokens: int, count: int, dtype: torch.dtype
) -> Tensor:
    """Compute the gradient (tokens, C) of x in Triton from that of all tokens, in one launch, for `count` prefix tokens
    before each sequence."""
    grad_x = _fake_embed_tokens_backward(grad, cu_seqlens, max_seqlen, tokens, count, dtype)
    if grad_x.numel():
        _, tiles = choose("embed_tokens_backward", grad.device, grad.shape[1])
        launch(
            _embed_backward_kernel, (cu_seqlens.shape[0] - 1, max_seqlen),
            grad_x=grad_x, grad=grad.contiguous(), cu_seqlens=cu_seqlens, PREFIX=count, C=grad.shape[1], **tiles,
        )  # fmt: skip
    return grad_x


embed_tokens_backward_op = torch.library.custom_op(
    "smi_fast::embed_tokens_backward", launch_embed_tokens_backward, mutates_args=()
)


@embed_tokens_backward_op.register_fake
def _fake_embed_tokens_backward(grad, cu_seqlens, max_seqlen, tokens, count, dtype):
    return grad.new_empty(tokens, grad.shape[1], dtype=dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    x, _, cu_seqlens, ctx.max_seqlen, prefix, *_ = inputs
    ctx.tokens, ctx.count, ctx.dtype = x.shape[0], prefix.shape[0], x.dtype
    ctx.save_for_backward(cu_seqlens)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise zeros are written as the gradients of positions and lengths


def _derivative(ctx, grad, *_):
    rows = rows_behind_prefix(*ctx.saved_tensors, ctx.tokens, ctx.count)
    return grad.index_select(0, rows).to(ctx.dtype), *(None for _ in ctx.needs_input_grad[1:])


@any_order(_derivative)
def _backward(ctx, grad, *_):
    grad = _embed_tokens_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.tokens, ctx.count, ctx.dtype)
    return grad, *(None for _ in ctx.needs_input_grad[1:])


_embed_tokens_backward = operation(embed_tokens_backward_op, launch_embed_tokens_backward)
_embed_tokens = operation(embed_tokens_op, launch_embed_tokens, setup_context=_save_for_backward, backward=_backward)
