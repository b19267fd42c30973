"""torch.compile(fast, fullgraph=True): one graph, the numbers of eager, no second compilation for other values."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import smi_fast
from smi_fast.models import cifar10_vit

PRUNE = {1: 0.3, 2: 0.5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()


def accelerated(depth: int = 3, **options) -> smi_fast.AcceleratedViT:
    """8x8 patches, two registers, float32, every weight random and frozen."""
    model = cifar10_vit(pretrained=False, depth=depth, embed_dim=48, num_heads=3, reg_tokens=2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.0 / parameter.shape[-1] ** 0.5)
    return smi_fast.accelerate(model.requires_grad_(False), **options)


def outputs(fast, images: torch.Tensor, gradients: bool, **options) -> list[torch.Tensor]:
    """Logits, and importance and input gradients where they are asked for."""
    with torch.set_grad_enabled(gradients):
        result = fast(images, **options)
        result = list(result) if isinstance(result, tuple) else [result]
        return result + (list(torch.autograd.grad(result[0].square().mean(), images)) if gradients else [])


def drawn(count: int | tuple[int, int] | None) -> torch.Tensor | list[torch.Tensor] | None:
    """A fresh choice of so many patches for two images, of another number for each in a tuple, None for all of them."""
    if count is None or isinstance(count, tuple):
        return count and [torch.randperm(64)[:number] for number in count]
    return torch.stack([torch.randperm(64)[:count] for _ in range(2)])


def assert_as_eager(fast, backend: str, counts: list, gradients: bool, **options) -> None:
    """A call for each of counts, with fresh images and patches that are `drawn`.

    `fullgraph` raises at a break of the graph.
    """
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for count in counts:
        images = torch.randn(2, 3, 32, 32, requires_grad=True)
        keep = drawn(count)
        got, expected = (outputs(module, images, gradients, keep=keep, **options) for module in (compiled, fast))
        for ours, eager in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize(
    ("count", "attention", "prune"),
    [(None, False, None), (20, False, None), (20, True, None), (None, False, PRUNE), (20, True, PRUNE)],
    ids=["dense", "keep", "keep-attention", "pruned", "keep-attention-pruned"],
)
def test_one_graph_gives_the_numbers_of_eager_for_all_values(seed, count, attention, prune, gradients):
    assert_as_eager(accelerated(prune=prune), "aot_eager", [count] * 3, gradients, return_attention=attention)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
def test_the_kernels_are_operators_of_one_graph(seed, gradients):
    fast = accelerated(prune=PRUNE, backend="triton", dtype=torch.float32)
    assert_as_eager(fast, "aot_eager", [20] * 2, gradients, return_attention=True)
    assert counters["stats"]["unique_graphs"] == 1


def test_bfloat16_compiles_to_one_graph(seed):
    fast = accelerated(prune=PRUNE, dtype=torch.bfloat16, backend="torch")  # which rounds as compiled code does
    assert_as_eager(fast, "aot_eager", [20] * 2, True)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("counts", "graphs"),
    [([None, 20, 30, 31, 47], 3), ([(5, 9), (12, 7), (20, 31)], 2)],
    ids=["dense and equally many", "ragged"],
)
def test_other_numbers_of_patches_share_one_more_graph(counts, graphs, backend, seed):
    fast = accelerated(depth=2, backend=backend, dtype=torch.float32)
    assert_as_eager(fast, "aot_eager", counts, counts[0] is None, return_attention=True)
    assert counters["stats"]["unique_graphs"] == graphs


def test_pruning_compiles_for_other_numbers_of_patches(seed):
    fast = accelerated(prune=PRUNE, backend="triton", dtype=torch.float32)
    assert_as_eager(fast, "aot_eager", [20, 30, 47], False)


def test_models_that_prune_otherwise_compile_one_after_the_other(seed):
    for prune in (
        {1: 0.3, 2: 0.4},
        {1: smi_fast.Drop(0.35, round="ceil", fuse="sum"), 2: smi_fast.Drop(0.45)},
        {1: smi_fast.Merge(5), 2: smi_fast.Drop(30, scores=lambda tokens, positions, importance: -importance)},
    ):
        assert_as_eager(accelerated(prune=prune), "aot_eager", [47], False)


def test_weights_train_through_the_compiled_model(seed):
    fast = accelerated(prune=PRUNE).train().requires_grad_(True)
    images = torch.randn(2, 3, 32, 32)
    got, expected = (
        torch.autograd.grad(module(images).square().mean(), list(fast.parameters()))
        for module in (torch.compile(fast, fullgraph=True, backend="aot_eager"), fast)
    )
    for ours, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "backend"),
    [(lambda logits, images, targets: logits.square().mean() + images.square().mean(), "torch"), (None, "triton")],
    ids=["torch", "triton"],
)
def test_the_loop_is_the_same_compiled(seed, monkeypatch, objective, backend):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager", fullgraph=True))
    options = {"stopping": smi_fast.StoppingSchedule({1: 0.8}), "iterations": 3, "progress": False}
    model = {"depth": 1, "backend": backend, "dtype": torch.float32}
    runs = [
        smi_fast.Inverter(accelerated(**model), objective=objective, compile=compile, **options)
        for compile in (True, False)
    ]
    runs[0].backbone.model.load_state_dict(runs[1].backbone.model.state_dict())
    compiled, eager = (run.run([0, 1]) for run in runs)
    assert torch.equal(compiled.keep, eager.keep)
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] >= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default compiler needs g++ to compile for a CPU")
def test_the_default_compiler_gives_the_numbers_of_eager(seed):
    assert_as_eager(accelerated(depth=1), "inductor", [20, 30, 31], True, return_attention=True)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_wrong_keep_is_an_error_of_the_graph_too(seed):
    compiled = torch.compile(accelerated(), fullgraph=True, backend="aot_eager")
    for wrong, message in (([3, 64], "outside"), ([-1, 3], "outside"), ([5, 5], "twice")):
        with pytest.raises(RuntimeError, match=message):
            compiled(torch.randn(2, 3, 32, 32), keep=torch.tensor([[0, 1], wrong]))
