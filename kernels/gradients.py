"""A guard for the backward passes of the operations, which cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def first_order(backward: Callable) -> Callable:
    """Make a backward pass refuse second-order gradients, and return only None if the output's gradient is None.

    Gradients of gradients need create_graph=True, and only then is grad mode on during a backward pass. The refusal
    happens there, because it cannot happen later: `torch.autograd.function.once_differentiable` raises only if the
    incoming gradient depends on the inputs, and otherwise silently leaves out what the saved tensors contribute.

    Args:
        backward: a function (ctx, gradient, ...) that returns the gradients of all inputs, as for a
            `torch.autograd.Function` or a `torch.library.custom_op`. It is not called if the output's gradient is None.

    Raises:
        RuntimeError: the decorated function runs with create_graph=True.
    """

    @wraps(backward)
    def refusing(ctx, grad: Tensor | None, *others: Tensor | None):
        # Grad mode says nothing while torch.compile traces. torch itself refuses a double backward of its graphs.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "smi_fast's operations have first-order gradients only, and create_graph=True asks for more: for "
                "second-order gradients use timm's own model and losses in plain torch"
            )
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad, *others)

    return refusing
