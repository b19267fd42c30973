"""Matrix products with weights. The backward pass computes no gradient of weights that are frozen.

On CPUs where oneDNN is faster than the BLAS that torch uses for float32 products, products with frozen weights run in
oneDNN (`onednn_wins`). SMI_FAST_ONEDNN=0 or =1 in the environment decides it for any CPU.

oneDNN computes float32 products as 1x1 convolutions over the rows, never as its inner product. For some shapes and for
transposed weights, the inner product falls back to a generated kernel (`gemm:jit`) that uses the stack pointer to
address the heap. If a signal handler interrupts that kernel, it overwrites what the stack pointer points to, and the
process aborts. The convolutions (`brgconv_1x1`) and the bfloat16 products (`brg_matmul`) use the stack normally.
"""

from __future__ import annotations

import os
import platform

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .gradients import transformed
from .operators import surely

MIN_ROWS = 256  # with fewer rows of input, laying out the weight for one product costs more time than oneDNN saves
MANY_ROWS = 1024  # from this many rows on, the time to lay out a float32 weight is not worth the memory of a copy
MIN_PACKED_ROWS = 32  # with fewer rows, a call of oneDNN costs more time than it saves, even for a packed weight
CONVOLUTION = (0, 0), (1, 1), (1, 1), 1  # padding, stride, dilation and groups of a convolution that is a product

# These operators are torch's own but have no public name. Their convolution is `brgconv_1x1` from AVX2 on.
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_convolution_pointwise"))
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)


def onednn_wins(vendor: str, mkl: bool) -> bool:
    """Return whether oneDNN computes float32 products faster than the BLAS of this torch, by what was measured.

    MKL runs kernels for AVX2 on AMD's CPUs. There oneDNN is about twice as fast with AVX-512 and 1.1 times with AVX2.
    On an Intel CPU with AMX it is 6 to 11 % slower than MKL. CPUs that have not been measured use torch's BLAS.

    The user's process measures nothing: the two sum in different orders, so that a busy machine which tipped the
    balance would change the bits that a seed gives. This table gives the same answer in every run on a machine.

    Args:
        vendor: the CPU's vendor as CPUID names it, or a text that contains it.
        mkl: whether the BLAS is MKL.
    """
    return mkl and "AuthenticAMD" in vendor


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()


def uses_onednn() -> bool:
    """Return whether frozen float32 products run in oneDNN: where it wins, or as SMI_FAST_ONEDNN (auto, 0 or 1) says.

    Raises:
        ValueError: the variable has another value, or it is 1 and there are no such products here.
    """
    setting = os.environ.get("SMI_FAST_ONEDNN", "auto")
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"SMI_FAST_ONEDNN={setting} is none of auto, 0 and 1")
    if setting == "1" and not HAS_ONEDNN:
        raise ValueError("SMI_FAST_ONEDNN=1 needs a torch that is built with oneDNN and a CPU that has AVX2")
    if setting == "auto":
        return HAS_ONEDNN and onednn_wins(_vendor(), torch.backends.mkl.is_available())
    return setting == "1"


USES_ONEDNN = uses_onednn()


class PackedWeight:
    """A weight (N, K) that does not change between products, laid out in memory for oneDNN.

    Args:
        weight: float32 or bfloat16, if `can_pack` allows it. A float32 weight is read again whenever the number of rows
            of the input changes.
    """

    def __init__(self, weight: Tensor):
        weight = weight.detach()
        self.forward, self.backward = _Layout(weight), _Layout(weight.t())


class _Layout:
    """A weight (N, K) in oneDNN's layout for inputs (rows, K). In float32 the layout depends on the number of rows."""

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.weight: Tensor | None = weight
        self.rows: int | None = None
        self.packed: Tensor | None = None
        if weight.dtype == torch.bfloat16:  # one layout serves all inputs
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            self.weight = None

    def plain(self) -> Tensor:
        """Return the weight (N, K) in torch's layout."""
        with torch._C._DisableFuncTorch():  # whose wrappers hide the layout
            return self.packed.to_dense() if self.weight is None else self.weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x weight^T + bias for x (..., K) of the weight's dtype."""
        if self.dtype == torch.bfloat16:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        rows = x.numel() // x.shape[-1]
        if rows < MIN_PACKED_ROWS:
            return F.linear(x, self.weight, bias)
        if rows >= MANY_ROWS and self.weight.is_contiguous():
            self.rows = self.packed = None
            return _onednn(x, self.weight, bias)
        if rows != self.rows:
            weight, shape = self.weight.contiguous()[:, :, None, None], (1, x.shape[-1], 1, rows)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *CONVOLUTION, shape)
            self.rows = rows
        return _convolve(x, self.packed, bias)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `PackedWeight` supports this dtype and device, and makes products faster."""
    if device.type != "cpu" or not torch.backends.mkldnn.enabled or not HAS_ONEDNN:
        return False
    if dtype == torch.float32:
        return USES_ONEDNN
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias, as torch.nn.functional.linear does.

    On a CPU where oneDNN is faster than torch's BLAS, float32 products of at least 256 rows whose weights need no
    gradient run in oneDNN. It is the same float32 arithmetic, summed in another order. Everything else is torch's own
    linear, which runs bfloat16 products in oneDNN itself. A packed weight is not laid out again for each product.

    Args:
        x: (..., K) of a floating dtype.
        weight: (N, K) of the same dtype, or a packed weight, to whose dtype x is converted.
        bias: (N,) of the weight's dtype, or None.

    Returns:
        (..., N) in the dtype that torch's linear gives, or in the dtype of the packed weight.
    """
    if x.is_cuda:
        return F.linear(x, weight, bias)
    if isinstance(weight, PackedWeight):
        return _packed_linear(x, weight.forward, weight.backward, bias)
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    return onednn_op(x, weight, bias) if torch.compiler.is_compiling() else _OneDnnLinear.apply(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not surely(_has_few_rows(x))
        and not (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and USES_ONEDNN
        and not transformed()
    )


def _has_few_rows(x: Tensor) -> bool:
    return x.numel() < MIN_ROWS * x.shape[-1]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _convolve(x, weight[:, :, None, None], bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (..., K) and a weight (N, K, 1, 1). The rows of x become an image of one row of pixels."""
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    image = torch.ops.mkldnn._convolution_pointwise(image, weight, bias, *CONVOLUTION, "none", [], "")
    return image.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


if HAS_ONEDNN:  # torch's FlopCounterMode only knows its public products

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        rows = 1
        for size in x_shape[:-1]:
            rows *= size
        return 2 * rows * weight_shape[0] * weight_shape[1]

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _convolution_flops(image_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * image_shape[3] * weight_shape[0] * weight_shape[1]


class _OneDnnLinear(torch.autograd.Function):
    """A product of 2 M N K operations, and as many for the gradient of its input. Gradients of any order are right."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if transformed():  # by a torch.func.vmap of the backward pass alone
            return grad @ weight, None, None
        return _OneDnnLinear.apply(grad, weight.t().contiguous(), None), None, None


def _packed_linear(x: Tensor, product: _Layout, gradient: _Layout, bias: Tensor | None) -> Tensor:
    if transformed():
        return F.linear(x.to(product.dtype), product.plain(), bias)
    return _PackedLinear.apply(x, product, gradient, bias)


class _PackedLinear(torch.autograd.Function):
    """A product like `_OneDnnLinear`'s, with a weight that is laid out for the product and for its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, product: _Layout, gradient: _Layout, bias: Tensor | None) -> Tensor:
        ctx.product, ctx.gradient, ctx.dtype = product, gradient, x.dtype
        return product(x.to(product.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = _packed_linear(grad, ctx.gradient, ctx.product, None)
        return grad.to(ctx.dtype), None, None, None


def _compiled_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product as our operator. torch's compiler accepts oneDNN's only for weights that it has packed."""
    return F.linear(x, weight, bias) if _has_few_rows(x) else _onednn(x, weight, bias)


onednn_op = torch.library.custom_op("smi_fast::onednn_linear", _compiled_onednn, mutates_args=())


@onednn_op.register_fake
def _fake_onednn(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    return onednn_op(grad, ctx.saved_tensors[0].t().contiguous(), None), None, None


onednn_op.register_autograd(_backward, setup_context=_save_for_backward)
