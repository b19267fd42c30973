"""Matrix products with weights, whose backward pass skips the weights where they are frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MIN_ROWS = 16  # of the input: below, setting oneDNN up costs more than it gains
# The product is torch's own, but not a public name of it.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedWeight:
    """A frozen weight (N, K) in bfloat16, as a CPU's oneDNN lays it out for the product and its gradient."""

    def __init__(self, weight: Tensor):
        weight = weight.detach().to(torch.bfloat16)
        self.forward = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.backward = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous())


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `PackedWeight` is there for this dtype and device."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.enabled
        and HAS_ONEDNN
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as torch.nn.functional.linear.

    On a CPU, float32 products whose weights need no gradient run in oneDNN, in the place of the BLAS that torch takes
    for them: the same float32 arithmetic, summed in another order. Everything else is torch's own linear, which on a
    CPU takes bfloat16 products to oneDNN itself; with a packed weight, they need not lay it out anew each time.

    Args:
        x: (..., K).
        weight: (N, K), or packed.
        bias: (N,) or None; bfloat16 where the weight is packed.

    Returns:
        (..., N) in the dtype that torch's linear would give; bfloat16 where the weight is packed.
    """
    if isinstance(weight, PackedWeight):
        return _PackedLinear.apply(x, weight, bias)
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    return onednn_op(x, weight, bias) if torch.compiler.is_compiling() else _OneDnnLinear.apply(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and HAS_ONEDNN
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if HAS_ONEDNN:  # torch's FlopCounterMode knows its public products only

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        rows = 1
        for size in x_shape[:-1]:
            rows *= size
        return 2 * rows * weight_shape[0] * weight_shape[1]


class _OneDnnLinear(torch.autograd.Function):
    """2 M N K operations forward and the same backward, for the input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn(grad, weight.t(), None), None, None


class _PackedLinear(torch.autograd.Function):
    """As `_OneDnnLinear`, in bfloat16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return _onednn(x.to(torch.bfloat16), weight.forward, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _onednn(grad, ctx.weight.backward, None).to(ctx.dtype), None, None


def _compiled_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product as an operator, since torch's compiler takes oneDNN's own for weights that it has packed only."""
    return _onednn(x, weight, bias)


onednn_op = torch.library.custom_op("smi_fast::onednn_linear", _compiled_onednn, mutates_args=())


@onednn_op.register_fake
def _fake_onednn(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    return onednn_op(grad, ctx.saved_tensors[0].t(), None), None, None


onednn_op.register_autograd(_backward, setup_context=_save_for_backward)
