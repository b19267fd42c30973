"""Gradients of gradients are either right or refused, and first-order gradients work under checkpointing."""

import pytest
import torch
from kernel_cases import cu_seqlens_of
from smi_fast.kernels import attention, class_attention, gather_patches, select_tokens
from smi_fast.kernels.rows import gather_rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import smi_fast
from smi_fast.models import cifar10_vit

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
VIEW = torch.tensor([3, -5, 1])


def attend(qkv, backend, lengths=(5, 5)):
    return attention(qkv, cu_seqlens_of(lengths, qkv.device), max(lengths), backend=backend)


def attend_once(x, backend, lengths=(4, 6)):
    q, kv = x[:2, 0], x[:, 1:]
    return class_attention(q, kv, cu_seqlens_of(lengths, x.device), max(lengths), backend=backend)


def cut_out(images, backend):
    positions = torch.tensor([0, 3, 1], dtype=torch.int32, device=images.device)
    cu_seqlens = cu_seqlens_of([2, 1], images.device)
    return gather_patches(images, positions, cu_seqlens, VIEW.to(images.device), patch_size=4, backend=backend)[0]


def select(values, backend):
    attention = torch.arange(10.0, device=values.device).view(2, 5).sin() + 2
    return select_tokens(attention, values, k=3, num_prefix_tokens=1, backend=backend)[0]


SHAPES = {attend: (10, 3, 2, 8), attend_once: (10, 3, 2, 8), cut_out: (2, 3, 8, 8), select: (2, 6, 4)}


@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "leaves"])
@pytest.mark.parametrize(
    ("operation", "backend"), [(attend, "torch"), *((operation, "triton") for operation in SHAPES)]
)
def test_second_order_gradients_are_refused(operation, backend, inputs, device, seed):
    """Also if the incoming gradient does not depend on the inputs, as for a linear loss."""
    x = torch.randn(SHAPES[operation], device=device, requires_grad=True)
    y = operation(x, backend)
    with pytest.raises(RuntimeError, match="timm's own model"):
        y.sum().backward(create_graph=True, inputs=[x] if inputs else None)


@pytest.mark.parametrize("operation", [attend_once, cut_out, select])
def test_second_order_gradients_of_the_definitions_are_right(operation, seed):
    x = torch.randn(SHAPES[operation], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: operation(x, "torch").square(), (x,))


@pytest.mark.parametrize("shape", [(7,), (7, 2)], ids=str)
def test_second_order_gradients_of_picked_rows_are_right(shape, seed):
    x, rows = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0, 3])
    assert torch.autograd.gradgradcheck(lambda x: gather_rows(x, rows).pow(3), (x,))


@pytest.mark.parametrize("lengths", [(4, 6), (70, 70, 70)], ids=str)
def test_second_order_of_fused_attention_is_an_error(lengths, seed):
    dtype = torch.float32 if len(set(lengths)) > 1 else torch.float64
    qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(qkv, "torch", lengths).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grad.square().sum(), qkv)


def vit() -> nn.Module:
    return cifar10_vit(pretrained=False, depth=2, embed_dim=24, num_heads=3).eval().requires_grad_(False)


@BOTH
def test_a_frozen_model_refuses_a_hessian_vector_product(backend, seed):
    """Part of it would come from attention itself, and no path through the incoming gradient leads there."""
    fast = smi_fast.accelerate(vit(), backend=backend, dtype=torch.float32)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = fast(images)
    (first,) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    assert first.abs().max() > 0
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.grad(logits.sum(), images, create_graph=True)


def test_a_compiled_frozen_model_refuses_a_hessian_vector_product(seed):
    torch.compiler.reset()
    fast = smi_fast.accelerate(vit(), backend="torch", dtype=torch.float32)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    loss = torch.compile(fast, backend="aot_eager", fullgraph=True)(images).square().sum()
    (grad,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad, images, torch.randn_like(grad))


@BOTH
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("operation", SHAPES)
def test_checkpointing_changes_no_gradient(operation, reentrant, backend, device, seed):
    x = torch.randn(SHAPES[operation], device=device, requires_grad=True)
    results = (operation(x, backend), checkpoint(operation, x, backend, use_reentrant=reentrant))
    grads = []
    for y in results:
        x.grad = None
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


class Undefined(torch.autograd.Function):
    """The identity, with an undefined gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@BOTH
@pytest.mark.parametrize("operation", SHAPES)
def test_an_undefined_gradient_passes(operation, backend, device, seed):
    """A user's function can make one, by cutting off a branch."""
    x = torch.randn(SHAPES[operation], device=device, requires_grad=True)
    (Undefined.apply(operation(x, backend)).sum() + 3 * x.sum()).backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))
