"""torch.compile makes one graph for all lengths, after one for the first length that it meets."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from smi_fast.kernels import attention, bias_gelu, class_attention, gather_patches, residual_norm, select_tokens
from smi_fast.kernels.dispatch import override
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import smi_fast
from smi_fast.models import cifar10_vit

KEPT = (46, 66, 95, 137, 196)  # patches, of which each image has 196
BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])


class Compiler:
    """A backend of torch.compile that counts the graphs that it makes."""

    def __init__(self):
        torch.compiler.reset()
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


@contextmanager
def unrun(backend: str) -> Iterator[None]:
    """Leave the Triton kernels on tokens out, which take long in the interpreter: no result of theirs is an index."""
    with ExitStack() as stack:
        for name in ("attention", "class_attention", "norm", "mlp") if backend == "triton" else ():
            module = sys.modules[f"smi_fast.kernels.{name}"]
            stack.enter_context(mock.patch.object(module, "launch"))
        yield


def attend(x: Tensor, backend: str) -> Tensor:
    """x is (B, N, 3, H, D)."""
    batch, length = x.shape[:2]
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    return attention(x.flatten(0, 1), cu_seqlens, length, return_class_attention=True, backend=backend)[0]


def attend_once(x: Tensor, backend: str) -> Tensor:
    batch, length = x.shape[:2]
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    return class_attention(x[:, 0, 0], x[:, :, 1:].flatten(0, 1), cu_seqlens, length, backend=backend)


def select(x: Tensor, backend: str) -> Tensor:
    importance = torch.arange(x.shape[1], dtype=torch.float32).expand(x.shape[:2])
    return select_tokens(importance, x.flatten(2), k=x.shape[1] - 1, backend=backend)[0]


def cut_out(x: Tensor, backend: str) -> Tensor:
    positions = torch.arange(x.shape[1], dtype=torch.int32).expand(x.shape[:2]).flatten()
    cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32) * x.shape[1]
    images = x.sum() + torch.zeros(x.shape[0], 1, 28, 28)
    return gather_patches(images, positions, cu_seqlens, patch_size=2, backend=backend)[0]


def normalise(x: Tensor, backend: str) -> Tensor:
    x = x.flatten(2)
    return torch.cat(residual_norm(x, None, None, 0.1, update=x.sin(), backend=backend))


def activate(x: Tensor, backend: str) -> Tensor:
    return bias_gelu(x.flatten(2), backend=backend)


@BOTH
@pytest.mark.parametrize("operation", [attend, attend_once, select, cut_out, normalise, activate])
def test_an_operation_is_compiled_again_once_at_most(operation, backend, seed):
    compiler = Compiler()
    compiled = torch.compile(operation, backend=compiler, fullgraph=True)
    for length in KEPT:
        x = torch.randn(2, length, 3, 2, 8, requires_grad=True)
        with unrun(backend):
            found = compiled(x, backend)
            grads = torch.autograd.grad(found.sum(), x)
        if backend == "torch":
            expected = operation(x, backend)
            torch.testing.assert_close((found, *grads), (expected, *torch.autograd.grad(expected.sum(), x)))
    assert compiler.graphs <= 2


def small_model() -> nn.Module:
    model = cifar10_vit(False, img_size=28, patch_size=2, depth=2, embed_dim=16, num_heads=2).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    return model.eval()


def logits_and_gradient(model: nn.Module, images: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    logits = model(images, keep=keep)
    return (logits, *torch.autograd.grad(logits.sum(), images)) if images.requires_grad else (logits,)


@BOTH
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_a_model_is_compiled_again_once_at_most(backward, backend, seed):
    compiler, fast = Compiler(), smi_fast.accelerate(small_model(), backend=backend)
    compiled = torch.compile(fast, backend=compiler, fullgraph=True)
    images = torch.randn(2, 3, 28, 28, requires_grad=backward)
    for kept in KEPT:
        keep = torch.rand(2, 196).topk(kept).indices
        with unrun(backend):
            found = logits_and_gradient(compiled, images, keep)
        if backend == "torch":
            torch.testing.assert_close(found, logits_and_gradient(fast, images, keep), rtol=1e-4, atol=1e-4)
    assert compiler.graphs == 2


def test_one_graph_serves_lengths_whose_attention_runs_in_different_forms(seed):
    """Only some forms of the backward pass read what the forward pass has kept for it."""
    compiler = Compiler()
    compiled = torch.compile(attend, backend=compiler, fullgraph=True)
    tile = "tile", {"BN": 16, "num_warps": 4}
    rows = "rows", {"BM": 16, "BN": 16, "CHANNELS_FIRST": False, "num_warps": 4}
    for length, form in ((5, tile), (3, tile), (9, rows), (4, tile)):
        x = torch.randn(2, length, 3, 2, 8, requires_grad=True)
        with override({"attention_backward": form}):
            found = compiled(x, "triton")
            grads = torch.autograd.grad(found.square().sum(), x)
        expected = attend(x, "torch")
        torch.testing.assert_close((found, *grads), (expected, *torch.autograd.grad(expected.square().sum(), x)))
    assert compiler.graphs == 2
