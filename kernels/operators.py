"""Operations by Triton kernels: torch operators where something has to see them, and less costly calls elsewhere.

A torch operator costs the host 20 microseconds or more beyond its launcher. Only compilers, tracers and modes need it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

PLAIN = (Tensor, nn.Parameter)  # the classes of tensors that do nothing of their own


def traced(*values: object, modes: int = 0) -> bool:
    """Return whether an operation on these values has to be a torch operator, so that something other than autograd can
    see it: torch.compile, torch.export or torch.jit.trace while it traces, a mode such as FakeTensorMode, a subclass of
    Tensor, tensors without values, or the batches of `torch.autograd.grad(is_grads_batched=True)`.

    `modes` is how many modes of torch's dispatcher may be active, because they see the operation by other means.

    Everywhere else an operation can be its launcher, or a `torch.autograd.Function`, which cost the host less.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack() > modes:
        return True
    for x in values:  # a loop, because a generator would take twice as long
        if isinstance(x, Tensor) and (type(x) not in PLAIN or x.is_meta or not torch._C._has_storage(x)):
            return True
    return False


def wants_gradient(*values: object) -> bool:
    """Return whether autograd records what is computed from these values, some of which are tensors."""
    if torch.is_grad_enabled():
        for x in values:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def surely(condition: bool) -> bool:
    """Return a condition on sizes. While torch.compile traces a graph for many sizes, return whether it holds for all,
    so that the graph is not tied to those for which it does."""
    return statically_known_true(condition) if torch.compiler.is_compiling() else condition


def operation(
    operator: torch.library.CustomOpDef,
    launcher: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    mutated: int = 0,
) -> Callable:
    """Return a function that gives what the operator gives, in the way that costs the host least.

    Args:
        operator: what `torch.library.custom_op` made of the launcher. Its rule of differentiation is registered here.
        launcher: computes the results without autograd.
        setup_context, backward: the rule, as `CustomOpDef.register_autograd` takes it. An operation without one is not
            called on tensors whose gradients are recorded.
        mutated: how many of the first arguments are written to. Autograd is told so.
    """
    direct = launcher
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
        direct = differentiable(launcher, setup_context, backward)

    def run(*arguments):
        if traced(*arguments):
            return operator(*arguments)
        result = direct(*arguments)
        if mutated:
            torch.autograd.graph.increment_version([x for x in arguments[:mutated] if not x.is_inference()])
        return result

    return run


def differentiable(launcher: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """Return a function that gives what the launcher gives, and has a rule of differentiation where autograd needs one.

    It has no `setup_context` of torch's, because every call would take several microseconds more.

    Args:
        launcher: computes the results without autograd.
        setup_context, backward: the rule, as `CustomOpDef.register_autograd` takes it.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = launcher(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Function.backward = staticmethod(backward)
    apply = apply_of(Function)

    def run(*arguments):
        return apply(*arguments) if wants_gradient(*arguments) else launcher(*arguments)

    return run


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """Return the `apply` of a function of autograd, without the part that looks for transforms of torch.func. It is for
    callers that have done so themselves, and takes a third of the time."""
    return super(torch.autograd.Function, function).apply
