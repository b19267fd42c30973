"""Shared by the backward passes of this package's operations, which have no derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def first_order(backward: Callable) -> Callable:
    """Make a backward pass refuse second-order gradients, and answer an undefined gradient with undefined ones.

    Gradients of gradients need create_graph=True, and only then is grad mode on in a backward pass. It is refused at
    that point, because later it is too late: `torch.autograd.function.once_differentiable` raises only where the
    incoming gradient depends on the inputs, and elsewhere leaves out silently what the saved tensors contribute.

    Args:
        backward: (ctx, gradient, ...) -> the gradients of all inputs, as of a `torch.autograd.Function` or a
            `torch.library.custom_op`. Where the output's gradient is None it is not called.

    Raises:
        RuntimeError: (the decorated function) under create_graph=True.
    """

    @wraps(backward)
    def refusing(ctx, grad: Tensor | None, *others: Tensor | None):
        # While torch.compile traces, grad mode says nothing: double backward of its graphs is torch's own to refuse.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "smi_fast's operations have first-order gradients only, and create_graph=True asks for more: for "
                "second-order gradients use timm's own model and losses in plain torch"
            )
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad, *others)

    return refusing
