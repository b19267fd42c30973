"""Copies, parameters, hooks, wrappers and training in torch treat an accelerated model as timm's own."""

import copy
import io
import pickle

import pytest
import torch
from backbone_cases import Outer, assert_same, assert_trains_alike, images, pair, small_vit, train
from compatibility import OURS, REFUSED, TIMMS, Ran, tool
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, prune

import smi_fast

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def linears(model: nn.Module) -> list[nn.Linear]:
    return [block.get_submodule(name) for block in model.blocks for name in LINEARS]


@tool("`copy.deepcopy`", OURS)
def test_deepcopy(seed):
    fast, model = pair()
    x, twin = images(), copy.deepcopy(fast)
    assert type(twin) is type(fast)
    assert_trains_alike(twin, copy.deepcopy(model))
    assert_same(fast(x), model(x))


@tool("`pickle`, `torch.save` and `torch.load` of the model", OURS)
def test_pickle(seed):
    fast, model = pair(num_classes=3)
    fast = smi_fast.accelerate(fast.model, dtype=torch.float64, backend="torch", prune={1: 0.25})
    x, file = images(), io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(fast)), torch.load(file, weights_only=False)):
        assert_same(loaded(x), fast(x))
        assert loaded.prune == fast.prune
        loaded.prune = {}
        assert_same(loaded(x), model(x))


@tool("`state_dict`, `load_state_dict(strict=True)`, `load_state_dict(assign=True)`", OURS)
def test_state_dict(seed):
    x = images()
    for assign in (False, True):
        (fast, _), (_, model) = pair(), pair()
        assert list(fast.state_dict()) == list(model.state_dict())
        assert isinstance(fast.load_state_dict(model.state_dict(), strict=True, assign=assign), tuple)
        assert_same(fast(x), model(x))
        other = small_vit()
        other.load_state_dict(fast.state_dict(), strict=True, assign=assign)
        assert_same(other(x), fast(x))


@tool("`.to`, `.float`, `.half`, `.bfloat16`, `.double`, the meta device", OURS)
def test_moving(seed):
    fast, model = pair()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        ours, theirs, x = copy.deepcopy(fast).to(dtype), copy.deepcopy(model).to(dtype), images(dtype=dtype)
        assert ours(x).dtype == ours.compute_dtype == dtype
        assert_same(ours(x), theirs(x), tolerance)
    assert_same(fast.float().double()(images() * 0), model.float().double()(images() * 0))
    meta = fast.to("meta")
    assert meta(images().to("meta")).shape == (3, 5)


@tool("`torch.autocast`", OURS)
def test_autocast(seed):
    fast, model = (m.float() for m in pair())
    x = images(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(x), model(x)
    assert ours.dtype == theirs.dtype
    assert_same(ours, theirs, 0.1)
    assert not torch.equal(ours.float(), fast(x))


@tool("`requires_grad_`, `no_grad`, `inference_mode`", OURS)
def test_gradients_that_are_off(seed):
    fast, model = pair()
    x = images()
    for m in (fast, model):
        m.requires_grad_(False)
        m.blocks[1].mlp.requires_grad_(True)
        m.head.requires_grad_(True)
    assert_trains_alike(fast, model)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert_same(fast(x), model(x))
            assert not fast(x).requires_grad


@tool("hooks on the model and on its modules, forward and backward", OURS, "a hooked module is called itself")
def test_hooks(seed):
    fast, model = pair()
    for m in (fast, model):
        m.register_forward_pre_hook(lambda _, args: (2 * args[0],))
        m.register_forward_hook(lambda _, args, out: 2 * out)
        m.register_full_backward_hook(lambda _, given, grads: tuple(None if g is None else 3 * g for g in given))
        m.blocks[0].mlp.register_forward_hook(lambda _, args, out: out.flip(1))
        m.blocks[1].attn.qkv.register_forward_hook(lambda _, args, out: 2 * out)
        m.blocks[1].attn.proj.register_full_backward_hook(lambda _, given, grads: (2 * given[0],))
        m.patch_embed.proj.register_forward_hook(lambda _, args, out: out + 1)
    assert_trains_alike(fast, model)
    x = images().requires_grad_()
    assert_same(*(torch.autograd.grad(m(x).square().sum(), x)[0] for m in (fast, model)))


@tool(
    "global hooks: `register_module_forward_hook` and its like",
    REFUSED,
    "a global module hook is registered, and modules that the fast forward pass bypasses do not call it",
)
def test_global_hooks(seed):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        pair()[0](images())
    finally:
        handle.remove()


@tool("a part of another model", OURS)
def test_a_part_of_another_model(seed):
    fast, model = pair()
    ours, theirs = Outer(fast), Outer(model)
    ours.last.load_state_dict(theirs.last.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_trains_alike(ours, theirs)


@tool("`torch.func.functional_call`", OURS)
def test_functional_call(seed):
    (fast, model), (_, other) = pair(), pair()
    x, parameters = images(), dict(other.named_parameters())
    ours, theirs = (torch.func.functional_call(m, parameters, (x,)) for m in (fast, model))
    assert_same(ours, other(x))
    assert_same(*(torch.autograd.grad(y.square().sum(), list(parameters.values())) for y in (ours, theirs)))


@tool("`torch.func.grad`, `vmap`, `jacrev`", OURS)
def test_function_transforms(seed):
    fast, model = (m.eval() for m in pair())
    x = images()

    def transformed(m):
        parameters = {name: p.detach() for name, p in m.named_parameters()}

        def loss(parameters, image):
            return torch.func.functional_call(m, parameters, (image[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return each, torch.func.jacrev(m)(x[:1])

    assert_same(*(transformed(m) for m in (fast, model)))


@tool("activation checkpoints: `checkpoint_wrapper`, `torch.utils.checkpoint`", OURS)
def test_activation_checkpoints(seed):
    fast, model = pair()
    for m in (fast, model):
        m.blocks[0].mlp = checkpoint_wrapper(m.blocks[0].mlp)
        apply_activation_checkpointing(m, check_fn=lambda module: isinstance(module, nn.LayerNorm))
    assert_trains_alike(fast, model)

    class Checkpointed(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit = vit

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.vit, x, use_reentrant=False)

    assert_trains_alike(Checkpointed(fast), Checkpointed(model))


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
@tool(
    "`torch.nn.utils.parametrizations`: `weight_norm`, `spectral_norm`, `orthogonal`",
    OURS,
    "a parametrised module is called itself",
)
def test_parametrizations(seed, wrap):
    fast, model = pair(mlp_ratio=1)
    for m in (fast, model):
        torch.manual_seed(seed)
        for linear in linears(m):
            wrap(linear)
    assert_trains_alike(fast, model, 1e-7)


@tool("`torch.nn.utils.prune`", OURS, "a pruned module is called itself")
def test_pruning_of_weights(seed):
    fast, model = pair()
    for m in (fast, model):
        prune.global_unstructured([(linear, "weight") for linear in linears(m)], prune.L1Unstructured, amount=0.5)
    assert_trains_alike(fast, model)
    for m in (fast, model):
        for linear in linears(m):
            prune.remove(linear, "weight")
    assert_trains_alike(fast, model)


@tool("`torch.ao.quantization.quantize_dynamic`", OURS, "a quantised Linear is called itself")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantization(seed):
    fast, model = (torch.ao.quantization.quantize_dynamic(m.float().eval(), {nn.Linear}) for m in pair())
    x = images(dtype=torch.float32)
    assert isinstance(fast, smi_fast.AcceleratedViT)
    assert_same(fast(x), model(x), 1e-5)


@tool("peft's LoRA", OURS, "an adapted Linear is called itself")
def test_lora(seed):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    fast, model = pair()
    config = peft.LoraConfig(r=4, target_modules=list(LINEARS), modules_to_save=["head"], init_lora_weights=False)
    ours, theirs = (peft.get_peft_model(m, config).double() for m in (fast, model))
    theirs.load_state_dict(ours.state_dict())
    assert_trains_alike(ours, theirs)
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    x = images()
    assert_same(*(m.merge_and_unload()(x) for m in (ours, theirs)))


@tool("`torch.optim.swa_utils.AveragedModel`", OURS)
def test_averaged_model(seed):
    fast, model = pair()
    x, averages = images(), [torch.optim.swa_utils.AveragedModel(m) for m in (fast, model)]
    for average, m in zip(averages, (fast, model), strict=True):
        for _ in range(2):
            train(m, list(m.parameters()), x, steps=1)
            average.update_parameters(m)
    assert_same(averages[0](x), averages[1](x))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@tool("`DistributedDataParallel`", OURS)
def test_data_parallel_processes(seed, process_group):
    fast, model = pair()
    assert_trains_alike(DistributedDataParallel(fast), model)
    assert_trains_alike(DistributedDataParallel(fast, static_graph=True, gradient_as_bucket_view=True), model)


def assert_trains_alike_sharded(fast: nn.Module, model: nn.Module) -> None:
    x = images()
    ours, theirs = (train(m, list(m.parameters()), x) for m in (fast, model))
    full = [t.full_tensor() if isinstance(t, torch.distributed.tensor.DTensor) else t for t in ours]
    assert_same(full, theirs)


@tool("FSDP2: `fully_shard` of the model", OURS)
def test_a_sharded_model(seed, process_group):
    fast, model = pair()
    assert_trains_alike_sharded(torch.distributed.fsdp.fully_shard(fast), model)


@tool("FSDP2: `fully_shard` of its blocks", TIMMS, "a sharded block runs itself; the rest runs at our speed")
def test_sharded_blocks(seed, process_group):
    fast, model = pair()
    for part in (*fast.blocks, fast):
        torch.distributed.fsdp.fully_shard(part)
    assert_trains_alike_sharded(fast, model)


@tool("`nn.DataParallel` and its replicas", OURS)
def test_replicas(seed):
    fast, model = pair()
    x = images()
    assert_same(DataParallel(fast)(x), model(x))
    replica = fast._replicate_for_data_parallel()
    replica._modules = dict(fast._modules)
    replica._parameters = {}
    for name, parameter in fast._parameters.items():
        setattr(replica, name, None if parameter is None else 1 * parameter)
    with Ran() as ran:
        assert_same(replica(x), model(x))
    assert ran.count == len(fast.blocks)
