"""The sum at the end of a residual branch, together with the LayerNorm that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import FLOATS, check_floats, contiguous_like, gives_way, jit, launch, tl
from .cpu import CPP_TYPES, call_cpp, suits_cpp
from .dispatch import choose
from .gradients import any_order, gradients
from .operators import apply_of, differentiable, traced, wants_gradient
from .tiles import load_row, store_row

MAX_CHANNELS = 4096  # in one tile; wider rows are left to plain torch


def residual_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    update: Tensor | None = None,
    gamma: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute s = x + gamma * update, and its LayerNorm (s - mean) / sqrt(variance + eps) * weight + bias (Ba et al.
    2016, equation 3; gamma is the LayerScale of Touvron et al. 2021, section 2).

    The Triton kernels compute gradients of x and of update only. If gamma, weight or bias asks for a gradient, plain
    torch computes everything.

    Args:
        x: (..., C), the residual stream. Its dtype is float32, bfloat16 or float16, and in plain torch it may be
            float64. All other tensors may have any of these dtypes.
        weight, bias: (C,), or None for 1 and 0.
        eps: what is added to the variance.
        update: (..., C), what a branch adds to the stream. Without it, s is x.
        gamma: (C,), the factors of the update, or None for 1.
        dtype: the dtype of the normalised rows; by default that of s.
        backend: "auto", "triton" or "torch".

    Returns:
        The stream s and the normalised rows, (..., C) each. s has the dtype that torch gives the sum: float32 for a
        float32 stream and a bfloat16 update. Mean and variance are computed in float32, or in float64 for float64.

    Raises:
        ValueError: a shape, dtype, device or size is not as described above.
    """
    return _residual_norm(x, weight, bias, eps, update, gamma, dtype, backend, None)


def residual_norm_of_first(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    first: int,
    update: Tensor | None = None,
    gamma: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `residual_norm` of x (B, N, C) where only the first tokens of each sequence are used of the stream, and
    where some of the normalised rows' readers read no other tokens either.

    Slices would give the same numbers. But the backward pass of a slice fills a gradient of all rows with zeros, which
    is then added to another one. Here the kernel adds the gradients of the first rows.

    Args:
        first: how many tokens of each sequence are the first ones, from 1 to N.

    Returns:
        The first rows of the stream (B, first, C), all normalised rows (B, N, C), and the first of them (B, first, C).

    Raises:
        ValueError: see `residual_norm`, or x is not (B, N, C) with N >= first >= 1.
    """
    if x.dim() != 3 or not 1 <= first <= x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (batch, tokens, channels) with tokens >= first = {first}")
    return _residual_norm(x, weight, bias, eps, update, gamma, dtype, backend, first)


def _residual_norm(x, weight, bias, eps, update, gamma, dtype, backend, first: int | None) -> tuple[Tensor, ...]:
    _check_residual_norm(x, weight, bias, update, gamma, dtype)
    if backend == "auto" and x.shape[-1] > MAX_CHANNELS:
        backend = "torch"
    arguments = x, update, gamma, weight, bias, float(eps), dtype or _stream_dtype(x, update, gamma)
    if gives_way(backend, (x, update), (gamma, weight, bias)):
        if backend == "auto" and not wants_gradient(gamma, weight, bias) and _suits_cpp(*arguments):
            stream, normed, _ = _residual_norm_in_cpp(*arguments)
        else:
            stream, normed = residual_norm_reference(*arguments)
        return _with_first(stream, normed, first)
    if not traced(x):
        return believed_residual_norm(*arguments, first)
    stream, normed, _ = residual_norm_op(*arguments)
    return _with_first(x if update is None else stream, normed, first)


def believed_residual_norm(
    x: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    first: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute `residual_norm` in Triton of arguments that have been checked, where nothing traces it and neither gamma,
    weight nor bias gets a gradient. With `first`, compute `residual_norm_of_first`."""
    sum_dtype = _stream_dtype(x, update, gamma)
    dtype = dtype or sum_dtype
    if wants_gradient(x, update):
        stream, normed, *of_first = _recorded_residual_norm(x, update, gamma, weight, bias, eps, dtype, first)
        return (of_first[0], normed, of_first[1]) if of_first else (stream, normed)
    stream, normed = x if update is None else contiguous_like(x, sum_dtype), contiguous_like(x, dtype)
    _launch_residual_norm(stream, normed, None, x, update, gamma, weight, bias, eps)
    return _with_first(stream, normed, first)


def _with_first(stream: Tensor, normed: Tensor, first: int | None) -> tuple[Tensor, ...]:
    """Return what `residual_norm` returns if `first` is None, and otherwise what `residual_norm_of_first` does."""
    return (stream, normed) if first is None else (stream[:, :first], normed, normed[:, :first])


def _check_residual_norm(x, weight, bias, update, gamma, dtype) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (..., channels)")
    if gamma is not None and update is None:
        raise ValueError("gamma is given without an update that it could scale")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, not float32, bfloat16, float16 or float64")
    shape, device = x.shape, x.device
    for name, rows in (("x", x), ("update", update)):
        if rows is not None:
            check_floats(name, rows, shape, device)
    for name, row in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        if row is not None:
            check_floats(name, row, shape[-1:], device)


def _stream_dtype(x: Tensor, update: Tensor | None, gamma: Tensor | None) -> torch.dtype:
    """Return the dtype that torch gives x + gamma * update, without asking it, which would call an operator."""
    dtype = x.dtype
    if (update is None or update.dtype == dtype) and (gamma is None or gamma.dtype == dtype):
        return dtype
    dtypes = [tensor.dtype for tensor in (x, update, gamma) if tensor is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def residual_norm_reference(
    x: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Define `residual_norm` in plain torch."""
    if update is not None:
        x = x + (update if gamma is None else update * gamma)
    return x, _layer_norm(x, weight, bias, eps, dtype)


def _layer_norm(s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    exact = torch.promote_types(s.dtype, torch.float32)
    weight, bias = (None if x is None else x.to(exact) for x in (weight, bias))
    return F.layer_norm(s.to(exact), s.shape[-1:], weight, bias, eps).to(dtype)


def _suits_cpp(x, update, gamma, weight, bias, _, dtype) -> bool:
    if dtype not in CPP_TYPES or not suits_cpp(x, update, gamma, weight, bias):
        return False
    return x.numel() > 0 and x.shape[-1] <= MAX_CHANNELS


def residual_norm_in_cpp(x, update, gamma, weight, bias, eps, dtype):
    """Do what `launch_residual_norm` does, in C++. Without an update, the stream is x."""
    stream, normed, statistics = _fake_residual_norm(x, update, gamma, weight, bias, eps, dtype)
    (rows, stride), channels = _as_rows(x), x.shape[-1]
    update, gamma, weight, bias = _contiguous(update, gamma, weight, bias)
    call_cpp(
        "residual_norm", None if update is None else stream, normed, statistics, rows, update, gamma, weight, bias,
        rows.numel() // channels, channels, stride, eps,
    )  # fmt: skip
    return x if update is None else stream, normed, statistics


def residual_norm_backward_in_cpp(grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype):
    """Do what `launch_residual_norm_backward` does, in C++."""
    grads = _fake_residual_norm_backward(
        grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype
    )
    (rows, stride), channels = _as_rows(stream), stream.shape[-1]
    grad_x, grad_update = (grad if grad.numel() else None for grad in grads)
    grad_stream, grad_normed, gamma, weight = _contiguous(grad_stream, grad_normed, gamma, weight)
    call_cpp(
        "residual_norm_backward", grad_x, grad_update, grad_stream, grad_normed, rows, statistics, gamma, weight,
        rows.numel() // channels, channels, stride,
    )  # fmt: skip
    return grads


@jit
def _residual_norm_kernel(
    out,
    normed,
    statistics,
    x,
    update,
    gamma,
    weight,
    bias,
    x_stride,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
):
    """s = x + gamma update and (s - mean) rstd weight + bias of one row, with rstd = 1 / sqrt(variance + eps) (Ba et
    al. 2016, equation 3).

    All programs together read x and update and write s and the normalised rows once: for a float32 stream and rows in
    half precision, 12 bytes for each of T C elements, and 6 without an update. They compute about 9 T C operations. The
    statistics (T, 2) are the mean and rstd of each row, which the backward pass reads; they may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    s = load_row(x + row * x_stride, C, BC)  # [BC]
    if update is not None:
        added = load_row(update + row * C, C, BC)  # [BC]
        if gamma is not None:
            added *= load_row(gamma, C, BC)
        s = (s + added).to(out.dtype.element_ty)
        store_row(out + row * C, s, C, BC)
        s = s.to(tl.float32)  # the norm is that of the rounded stream, which the backward pass reads
    mean = tl.div_rn(tl.sum(s, 0), 1.0 * C)  # rounded once: an error here would shift the whole row
    centred = tl.where(tl.arange(0, BC) < C, s - mean, 0.0)  # [BC]
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    scaled = centred * rstd  # [BC]
    if weight is not None:
        scaled *= load_row(weight, C, BC)
    if bias is not None:
        scaled += load_row(bias, C, BC)
    store_row(normed + row * C, scaled, C, BC)
    if statistics is not None:
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, rstd)


@jit
def _add_first_row(row, grad, number, tokens, FIRST: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """Add the row of a gradient to row `number`. The gradient has a row for each of the first tokens of a sequence, or
    for all rows if FIRST is 0."""
    if FIRST == 0:
        return row + load_row(grad + number * C, C, BC)
    token = number % tokens
    if token < FIRST:
        row += load_row(grad + (number // tokens * FIRST + token) * C, C, BC)
    return row


@jit(do_not_specialize=["tokens"])
def _residual_norm_backward_kernel(
    grad_x,
    grad_update,
    grad_stream,
    grad_normed,
    grad_first,
    x,
    statistics,
    gamma,
    weight,
    tokens,
    x_stride,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = ds + rstd (g - mean(g) - n mean(g n)) and d update = gamma dx of one row, where n = (s - mean) rstd, ds is
    the gradient of the stream s, and g = weight times that of the normalised row (the chain rule on Ba et al. 2016,
    equation 3). The first tokens of a sequence may have a second gradient of their normalised rows. If FIRST is not 0,
    ds and that gradient are given for the FIRST first of every `tokens` rows.

    All programs together read s and both gradients and write both results once: for a float32 stream and rows in half
    precision, 16 bytes for each of T C elements, and 14 without an update. They compute about 13 T C operations.
    """
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
    g = load_row(grad_normed + row * C, C, BC)  # [BC]
    if grad_first is not None:
        g = _add_first_row(g, grad_first, row, tokens, FIRST, C, BC)
    if weight is not None:
        g *= load_row(weight, C, BC)
    n = tl.where(tl.arange(0, BC) < C, (load_row(x + row * x_stride, C, BC) - mean) * rstd, 0.0)  # [BC]
    grad = (g - tl.sum(g, 0) / C - n * (tl.sum(g * n, 0) / C)) * rstd  # [BC]
    if grad_stream is not None:
        grad = _add_first_row(grad, grad_stream, row, tokens, FIRST, C, BC)
    if grad_x is not None:
        store_row(grad_x + row * C, grad, C, BC)
    if grad_update is not None:
        if gamma is not None:
            grad *= load_row(gamma, C, BC)
        store_row(grad_update + row * C, grad, C, BC)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x (..., C) as rows at equal distances, such as those of class tokens, and the distance from one row to the
    next. Other layouts are copied."""
    if not x.is_contiguous():
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(1) == 1 else x.contiguous()
        return x, x.stride(0)
    return x, x.shape[-1]  # without a view, which would cost the host time


def launch_residual_norm(
    x: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass in Triton. Returns the stream (..., C), or an empty tensor without an update; the normalised
    rows (..., C); and the statistics (..., 2) float32 that the backward pass reads."""
    stream, normed, statistics = _fake_residual_norm(x, update, gamma, weight, bias, eps, dtype)
    _launch_residual_norm(stream, normed, statistics, x, update, gamma, weight, bias, eps)
    return stream, normed, statistics


def _launch_residual_norm(stream, normed, statistics: Tensor | None, x, update, gamma, weight, bias, eps) -> None:
    """Write the outputs that are given. The stream is one only with an update."""
    if x.numel():
        (x, stride), rows, channels = _as_rows(x), normed.numel() // x.shape[-1], x.shape[-1]
        update, gamma, weight, bias = _contiguous(update, gamma, weight, bias)
        _, tiles = choose("residual_norm", x.device, channels)
        launch(
            _residual_norm_kernel, (rows,), out=None if update is None else stream,
            normed=normed, statistics=statistics, x=x, update=update, gamma=gamma, weight=weight, bias=bias,
            x_stride=stride, eps=eps, C=channels, **tiles,
        )  # fmt: skip


residual_norm_op = torch.library.custom_op("smi_fast::residual_norm", launch_residual_norm, mutates_args=())


@residual_norm_op.register_fake
def _fake_residual_norm(x, update, gamma, weight, bias, eps, dtype):
    stream = x.new_empty(0) if update is None else contiguous_like(x, _stream_dtype(x, update, gamma))
    statistics = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    return stream, contiguous_like(x, dtype), statistics


def launch_residual_norm_backward(
    grad_stream: Tensor | None,
    grad_normed: Tensor,
    stream: Tensor,
    statistics: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    update_dtype: torch.dtype | None,
    grad_first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients (..., C) of x in `dtype` and of update in `update_dtype` in Triton, writing each element
    once. Where a dtype is None, the gradient is not computed, and an empty tensor is returned for it.

    Args:
        grad_stream, grad_normed: (..., C), the gradients of what `residual_norm` returned. Instead, grad_stream may be
            (B, first, C), as for `residual_norm_of_first`.
        stream: (..., C), the stream that was normalised.
        statistics: (..., 2), what `launch_residual_norm` returned.
        grad_first: the gradient of the first normalised rows, of the shape of grad_stream, or None.
    """
    grads = _fake_residual_norm_backward(
        grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype
    )
    grad_x, grad_update = (grad if grad.numel() else None for grad in grads)
    _launch_backward(grad_x, grad_update, grad_stream, grad_normed, stream, statistics, gamma, weight, grad_first)
    return grads


def _believed_backward(
    grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype, grad_first=None
) -> tuple[Tensor | None, Tensor | None]:
    """Do what `launch_residual_norm_backward` does, but return None for a gradient that is not computed."""
    grad_x = None if dtype is None else contiguous_like(stream, dtype)
    grad_update = None if update_dtype is None else contiguous_like(stream, update_dtype)
    _launch_backward(grad_x, grad_update, grad_stream, grad_normed, stream, statistics, gamma, weight, grad_first)
    return grad_x, grad_update


def _launch_backward(
    grad_x, grad_update, grad_stream, grad_normed, stream, statistics, gamma, weight, grad_first
) -> None:
    """Write the gradients that are given."""
    if stream.numel():
        of_first = grad_stream if grad_first is None else grad_first
        whole = of_first is None or of_first.shape == stream.shape
        tokens, first = (1, 0) if whole else (stream.shape[1], of_first.shape[1])
        (stream, stride), rows, channels = _as_rows(stream), grad_normed.numel() // stream.shape[-1], stream.shape[-1]
        grad_stream, grad_normed, grad_first, gamma, weight = _contiguous(
            grad_stream, grad_normed, grad_first, gamma, weight
        )
        _, tiles = choose("residual_norm_backward", stream.device, channels)
        launch(
            _residual_norm_backward_kernel, (rows,), grad_x=grad_x, grad_update=grad_update,
            grad_stream=grad_stream, grad_normed=grad_normed, grad_first=grad_first, x=stream, statistics=statistics,
            gamma=gamma, weight=weight, tokens=tokens, x_stride=stride, FIRST=first, C=channels, **tiles,
        )  # fmt: skip


residual_norm_backward_op = torch.library.custom_op(
    "smi_fast::residual_norm_backward", launch_residual_norm_backward, mutates_args=()
)


@residual_norm_backward_op.register_fake
def _fake_residual_norm_backward(
    grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype, grad_first=None
):
    return tuple(
        stream.new_empty(0) if wanted is None else contiguous_like(stream, wanted) for wanted in (dtype, update_dtype)
    )


def _keep(ctx, inputs, stream: Tensor, statistics: Tensor) -> None:
    x, update, gamma, weight, bias, ctx.eps, ctx.dtype = inputs
    ctx.input_dtypes = x.dtype, None if update is None else update.dtype
    ctx.save_for_backward(stream, statistics, gamma, weight, bias)
    ctx.set_materialize_grads(False)  # Otherwise zeros would be written where the stream is not used any more.


def _of_inputs(ctx, x: Tensor | None, update: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs, given those of x and of update."""
    return (x, update, *(None,) * (len(ctx.needs_input_grad) - 2))


def _wanted(ctx) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of the gradients of x and of update, None where none is wanted."""
    (x, update), (wants_x, wants_update, *_) = ctx.input_dtypes, ctx.needs_input_grad
    return x if wants_x else None, update if wants_update else None


def _of_sum(ctx, grad: Tensor, gamma: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs, given that of the sum, computed by differentiable operators of torch."""
    x, update = _wanted(ctx)
    scaled = grad if gamma is None or update is None else grad * gamma
    return _of_inputs(ctx, x and grad.to(x), update and scaled.to(update))


def _total(stream: Tensor, grad: Tensor | None, grad_first: Tensor | None) -> Tensor | None:
    """Add up the gradient of all tokens and that of the first ones, where they are given."""
    grads = [] if grad is None else [grad]
    if grad_first is not None:
        grads.append(F.pad(grad_first, (0, 0, 0, stream.shape[1] - grad_first.shape[1])))
    return reduce(torch.add, grads) if grads else None


def _of_first(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the first rows of the stream and of the normalised rows. The operator has no such rows,
    but statistics."""
    return tuple(grads) if len(grads) == 2 else (None, None)


def _derivative(ctx, grad_stream, grad_normed, *others):
    (stream, _, gamma, weight, bias), (stream_first, grad_first) = ctx.saved_tensors, _of_first(others)
    total, of_rows = _total(stream, grad_stream, stream_first), _total(stream, grad_normed, grad_first)
    terms = [] if total is None else [total]
    if of_rows is not None:
        terms += gradients(lambda s: _layer_norm(s, weight, bias, ctx.eps, ctx.dtype), (stream,), of_rows)
    return _of_sum(ctx, sum(terms), gamma)


@any_order(_derivative)
def _backward(ctx, grad_stream, grad_normed, *others):
    saved, (stream_first, grad_first) = ctx.saved_tensors, _of_first(others)  # torch unpacks saved tensors once only
    if grad_stream is None and grad_normed is not None:
        grad_stream = stream_first
    elif stream_first is not None or grad_first is not None:
        grad_stream = _total(saved[0], grad_stream, stream_first)
        grad_normed, grad_first = _total(saved[0], grad_normed, grad_first), None
    run = residual_norm_backward_op if traced(grad_stream, grad_normed, grad_first) else _believed_backward
    return _gradients(ctx, saved, run, grad_stream, grad_normed, grad_first)


@any_order(_derivative)
def _backward_in_cpp(ctx, grad_stream, grad_normed, _):
    if not suits_cpp(grad_stream, grad_normed):
        return _derivative(ctx, grad_stream, grad_normed)
    return _gradients(ctx, ctx.saved_tensors, residual_norm_backward_in_cpp, grad_stream, grad_normed)


def _gradients(
    ctx, saved: Sequence[Tensor | None], run: Callable, grad_stream, grad_normed, *grad_first
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs. `run` computes them from those of the outputs."""
    stream, statistics, gamma, weight, _ = saved
    if grad_normed is None:
        return _of_sum(ctx, grad_stream, gamma)
    x, update = _wanted(ctx)
    alike = gamma is None and x == update  # then both gradients are the same tensor
    grad_x, grad_update = run(
        grad_stream, grad_normed, stream, statistics, gamma, weight, x, None if alike else update, *grad_first
    )
    return _of_inputs(ctx, x and grad_x, update and (grad_x if alike else grad_update))


class _ResidualNorm(torch.autograd.Function):
    """The same rule as that of `residual_norm_op`, for which the host needs less time. With `first`, it also returns
    the first rows of both results. The whole stream stays a result: a saved tensor depends on the inputs, as gradients
    of gradients need it to, only if it is an input or a result."""

    @staticmethod
    def forward(ctx, *inputs):
        *arguments, first = inputs
        x, update, *_ = arguments
        stream, normed, statistics = launch_residual_norm(*arguments)
        stream = x if update is None else stream
        _keep(ctx, arguments, stream, statistics)
        return (stream, normed) if first is None else (stream, normed, stream[:, :first], normed[:, :first])

    backward = staticmethod(_backward)


_recorded_residual_norm = apply_of(_ResidualNorm)


def _save_for_backward(ctx, inputs, output) -> None:
    x, update, *_ = inputs
    stream, _, statistics = output
    _keep(ctx, inputs, x if update is None else stream, statistics)
    ctx.mark_non_differentiable(*([stream, statistics] if update is None else [statistics]))


residual_norm_op.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_backward_in_cpp(ctx, inputs, output) -> None:
    stream, _, statistics = output
    _keep(ctx, inputs, stream, statistics)
    ctx.mark_non_differentiable(statistics)


_residual_norm_in_cpp = differentiable(residual_norm_in_cpp, _save_for_backward_in_cpp, _backward_in_cpp)
