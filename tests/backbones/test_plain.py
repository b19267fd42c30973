"""Blocks that run in a straight line: they are the plain ones, at every time, and their numbers are timm's."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import smi_fast
from smi_fast.backbones.plain import PARTS, plain_block

HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
KEEP = torch.tensor([[7, 2, 5, 0], [1, 8, 3, 4]])


def build(**options) -> VisionTransformer:
    """Two blocks, width 32, 3x3 patches, every weight random."""
    options = {"init_values": 0.5, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2} | options
    model = VisionTransformer(img_size=12, patch_size=4, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


@pytest.fixture
def images(seed) -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_is_plain_while_none_of_its_modules_has_a_hook_or_a_forward_of_its_own(qk_norm):
    block = build(qk_norm=qk_norm).blocks[0]
    for name in PARTS:
        part = block.get_submodule(name)
        for register in HOOKS:
            assert plain_block(block) is not None
            handle = getattr(part, register)(lambda *args: None)
            assert plain_block(block) is None
            handle.remove()
        assert plain_block(block) is not None
        part.forward = part.forward
        assert plain_block(block) is None
        del part.forward


def test_a_block_is_plain_while_its_modules_are_timms(seed):
    block = build().blocks[0]
    for name in PARTS:
        assert plain_block(block) is not None
        part = block.get_submodule(name)
        kind = type(part)
        part.__class__ = type("Own", (kind,), {})
        assert plain_block(block) is None
        part.__class__ = kind
        parent, _, last = name.rpartition(".")
        if name:
            setattr(block.get_submodule(parent), last, nn.Sequential(part))
            assert plain_block(block) is None
            setattr(block.get_submodule(parent), last, part)


def assign(model: VisionTransformer) -> None:
    """New parameters in the places of the old ones."""
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) * value.std()
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)


def each(model: VisionTransformer, path: str, change: Callable[[nn.Module], object]) -> None:
    for block in model.blocks:
        change(block.get_submodule(path))


def regroup(attn: nn.Module) -> None:
    attn.num_heads, attn.head_dim = 4, 8


def write(norm: nn.Module) -> None:
    norm.weight.data = 2 * norm.weight.data


CHANGES: dict[str, Callable[[VisionTransformer], object]] = {
    "new_parameters": assign,
    "new_gamma": lambda m: each(m, "ls1", lambda ls: setattr(ls, "gamma", nn.Parameter(-2 * ls.gamma.detach()))),
    "written_weight": lambda m: each(m, "norm2", write),
    "no_bias": lambda m: each(m, "attn.proj", lambda proj: setattr(proj, "bias", None)),
    "eps": lambda m: each(m, "norm1", lambda norm: setattr(norm, "eps", 0.5)),
    "heads": lambda m: each(m, "attn", regroup),
    "approximate": lambda m: each(m, "mlp.act", lambda act: setattr(act, "approximate", "tanh")),
    "gate": lambda m: each(m, "attn", lambda attn: setattr(attn, "gate", nn.Linear(32, 32).double())),
    "without_fused_attention": lambda m: each(
        m, "attn", lambda a: (setattr(a, "fused_attn", False), setattr(a, "scale", 1))
    ),
    "swapped_blocks": lambda m: setattr(m, "blocks", nn.Sequential(m.blocks[1], m.blocks[0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_forward_passes_acts_as_in_timm(images, change):
    fast = smi_fast.accelerate(build())
    before = fast.model(images)
    torch.testing.assert_close(fast(images), before, rtol=1e-9, atol=1e-9)
    torch.manual_seed(1)
    CHANGES[change](fast)
    assert not torch.allclose(fast.model(images), before, rtol=1e-6)
    torch.testing.assert_close(fast(images), fast.model(images), rtol=1e-9, atol=1e-9)


def test_dropped_branches_and_gradients_of_weights_are_timms(images):
    """In a model whose blocks have run in a straight line before."""
    model = build()
    for block in model.blocks:
        block.drop_path1, block.mlp.drop1 = DropPath(0.4), nn.Dropout(0.4)
    fast = smi_fast.accelerate(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(fast(images), model(images), rtol=1e-9, atol=1e-9)
    results = []
    for forward in (fast, model):
        model.train()
        torch.manual_seed(7)
        results.append(torch.autograd.grad(forward(images).square().sum(), [*model.parameters()]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(fast(images), fast(images))


@pytest.mark.parametrize("keep", [None, KEEP, [KEEP[0], KEEP[1, :2]]], ids=["dense", "uniform", "ragged"])
def test_numbers_are_those_of_blocks_that_ask_every_module(images, keep):
    """Bit for bit on plain torch, and in Triton's kernels. A block whose features are wanted asks every module."""
    model, names = build(qk_norm=True, depth=2).requires_grad_(False), ["blocks.0.mlp"]
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        fast, x = smi_fast.accelerate(model.to(dtype), backend=backend), images.to(dtype).requires_grad_()
        logits, (slow, _) = fast(x, keep=keep), fast(x, keep=keep, features=names)
        assert torch.equal(logits, slow)
        assert torch.equal(*(torch.autograd.grad(logits.square().sum(), x)[0] for logits in (logits, slow)))
        with torch.no_grad():
            assert torch.equal(fast(x, keep=keep), slow)


def test_a_block_is_freed_with_its_model(images):
    model = build()
    fast = smi_fast.accelerate(model)
    fast(images)
    assert plain_block(model.blocks[0]) is not None
    block = weakref.ref(model.blocks[0])
    gc.disable()
    try:
        del model, fast
        assert block() is None
    finally:
        gc.enable()


def test_copies_run_with_their_own_weights(images):
    fast = smi_fast.accelerate(build())
    before = fast(images)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    torch.testing.assert_close(other(images), other.model(images), rtol=1e-9, atol=1e-9)
    assert torch.equal(fast(images), before)
