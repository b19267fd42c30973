"""Where an operation's kernels give way to its definition in plain torch: gradients of gradients, and torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Return whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is active.

    Operations then compute their definitions out of ordinary torch operators, for which every transform has rules. The
    `setup_context` form of `torch.autograd.Function` would not be enough: a kernel has no rules for vmap and jvp, and
    that form makes every call several microseconds slower.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def untransformed(x: Tensor) -> Tensor:
    """Return the tensor of plain torch that a transform of torch.func has wrapped. In vmap, it has the mapped dimension
    too, somewhere. Its values can be read, for a check."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def any_order(derivative: Callable) -> Callable:
    """Make a backward pass differentiable, and let it return only None if no output has a gradient.

    Gradients of gradients need create_graph=True, and only then is grad mode on during a backward pass. The gradients
    are then computed by `derivative` instead, so that they depend on the saved tensors and on the incoming gradient as
    autograd expects. The same happens if `torch.func.vmap` runs the backward pass.

    Args:
        derivative: a function (ctx, *gradients of the outputs) that returns what the decorated function returns,
            computed by differentiable operators of torch. It may use `gradients`.

    Returns:
        A decorator of a function (ctx, *gradients of the outputs) that returns the gradients of all inputs, as for a
        `torch.autograd.Function` or a `torch.library.custom_op`. It is not called if all of them are None.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def either(ctx, *grads: Tensor | None):
            for grad in grads:  # a loop, because a generator would take the host longer
                if grad is not None:
                    break
            else:
                return (None,) * len(ctx.needs_input_grad)
            # Grad mode means nothing while torch.compile traces. torch itself refuses a double backward of its graphs.
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed()):
                return derivative(ctx, *grads)
            return backward(ctx, *grads)

        return either

    return decorate


def gradients(definition: Callable, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Compute the gradients of `definition(*inputs)` by autograd, differentiably if grad mode is on.

    Args:
        definition: a function of the inputs in plain torch, which returns one tensor.
        inputs: a backward pass's saved tensors. An input that requires no gradient gets None.
        grad: the gradient of the output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        aliases = [x.view_as(x) for x in inputs]  # none of them depends on another, as an input may
        wanted = [x for x in aliases if x.requires_grad]
        found = iter(torch.autograd.grad(definition(*aliases), wanted, grad, create_graph=create_graph))
    return [next(found) if x.requires_grad else None for x in inputs]
