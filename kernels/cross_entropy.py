"""The cross-entropy of logits and classes, and its gradient in the dtype of the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_floats, contiguous_like, gives_way, jit, launch, tl
from .dispatch import choose
from .gradients import any_order, gradients
from .norm import MAX_CHANNELS
from .operators import operation
from .tiles import load_row, store_row


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean", backend: str = "auto") -> Tensor:
    """Compute the mean or sum over rows of log(sum_c exp(logits_c)) - logits_target (Bishop 2006, equation 4.108).

    Args:
        logits: (B, C), float32, bfloat16 or float16, and in plain torch also float64. The kernels compute up to 4096
            classes.
        targets: (B,) int64, classes in [0, C). The Triton kernels make the loss and the gradient NaN where a target is
            no class, and torch raises an IndexError on a CPU. No class is ignored, -100 neither.
        reduction: "mean" or "sum".
        backend: "auto", "triton" or "torch".

    Returns:
        The loss, () float32, or float64 for float64 logits.

    Raises:
        ValueError: a shape, dtype, device or the reduction is not as described above.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, not (batch, classes)")
    check_floats("logits", logits, logits.shape, logits.device)
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets is {tuple(targets.shape)} {targets.dtype}, not ({len(logits)},) torch.int64")
    if targets.device != logits.device:
        raise ValueError(f"targets is on {targets.device}, logits on {logits.device}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction {reduction!r} is none of "mean" and "sum"')
    if backend == "auto" and logits.shape[1] > MAX_CHANNELS:
        backend = "torch"
    arguments = logits, targets, reduction
    if gives_way(backend, (logits,), ()):
        return cross_entropy_reference(*arguments)
    return _cross_entropy(*arguments)[0]


def cross_entropy_reference(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Define `cross_entropy` in plain torch."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), targets, reduction=reduction, ignore_index=torch.iinfo(torch.int64).min)


@jit
def _entropy_kernel(losses, statistics, logits, targets, C: tl.constexpr, BC: tl.constexpr):
    """log(sum_c exp(x_c - max)) - (x_target - max) of one row x of the logits (Bishop 2006, equation 4.108).

    All programs together read B C logits once. The statistics (B, 2) are the maximum and the logarithm of each row,
    which the backward pass reads.
    """
    row = tl.program_id(0).to(tl.int64)
    x = tl.where(tl.arange(0, BC) < C, load_row(logits + row * C, C, BC), float("-inf"))  # [BC]
    top = tl.max(x, 0)
    logarithm = tl.log(tl.sum(tl.exp(x - top), 0))
    target = tl.load(targets + row)
    chosen = tl.load(logits + row * C + target, mask=(target >= 0) & (target < C), other=float("nan")).to(tl.float32)
    tl.store(losses + row, logarithm - (chosen - top))
    tl.store(statistics + 2 * row, top)
    tl.store(statistics + 2 * row + 1, logarithm)


@jit(do_not_specialize=["count"])
def _entropy_backward_kernel(grad, grad_loss, logits, targets, statistics, count, C: tl.constexpr, BC: tl.constexpr):
    """dx_c = (softmax(x)_c - [c = target]) d(loss) / count of one row (Bishop 2006, equation 4.109). All programs
    together read the logits and write their gradient once."""
    row = tl.program_id(0).to(tl.int64)
    top, logarithm = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
    x, target = load_row(logits + row * C, C, BC), tl.load(targets + row)  # [BC]
    factor = tl.div_rn(tl.load(grad_loss).to(tl.float32), 1.0 * count)
    factor = tl.where((target >= 0) & (target < C), factor, float("nan"))
    softmax = tl.exp(x - top - logarithm)
    store_row(grad + row * C, tl.where(tl.arange(0, BC) == target, softmax - 1, softmax) * factor, C, BC)


def launch_cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Run the forward pass in Triton. Returns the loss (), and the statistics (B, 2) that the backward pass reads."""
    losses, statistics = _fake_losses(logits)
    if logits.numel():
        _, tiles = choose("cross_entropy", logits.device, logits.shape[1])
        launch(
            _entropy_kernel, logits.shape[:1], losses=losses, statistics=statistics, logits=logits.contiguous(),
            targets=targets.contiguous(), C=logits.shape[1], **tiles,
        )  # fmt: skip
    return losses.mean() if reduction == "mean" else losses.sum(), statistics


def _fake_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the loss (B,) and the statistics (B, 2) of each row."""
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, logits.new_empty(logits.shape[0], 2, dtype=torch.float32)


cross_entropy_op = torch.library.custom_op("smi_fast::cross_entropy", launch_cross_entropy, mutates_args=())


@cross_entropy_op.register_fake
def _fake_cross_entropy(logits, targets, reduction):
    losses, statistics = _fake_losses(logits)
    return losses.sum(), statistics


def launch_cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, reduction: str
) -> Tensor:
    """Compute the gradient (B, C) of the logits in Triton from that of the loss, ()."""
    grad = _fake_cross_entropy_backward(grad_loss, logits, targets, statistics, reduction)
    if logits.numel():
        _, tiles = choose("cross_entropy_backward", logits.device, logits.shape[1])
        launch(
            _entropy_backward_kernel, logits.shape[:1], grad=grad, grad_loss=grad_loss,
            logits=logits.contiguous(), targets=targets.contiguous(), statistics=statistics,
            count=logits.shape[0] if reduction == "mean" else 1, C=logits.shape[1], **tiles,
        )  # fmt: skip
    return grad


cross_entropy_backward_op = torch.library.custom_op(
    "smi_fast::cross_entropy_backward", launch_cross_entropy_backward, mutates_args=()
)


@cross_entropy_backward_op.register_fake
def _fake_cross_entropy_backward(grad_loss, logits, targets, statistics, reduction):
    return contiguous_like(logits)


def _save_for_backward(ctx, inputs, output) -> None:
    logits, targets, ctx.reduction = inputs
    _, statistics = output
    ctx.save_for_backward(logits, targets, statistics)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)


def _derivative(ctx, grad, *_):
    logits, targets, _ = ctx.saved_tensors
    return *gradients(lambda x: cross_entropy_reference(x, targets, ctx.reduction), (logits,), grad), None, None


@any_order(_derivative)
def _backward(ctx, grad, *_):
    return _cross_entropy_backward(grad, *ctx.saved_tensors, ctx.reduction), None, None


_cross_entropy_backward = operation(cross_entropy_backward_op, launch_cross_entropy_backward)
_cross_entropy = operation(cross_entropy_op, launch_cross_entropy, setup_context=_save_for_backward, backward=_backward)
