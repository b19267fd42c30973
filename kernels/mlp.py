"""The bias and the activation between the two products of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cdiv, check_floats, contiguous_like, gives_way, jit, launch, tl
from .dispatch import choose
from .gradients import any_order, gradients
from .operators import differentiable, operation

FORMS = ("none", "tanh", "quick")


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str = "auto") -> Tensor:
    """Compute GELU(x + bias) (Hendrycks and Gimpel 2016, section 2).

    With z = x + bias, GELU(z) = z (1 + erf(z / sqrt(2))) / 2. Its approximations are
    z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2 ("tanh") and z sigmoid(1.702 z) ("quick").

    The backward pass reads x and the bias again, so nothing else is kept. The Triton kernels compute the gradient of x
    only. If the bias asks for a gradient, plain torch computes everything.

    Args:
        x: (..., N), a product without its bias, or with it if `bias` is None. Its dtype is float32, bfloat16 or
            float16, and in plain torch it may be float64.
        bias: (N,) of any of these dtypes, or None.
        approximate: "none", "tanh" or "quick". The first two are those of `torch.nn.functional.gelu`.
        backend: "auto", "triton" or "torch".

    Returns:
        (..., N) of the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or name is not as described above.
    """
    _check_bias_gelu(x, bias, approximate)
    if gives_way(backend, (x,), (bias,)):
        return bias_gelu_reference(x, bias, approximate)
    return _bias_gelu(x, bias, approximate)


def _check_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    if approximate not in FORMS:
        raise ValueError(f"approximate is {approximate!r}, none of {', '.join(FORMS)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, not (..., channels)")
    check_floats("x", x, x.shape, x.device)
    if bias is not None:
        check_floats("bias", bias, x.shape[-1:], x.device)


def bias_gelu_reference(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Define `bias_gelu` in plain torch."""
    z = x if bias is None else (x + bias).to(x.dtype)
    if approximate == "quick":
        return F.silu(1.702 * z) / 1.702  # one operator less than z sigmoid(1.702 z), and one tensor less to keep
    return F.gelu(z, approximate=approximate)


@jit
def _gate(z, APPROXIMATE: tl.constexpr):
    """Return what GELU multiplies z by, and z times its derivative.

    The tanh form is a sigmoid too: (1 + tanh(u)) / 2 = sigmoid(2 u). Its constants are 2 sqrt(2 / pi) and 0.044715
    times that. The constants of the exact form are 1 / sqrt(2) and 1 / sqrt(2 pi).
    """
    if APPROXIMATE == "none":
        gate = 0.5 + 0.5 * tl.erf(0.7071067811865476 * z)
        slope = z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:
        if APPROXIMATE == "tanh":
            u = z * (1.5957691216057308 + 0.07135481627260025 * z * z)
            du = 1.5957691216057308 + 3 * 0.07135481627260025 * z * z
        else:
            u = 1.702 * z
            du = 1.702
        e = tl.exp(-tl.abs(u))
        share = 1 / (1 + e)
        gate = tl.where(u < 0, e * share, share)  # sigmoid(u)
        slope = z * (e * share * share * du)  # sigmoid(u) sigmoid(-u); the difference 1 - sigmoid(u) would cancel
    return gate, slope


@jit
def _load_sum(x, bias, rows, N: tl.constexpr, BE: tl.constexpr):
    """Load x + bias [BE] in float32 for this program, elements in the order of memory. Returns it with the place of the
    first one, and which of them exist."""
    first = tl.program_id(0).to(tl.int64) * BE
    e = tl.arange(0, BE)  # [BE]
    # That the bound is a multiple of N lets the compiler read 16 bytes at a time, whatever the number of rows.
    exists = first + e < rows.to(tl.int64) * N  # [BE]
    z = tl.load(x + first + e, mask=exists, other=0.0).to(tl.float32)  # [BE]
    if bias is not None:
        TOGETHER: tl.constexpr = min(N & -N, 16)  # BE and N are multiples of it, so as many elements lie in one row
        c = ((first % N).to(tl.int32) + e) % N  # [BE]
        z += tl.load(bias + tl.max_contiguous(tl.multiple_of(c, TOGETHER), TOGETHER)).to(tl.float32)
    return z, first, exists


@jit(do_not_specialize=["rows"])
def _bias_gelu_kernel(out, x, bias, rows, N: tl.constexpr, APPROXIMATE: tl.constexpr, BE: tl.constexpr):
    """GELU(x + bias) of BE elements (Hendrycks and Gimpel 2016, section 2).

    All programs together read x and write the result once, 4 bytes for each of T N elements in half precision, and
    compute about 20 T N operations.
    """
    z, first, exists = _load_sum(x, bias, rows, N, BE)
    gate, _ = _gate(z, APPROXIMATE)
    tl.store(out + first + tl.arange(0, BE), (z * gate).to(out.dtype.element_ty), mask=exists)


@jit(do_not_specialize=["rows"])
def _bias_gelu_backward_kernel(
    grad, grad_out, x, bias, rows, N: tl.constexpr, APPROXIMATE: tl.constexpr, BE: tl.constexpr
):
    """dx = GELU'(z) d(out) of BE elements, with z = x + bias and GELU'(z) = gate(z) + z gate'(z), because
    GELU(z) = z gate(z) (the product rule on Hendrycks and Gimpel 2016, section 2).

    All programs together read x and the gradient of the result and write that of x once, 6 bytes for each of T N
    elements in half precision, and compute about 30 T N operations.
    """
    z, first, exists = _load_sum(x, bias, rows, N, BE)
    e = tl.arange(0, BE)  # [BE]
    gate, slope = _gate(z, APPROXIMATE)
    do = tl.load(grad_out + first + e, mask=exists, other=0.0).to(tl.float32)  # [BE]
    tl.store(grad + first + e, (do * (gate + slope)).to(grad.dtype.element_ty), mask=exists)


def _launch(kernel, operation: str, like: Tensor, bias: Tensor | None, approximate: str, **tensors: Tensor) -> None:
    """Launch one of the kernels on tensors that all have the shape of `like`."""
    elements, channels = like.numel(), like.shape[-1]
    if elements:
        _, tiles = choose(operation, like.device, channels)
        bias = None if bias is None else bias.contiguous()
        launch(
            kernel, (cdiv(elements, tiles["BE"]),), **tensors, bias=bias, rows=elements // channels, N=channels,
            APPROXIMATE=approximate, **tiles,
        )  # fmt: skip


def launch_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Run the forward pass in Triton. Returns (..., N)."""
    out = _fake_bias_gelu(x, bias, approximate)
    _launch(_bias_gelu_kernel, "bias_gelu", out, bias, approximate, out=out, x=x.contiguous())
    return out


bias_gelu_op = torch.library.custom_op("smi_fast::bias_gelu", launch_bias_gelu, mutates_args=())


@bias_gelu_op.register_fake
def _fake_bias_gelu(x, bias, approximate):
    return contiguous_like(x)


def launch_bias_gelu_backward(grad_out: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Compute the gradient (..., N) of x in Triton from that of the result, writing each element once."""
    grad, operation = _fake_bias_gelu_backward(grad_out, x, bias, approximate), "bias_gelu_backward"
    tensors = dict(grad=grad, grad_out=grad_out.contiguous(), x=x.contiguous())
    _launch(_bias_gelu_backward_kernel, operation, grad, bias, approximate, **tensors)
    return grad


bias_gelu_backward_op = torch.library.custom_op(
    "smi_fast::bias_gelu_backward", launch_bias_gelu_backward, mutates_args=()
)
_bias_gelu_backward = operation(bias_gelu_backward_op, launch_bias_gelu_backward)


@bias_gelu_backward_op.register_fake
def _fake_bias_gelu_backward(grad_out, x, bias, approximate):
    return contiguous_like(x)


def _save_for_backward(ctx, inputs, output) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)
    ctx.set_materialize_grads(False)


def _derivative(ctx, grad):
    x, bias = ctx.saved_tensors
    return *gradients(lambda x: bias_gelu_reference(x, bias, ctx.approximate), (x,), grad), None, None


@any_order(_derivative)
def _backward(ctx, grad):
    return _bias_gelu_backward(grad, *ctx.saved_tensors, ctx.approximate), None, None


_bias_gelu = operation(bias_gelu_op, launch_bias_gelu, setup_context=_save_for_backward, backward=_backward)
# `bias_gelu` in Triton of arguments (x, bias, approximate) that have been checked, where nothing traces it
believed_bias_gelu = differentiable(launch_bias_gelu, _save_for_backward, _backward)
