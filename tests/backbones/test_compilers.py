"""Compilers and tracers turn an accelerated model into programs with timm's numbers."""

import pytest
import torch
from backbone_cases import Outer, assert_same, images, pair
from compatibility import OURS, REFUSED, TIMMS, tool
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import smi_fast

PRUNE = {1: 0.25}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@tool("`torch.compile(fullgraph=True)`, `model.compile()`", OURS, "also with `keep` and `prune`")
def test_compile(seed):
    fast, model = pair()
    x = images().requires_grad_()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    fast.compile(fullgraph=True, backend="aot_eager")
    expected = model(x)
    for ours in (compiled(x), fast(x)):
        assert_same(ours, expected)
        assert_same(*(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, expected)))


@tool("`torch.export`, strict or not, with a batch of any size", OURS)
def test_export(seed):
    fast, model = (m.eval() for m in pair())
    open_batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    for strict, shapes, batch in ((True, open_batch, 7), (False, open_batch, 7), (False, None, 3)):
        program = torch.export.export(fast, (images(),), dynamic_shapes=shapes, strict=strict).module()
        x = images(batch=batch)
        assert_same(program(x), model(x))


@tool("`torch.jit.trace`", TIMMS, "the program has no `keep`")
def test_trace(seed):
    fast, model = (m.eval() for m in pair())
    program = torch.jit.trace(fast, images(), check_trace=False)  # the check runs our forward pass
    x = images(batch=5)
    assert_same(program(x), model(x))
    with pytest.raises(RuntimeError, match="expected at most 2 argument"):
        program(x, keep=torch.zeros(5, 1).long())


@tool("`torch.jit.script`", TIMMS, "the program has no `keep`")
def test_script(seed):
    fast, model = (m.eval() for m in pair())
    x, program = images(), torch.jit.script(fast)
    assert_same(program(x), model(x))
    with pytest.raises(RuntimeError, match="keep"):
        program(x, keep=torch.zeros(3, 1).long())


@tool("`torch.fx.symbolic_trace`, also for `torch.jit.script`", TIMMS, "the graph has no `keep`")
def test_fx(seed):
    fast, model = (m.eval() for m in pair())
    x, graph = images(), torch.fx.symbolic_trace(fast, concrete_args={"attn_mask": None, "is_causal": False})
    assert_same(graph(x), model(x))
    with pytest.raises(TypeError, match="keep"):
        graph(x, keep=torch.tensor([[0]] * 3))
    assert_same(torch.jit.script(torch.fx.symbolic_trace(fast))(x), model(x))


@tool("torchvision's `create_feature_extractor`", TIMMS)
def test_feature_extractor(seed):
    fast, model = (m.eval() for m in pair())
    x = images()
    nodes = {"blocks.0.attn.proj": "attention", "blocks.1": "block", "norm": "norm"}
    assert_same(*(create_feature_extractor(m, nodes)(x) for m in (fast, model)))


@tool("a part of another model in `torch.fx`, `torch.jit.script` and `torch.jit.trace`", TIMMS)
def test_a_part_of_another_program(seed):
    ours, theirs = (Outer(m).eval() for m in pair())
    ours.last = theirs.last
    x = images()
    graph = torch.fx.symbolic_trace(ours)
    for program in (
        graph,
        torch.jit.script(graph),
        torch.jit.script(ours),
        torch.jit.trace(ours, x, check_trace=False),
    ):
        assert_same(program(x), theirs(x))


class Keeping(nn.Module):
    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, x, keep):
        return self.vit(x, keep=keep)


@tool("`torch.fx` of a call with `keep`", REFUSED, "torch.fx traces timm's own forward pass, which does not take keep")
def test_fx_of_kept_patches(seed):
    torch.fx.symbolic_trace(Keeping(pair()[0]))


@tool(
    "`torch.jit.trace` of a call with `keep`",
    REFUSED,
    "torch.jit.trace records timm's own forward pass, which does not take keep",
)
def test_trace_of_kept_patches(seed):
    torch.jit.trace(Keeping(pair()[0]), (images(), torch.zeros(3, 1, dtype=torch.long)))


@tool(
    "`torch.jit.trace` with `prune`",
    REFUSED,
    "torch.jit.trace records timm's own forward pass, which does not prune: call its .model to go without",
)
def test_trace_of_pruning(seed):
    torch.jit.trace(smi_fast.accelerate(pair()[1], prune=PRUNE), images())


@tool(
    "`torch.jit.script` with `prune`",
    REFUSED,
    "torch.jit.script compiles timm's own forward pass, which does not prune: call its .model to go without",
)
def test_script_of_pruning(seed):
    torch.jit.script(smi_fast.accelerate(pair()[1], prune=PRUNE))


@tool(
    "`torch.fx` with `prune`",
    REFUSED,
    "torch.fx traces timm's own forward pass, which does not prune: call its .model to go without",
)
def test_fx_of_pruning(seed):
    torch.fx.symbolic_trace(smi_fast.accelerate(pair()[1], prune=PRUNE))


@tool(
    "`torch.fx` with another compute dtype",
    REFUSED,
    "torch.fx cannot trace autocast: cast the weights to torch.bfloat16",
)
def test_fx_of_autocast(seed):
    torch.fx.symbolic_trace(smi_fast.accelerate(pair()[1].float(), dtype=torch.bfloat16))
