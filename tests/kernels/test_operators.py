"""Operations are torch operators where something has to see them, and cost the host less elsewhere."""

import pytest
import torch
from kernel_cases import cu_seqlens_of
from smi_fast.kernels import attention, bias_gelu, class_attention, gather_patches, residual_norm, select_tokens
from smi_fast.kernels import backend as backend_module
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import smi_fast
from smi_fast import Inverter
from smi_fast.models import cifar10_vit


def small_model() -> nn.Module:
    model = cifar10_vit(False, img_size=8, patch_size=4, depth=2, embed_dim=16, num_heads=2).requires_grad_(False)
    return model.eval()


def operators(function) -> set[str]:
    """Our operators that a call of the function runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return {event.name for event in profiler.events() if event.name.startswith("smi_fast::")}


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("keep", [None, [[0, 2], [1, 3]], [[0], [3, 1, 2]]], ids=["dense", "kept", "ragged"])
def test_an_eager_pass_calls_no_operator_of_ours(keep, gradients, device, seed):
    fast = smi_fast.accelerate(small_model().to(device), backend="triton")
    images = nn.Parameter(torch.randn(2, 3, 8, 8, device=device), requires_grad=gradients)
    keep = keep and [torch.tensor(kept, device=device) for kept in keep]

    def run():
        logits, _ = fast(images, keep=keep, return_attention=True)
        if gradients:
            logits.square().sum().backward()

    assert operators(run) == set()


def test_an_inversion_calls_no_operator_of_ours(seed):
    inverter = Inverter(small_model(), backend="triton", iterations=3, stopping={1: 0.5}, progress=False)
    assert operators(lambda: inverter.run([0, 1])) == set()


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators_of_both_passes(device, seed):
    fast = smi_fast.accelerate(small_model().to(device), backend="triton")
    images = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    with Seen() as seen:
        fast(images).square().sum().backward()
    names = {"attention", "class_attention", "gather_patches", "embed_tokens", "residual_norm", "bias_gelu"}
    expected = {f"smi_fast::{name}{way}" for name in names for way in ("", "_backward")}
    assert {name for name in seen.names if name.startswith("smi_fast::")} == expected


def attend(x: Tensor) -> Tensor:
    return attention(x.view(4, 3, 2, 8), cu_seqlens_of([3, 1]), 3, backend="triton")


def attend_once(x: Tensor) -> Tensor:
    x = x.view(4, 3, 2, 8)
    return class_attention(x[:2, 0], x[:, 1:], cu_seqlens_of([3, 1]), 3, backend="triton")


def select(x: Tensor) -> Tensor:
    return select_tokens(torch.arange(8.0).view(2, 4), x.view(2, 4, 24), k=2, backend="triton")[0]


def cut_out(x: Tensor) -> Tensor:
    positions = torch.tensor([1, 0], dtype=torch.int32)
    return gather_patches(x.view(1, 3, 8, 8), positions, cu_seqlens_of([2]), patch_size=4, backend="triton")[0]


def activate(x: Tensor) -> Tensor:
    return bias_gelu(x, backend="triton")


def normalise(x: Tensor) -> Tensor:
    return residual_norm(x.view(4, 48), None, None, 0.1, backend="triton")[1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("operation", [attend, attend_once, select, cut_out, activate, normalise])
def test_torch_jit_trace_records_an_operation_and_not_its_result(operation, seed):
    program = torch.jit.trace(operation, torch.randn(192), check_trace=False)
    x = torch.randn(192)
    assert torch.equal(program(x), operation(x))


class Compiled:
    """In the place of a kernel that Triton has compiled for some kinds of arguments."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, kinds: tuple):
        self.kinds, self.calls = kinds, []

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit_, *arguments):
        assert (stream, function, metadata, enter, exit_) == (5, 7, (4, 1, 0), None, None)
        self.calls.append(((x, y, z), arguments))


class Kernel:
    """In the place of Triton's kernels: compiles for all that Triton distinguishes."""

    arg_names = ["out", "x", "n", "scale", "BLOCK"]

    def __init__(self):
        self.compiled = []

    def run(self, grid, warmup, out, x, n, scale, BLOCK, num_warps):
        tensors = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in (out, x)]
        kinds = (*tensors, n == 1, n % 16 == 0, n < 2**31, BLOCK, num_warps)
        self.compiled.append(Compiled(kinds))
        self.compiled[-1].run(
            *grid, *(1,) * (3 - len(grid)), 5, 7, (4, 1, 0), None, None, None, out, x, n, scale, BLOCK
        )
        return self.compiled[-1]


def test_a_launch_finds_the_kernel_that_was_compiled_for_its_arguments(monkeypatch, seed):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    kernel, memory = Kernel(), torch.zeros(64)
    calls = [
        dict(out=memory[start:], x=memory.to(dtype), n=n, scale=scale, BLOCK=block, num_warps=warps)
        for start in (0, 1)
        for dtype in (torch.float32, torch.bfloat16)
        for n in (1, 15, 16, 2**31)
        for scale in (0.5, 1.5)
        for block, warps in ((16, 4), (16, 8), (32, 4))
    ]
    for times in (1, 2):
        for call in calls:
            backend_module.launch(kernel, (3, 2), **call)
        assert len(kernel.compiled) == len(calls)
        assert sum(len(compiled.calls) for compiled in kernel.compiled) == times * len(calls)
    for compiled, call in zip(kernel.compiled, calls, strict=True):
        for grid, arguments in compiled.calls:
            assert grid == (3, 2, 1)
            given = [call[name] for name in kernel.arg_names]
            addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given]
            assert [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments] == addresses


def test_a_hook_on_tritons_launches_sees_all_of_them(monkeypatch, seed):
    knobs = pytest.importorskip("triton.knobs")
    kernel, x = Kernel(), torch.zeros(4)
    call = dict(out=x, x=x, n=4, scale=1.0, BLOCK=16, num_warps=4)
    backend_module.launch(kernel, (1,), **call)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
        backend_module.launch(kernel, (1,), **call)
    assert len(kernel.compiled) == 2
