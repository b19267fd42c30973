"""linear() compared with torch's own and with float64."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from smi_fast.kernels import linear as module
from smi_fast.kernels.linear import HAS_ONEDNN, PackedWeight, can_pack, linear, onednn_wins, uses_onednn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
NEEDS_ONEDNN = pytest.mark.skipif(not HAS_ONEDNN, reason="this CPU or this torch has no oneDNN products")
LAYOUTS = pytest.mark.parametrize("layout", ["plain", pytest.param("packed", marks=NEEDS_ONEDNN)])
SHAPES = [(1, 24), (31, 24), (32, 24), (3, 7, 24), (255, 192), (256, 192), (1100, 192)]  # around the changes of product


@pytest.fixture(autouse=True)
def wherever_it_can(monkeypatch):
    """Let oneDNN run on every CPU that can, also where torch's BLAS is faster."""
    monkeypatch.setattr(module, "USES_ONEDNN", HAS_ONEDNN)


def laid_out(weight: torch.Tensor, layout: str) -> torch.Tensor | PackedWeight:
    return PackedWeight(weight) if layout == "packed" else weight


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_as_exact_as_torchs(seed, shape, bias, layout):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(40, shape[-1])
    bias = torch.randn(40) if bias else None
    grad = torch.randn(*shape[:-1], 40)
    exact_x = x.detach().double().requires_grad_()
    exact = F.linear(exact_x, weight.double(), None if bias is None else bias.double())
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.double())
    ours, theirs = linear(x, laid_out(weight, layout), bias), F.linear(x, weight, bias)
    for got, reference, wanted in (
        (ours, theirs, exact),
        (torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(theirs, x, grad)[0], exact_grad),
    ):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 2 * (reference - wanted).abs().max() + 1e-6


def test_weights_that_train_get_their_gradients(seed):
    x, weight, bias = torch.randn(20, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    ours = torch.autograd.grad(linear(x, weight, bias).square().sum(), (weight, bias))
    theirs = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradients_that_are_not_contiguous_are_right(seed):
    x, weight = torch.randn(300, 8, requires_grad=True), torch.randn(6, 8)
    for grad in (torch.ones(1, 1).expand(300, 6), torch.randn(6, 300).t()):
        ours = torch.autograd.grad(linear(x, weight), x, grad)[0]
        torch.testing.assert_close(ours, grad @ weight)


@pytest.mark.skipif(not can_pack(torch.bfloat16, torch.device("cpu")), reason="bfloat16 is emulated on this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 24), (3, 7, 24), (200, 192)], ids=str)
def test_packed_weights_give_bfloat16_products(seed, shape, dtype):
    x, weight, bias = torch.randn(shape, dtype=dtype), torch.randn(40, shape[-1]), torch.randn(40).bfloat16()
    x.requires_grad_()
    grad = torch.randn(*shape[:-1], 40).bfloat16().transpose(0, -1).contiguous().transpose(0, -1)
    packed = PackedWeight(weight.bfloat16())
    found, expected = linear(x, packed, bias), F.linear(x.bfloat16(), weight.bfloat16(), bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad(out, x, grad)[0] for out in (found, expected))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=2e-2)


def test_autocast_is_obeyed(seed):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(20, 8), torch.randn(6, 8)).dtype == torch.bfloat16


class OneDnnProducts(TorchDispatchMode):
    """Counts the products that run as oneDNN's convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._overloadpacket is torch.ops.mkldnn._convolution_pointwise
        return function(*args, **(kwargs or {}))


@NEEDS_ONEDNN
def test_onednn_runs_large_products_of_frozen_weights_only(seed):
    def products(x, weight):
        with OneDnnProducts() as products:
            linear(x, weight)
        return products.count

    x, weight = torch.randn(256, 8), torch.randn(6, 8)
    trained = weight.clone().requires_grad_()
    assert products(x, weight) == 1
    assert products(x.double(), weight.double()) == 0
    assert products(x[:255], weight) == 0
    assert products(x, trained) == 0
    with torch.no_grad():
        assert products(x, trained) == 1


def test_without_onednn_the_products_are_torchs(seed, monkeypatch):
    monkeypatch.setattr(module, "USES_ONEDNN", False)
    x, weight, bias = torch.randn(300, 8, requires_grad=True), torch.randn(6, 8), torch.randn(6)
    assert not can_pack(torch.float32, x.device)
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)))


@pytest.mark.parametrize(
    ("vendor", "mkl", "wins"),
    [
        ("vendor_id\t: AuthenticAMD\n", True, True),
        ("AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", True, True),
        ("vendor_id\t: GenuineIntel\n", True, False),
        ("vendor_id\t: AuthenticAMD\n", False, False),  # OpenBLAS knows AMD's CPUs
        ("", True, False),
    ],
)
def test_onednn_runs_where_it_was_measured_to_win(vendor, mkl, wins, monkeypatch):
    assert onednn_wins(vendor, mkl) is wins
    monkeypatch.setattr(module, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.delenv("SMI_FAST_ONEDNN", raising=False)
    assert uses_onednn() is (wins and HAS_ONEDNN)
    for setting in ("0", "1") if HAS_ONEDNN else ("0",):
        monkeypatch.setenv("SMI_FAST_ONEDNN", setting)
        assert uses_onednn() is (setting == "1")


def test_a_wrong_setting_of_onednn_is_refused(monkeypatch):
    monkeypatch.setattr(module, "HAS_ONEDNN", False)
    for setting in ("yes", "1"):
        monkeypatch.setenv("SMI_FAST_ONEDNN", setting)
        with pytest.raises(ValueError, match=f"SMI_FAST_ONEDNN={setting}"):
            uses_onednn()


@LAYOUTS
def test_second_order_gradients_are_torchs(seed, layout):
    """The input of the product is not linear in x, so that its gradient has a gradient in turn."""
    x, weight = torch.randn(300, 24, requires_grad=True), torch.randn(40, 24)
    seconds = []
    for product in (lambda y: linear(y, laid_out(weight, layout)), lambda y: y @ weight.t()):
        (grad,) = torch.autograd.grad(product(x.tanh()).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-2)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transforms_of_torch_func_are_torchs(seed, dtype, layout):
    if dtype == torch.bfloat16 and not can_pack(dtype, torch.device("cpu")):
        pytest.skip("bfloat16 is emulated on this CPU")
    x, weight, bias = torch.randn(2, 300, 24), torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    x = x.to(dtype) if layout == "plain" else x

    def results(product) -> list[torch.Tensor]:
        y = product(start := x[0].clone().requires_grad_())
        vectors = torch.linspace(-1, 1, 2 * y.numel()).view(2, *y.shape)
        return [
            torch.func.vmap(product)(x),
            torch.func.vmap(torch.func.jacrev(lambda x: product(x).sum(0)[:3]))(x),
            torch.func.jvp(product, (x[0],), (x[1],))[1],
            torch.func.vmap(lambda vector: torch.autograd.grad(y, start, vector, retain_graph=True)[0])(vectors),
        ]

    found = results(lambda x: linear(x, laid_out(weight, layout), bias).float())
    for got, wanted in zip(found, results(lambda x: F.linear(x.to(dtype), weight, bias).float()), strict=True):
        torch.testing.assert_close(got, wanted)


@NEEDS_ONEDNN
def test_a_packed_weight_serves_any_number_of_rows(seed):
    weight = torch.randn(40, 24)
    packed = PackedWeight(weight)
    for rows in (300, 47, 1, 300, 2000, 300):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(linear(x, packed), x @ weight.t(), rtol=1e-5, atol=1e-5)


def interrupted_products(*arguments: str) -> dict[str, list[int]]:
    environment = os.environ | {"SMI_FAST_ONEDNN": "1"} if HAS_ONEDNN else None
    command = [sys.executable, HERE / "interrupted_products.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    return json.loads(run.stdout)


def test_signals_during_products_do_no_harm():
    interrupted_products()


@pytest.mark.skipif(
    not shutil.which("gcc") or platform.system() != "Linux" or platform.machine() != "x86_64",
    reason="the probe is C for Linux on x86-64, and gcc compiles it",
)
def test_no_product_takes_its_stack_pointer_off_the_stack(tmp_path):
    probe = tmp_path / "stack_probe.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", HERE / "stack_probe.c", "-o", probe], check=True)
    counts = interrupted_products(str(probe))
    assert sum(interrupts for _, interrupts in counts.values()) > 500
    assert {name: outside for name, (outside, _) in counts.items() if outside} == {}


@pytest.mark.parametrize("frozen", [True, False])
def test_flop_counter_counts_both_kinds_of_product(frozen):
    x, weight = torch.randn(3, 100, 8, requires_grad=True), torch.randn(6, 8, requires_grad=not frozen)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(linear(x, weight).sum(), x)
    assert counter.get_total_flops() == 2 * (2 * 300 * 8 * 6)
