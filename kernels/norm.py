"""The sum at the end of a residual branch, together with the LayerNorm that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import FLOATS, check_floats, contiguous_like, gives_way, jit, launch, tl
from .dispatch import choose
from .gradients import any_order, gradients
from .operators import apply_of, traced, wants_gradient
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
    _check_residual_norm(x, weight, bias, update, gamma, dtype)
    if backend == "auto" and x.shape[-1] > MAX_CHANNELS:
        backend = "torch"
    arguments = x, update, gamma, weight, bias, eps, dtype or _stream_dtype(x, update, gamma)
    if gives_way(backend, (x, update), (gamma, weight, bias)):
        return residual_norm_reference(*arguments)
    tracing = traced(x)
    if not tracing and wants_gradient(x, update):
        return apply_of(_ResidualNorm)(*arguments)
    stream, normed, _ = (residual_norm_op if tracing else launch_residual_norm)(*arguments)
    return x if update is None else stream, normed


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
    others = [tensor.dtype for tensor in (update, gamma) if tensor is not None and tensor.dtype != x.dtype]
    if not others:
        return x.dtype
    return torch.float64 if torch.float64 in (x.dtype, *others) else torch.float32


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
    statistics (T, 2) are the mean and rstd of each row, which the backward pass reads.
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
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, rstd)


@jit
def _residual_norm_backward_kernel(
    grad_x,
    grad_update,
    grad_stream,
    grad_normed,
    x,
    statistics,
    gamma,
    weight,
    x_stride,
    C: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = ds + rstd (g - mean(g) - n mean(g n)) and d update = gamma dx of one row, where n = (s - mean) rstd, ds is
    the gradient of the stream s, and g = weight times that of the normalised row (the chain rule on Ba et al. 2016,
    equation 3).

    All programs together read s and both gradients and write both results once: for a float32 stream and rows in half
    precision, 16 bytes for each of T C elements, and 14 without an update. They compute about 13 T C operations.
    """
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
    g = load_row(grad_normed + row * C, C, BC)  # [BC]
    if weight is not None:
        g *= load_row(weight, C, BC)
    n = tl.where(tl.arange(0, BC) < C, (load_row(x + row * x_stride, C, BC) - mean) * rstd, 0.0)  # [BC]
    grad = (g - tl.sum(g, 0) / C - n * (tl.sum(g * n, 0) / C)) * rstd  # [BC]
    if grad_stream is not None:
        grad += load_row(grad_stream + row * C, C, BC)
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
    if x.numel():
        (x, stride), rows, channels = _as_rows(x), normed.numel() // x.shape[-1], x.shape[-1]
        update, gamma, weight, bias = _contiguous(update, gamma, weight, bias)
        _, tiles = choose("residual_norm", x.device, channels)
        launch(
            _residual_norm_kernel, (rows,), out=None if update is None else stream,
            normed=normed, statistics=statistics, x=x, update=update, gamma=gamma, weight=weight, bias=bias,
            x_stride=stride, eps=eps, C=channels, **tiles,
        )  # fmt: skip
    return stream, normed, statistics


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
) -> tuple[Tensor, Tensor]:
    """Compute the gradients (..., C) of x in `dtype` and of update in `update_dtype` in Triton, writing each element
    once. Where a dtype is None, the gradient is not computed, and an empty tensor is returned for it.

    Args:
        grad_stream, grad_normed: (..., C), the gradients of what `residual_norm` returned.
        stream: (..., C), the stream that was normalised.
        statistics: (..., 2), what `launch_residual_norm` returned.
    """
    grads = _fake_residual_norm_backward(
        grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype
    )
    if stream.numel():
        (stream, stride), rows, channels = _as_rows(stream), grad_normed.numel() // stream.shape[-1], stream.shape[-1]
        grad_x, grad_update = (grad if grad.numel() else None for grad in grads)
        grad_stream, grad_normed, gamma, weight = _contiguous(grad_stream, grad_normed, gamma, weight)
        _, tiles = choose("residual_norm_backward", stream.device, channels)
        launch(
            _residual_norm_backward_kernel, (rows,), grad_x=grad_x, grad_update=grad_update,
            grad_stream=grad_stream, grad_normed=grad_normed, x=stream, statistics=statistics, gamma=gamma,
            weight=weight, x_stride=stride, C=channels, **tiles,
        )  # fmt: skip
    return grads


residual_norm_backward_op = torch.library.custom_op(
    "smi_fast::residual_norm_backward", launch_residual_norm_backward, mutates_args=()
)


@residual_norm_backward_op.register_fake
def _fake_residual_norm_backward(grad_stream, grad_normed, stream, statistics, gamma, weight, dtype, update_dtype):
    return tuple(
        stream.new_empty(0) if wanted is None else contiguous_like(stream, wanted) for wanted in (dtype, update_dtype)
    )


def _keep(ctx, inputs, stream: Tensor, statistics: Tensor) -> None:
    x, update, gamma, weight, bias, ctx.eps, ctx.dtype = inputs
    ctx.input_dtypes = x.dtype, None if update is None else update.dtype
    ctx.save_for_backward(stream, statistics, gamma, weight, bias)
    ctx.set_materialize_grads(False)  # Otherwise zeros would be written where the stream is not used any more.


def _wanted(ctx) -> list[torch.dtype | None]:
    """The dtypes of the gradients of x and of update, None where none is wanted."""
    return [dtype if need else None for dtype, need in zip(ctx.input_dtypes, ctx.needs_input_grad, strict=False)]


def _of_sum(ctx, grad: Tensor, gamma: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs, given that of the sum, computed by differentiable operators of torch."""
    x, update = _wanted(ctx)
    scaled = grad if gamma is None or update is None else grad * gamma
    return (x and grad.to(x), update and scaled.to(update), *(None for _ in range(5)))


def _derivative(ctx, grad_stream, grad_normed, *_):
    stream, _, gamma, weight, bias = ctx.saved_tensors
    terms = [] if grad_stream is None else [grad_stream]
    if grad_normed is not None:
        terms += gradients(lambda s: _layer_norm(s, weight, bias, ctx.eps, ctx.dtype), (stream,), grad_normed)
    return _of_sum(ctx, sum(terms), gamma)


@any_order(_derivative)
def _backward(ctx, grad_stream, grad_normed, *_):
    stream, statistics, gamma, weight, _ = ctx.saved_tensors
    if grad_normed is None:
        return _of_sum(ctx, grad_stream, gamma)
    x, update = _wanted(ctx)
    alike = gamma is None and x == update  # then both gradients are the same tensor
    tracing = traced(grad_normed) or (grad_stream is not None and traced(grad_stream))
    run = residual_norm_backward_op if tracing else launch_residual_norm_backward
    grad_x, grad_update = run(grad_stream, grad_normed, stream, statistics, gamma, weight, x, None if alike else update)
    return (x and grad_x, update and (grad_x if alike else grad_update), *(None for _ in range(5)))


class _ResidualNorm(torch.autograd.Function):
    """The same rule as that of `residual_norm_op`, for which the host needs less time."""

    @staticmethod
    def forward(ctx, *inputs):
        x, update, *_ = inputs
        stream, normed, statistics = launch_residual_norm(*inputs)
        stream = x if update is None else stream
        _keep(ctx, inputs, stream, statistics)
        return stream, normed

    backward = staticmethod(_backward)


def _save_for_backward(ctx, inputs, output) -> None:
    x, update, *_ = inputs
    stream, _, statistics = output
    _keep(ctx, inputs, x if update is None else stream, statistics)
    ctx.mark_non_differentiable(*([stream, statistics] if update is None else [statistics]))


residual_norm_op.register_autograd(_backward, setup_context=_save_for_backward)
