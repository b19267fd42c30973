"""The cross-entropy of logits and classes: against its formula in float64, on both backends."""

import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DeviceWork, assert_within_twice, canaries, poisoned_memory, twice, with_errors_elsewhere
from smi_fast.kernels import cross_entropy
from smi_fast.kernels.cross_entropy import (
    cross_entropy_backward_op,
    cross_entropy_op,
    launch_cross_entropy,
    launch_cross_entropy_backward,
)
from smi_fast.kernels.norm import MAX_CHANNELS

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
MODULE = sys.modules[cross_entropy.__module__]


def formula(logits, targets, reduction):
    chosen = logits[torch.arange(len(logits), device=logits.device), targets]
    losses = logits.exp().sum(1).log() - chosen
    return losses.mean() if reduction == "mean" else losses.sum()


def run(logits, targets, grad, compute, **options):
    leaf = logits.detach().requires_grad_()
    loss = compute(leaf, targets, **options)
    return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf, grad.to(loss.dtype))[0]}


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_loss_and_gradient_obey_the_2x_rule(classes, dtype, reduction, backend, device, seed):
    check(5, classes, dtype, reduction, backend, device)


def check(batch, classes, dtype, reduction, backend, device):
    """Assert that loss and gradient obey the 2x rule, and return them."""
    options = {"reduction": reduction}

    def plain(logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction=reduction)

    def case():
        logits = (4 * torch.randn(batch, classes, device=device)).to(dtype)
        inputs = logits, torch.randint(classes, (batch,), device=device), torch.randn((), device=device)
        exact = run(logits.double(), *inputs[1:], formula, **options)
        return inputs, exact, [run(*inputs, plain)]

    inputs, exact, results = case()
    with poisoned_memory():
        found = run(*inputs, cross_entropy, **options, backend=backend)
    assert (found["loss"].dtype, found["loss"].shape, found["grad"].dtype) == (torch.float32, (), dtype)
    assert_within_twice(found, with_errors_elsewhere(results, exact, case, 16), exact)
    with torch.no_grad():
        assert torch.equal(cross_entropy(*inputs[:2], **options, backend=backend), found["loss"])
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1000, MAX_CHANNELS])
def test_gpu_obeys_the_2x_rule_and_repeats_bit_for_bit(classes, dtype, device, seed):
    first, second = twice(lambda: check(128, classes, dtype, "mean", "triton", device))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@BOTH
@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_logits_far_from_zero_neither_overflow_nor_lose_the_loss(offset, backend, device):
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]], device=device)
    targets = torch.tensor([0, 1], device=device)
    wanted = run(logits.double(), targets, torch.ones(()), formula, reduction="mean")
    found = run(logits + offset, targets, torch.ones(()), cross_entropy, backend=backend)
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [-100, -1, 3])
def test_what_is_no_class_makes_loss_and_its_gradient_nan(target, device):
    """Also the class that torch's own function ignores."""
    targets = torch.tensor([0, target], device=device)
    found = run(torch.randn(2, 3, device=device), targets, torch.ones(()), cross_entropy, backend="triton")
    assert found["loss"].isnan()
    assert found["grad"].isnan().all(1).tolist() == [False, True]


def test_logits_that_are_nan_make_the_loss_nan(device):
    logits = torch.tensor([[0.0, float("nan"), 1.0]], device=device)
    assert cross_entropy(logits, torch.tensor([0], device=device), backend="triton").isnan()


def test_operators_pass_opcheck_and_give_the_numbers_of_eager_code(device, seed):
    inputs = torch.randn(3, 5, device=device), torch.tensor([4, 0, 1], device=device), torch.ones((), device=device)
    for reduction in ("mean", "sum"):
        leaf = inputs[0].clone().requires_grad_()
        torch.library.opcheck(cross_entropy_op, (leaf, inputs[1], reduction))
        _, statistics = cross_entropy_op(*inputs[:2], reduction)
        torch.library.opcheck(cross_entropy_backward_op, (inputs[2], *inputs[:2], statistics, reduction))
        options = {"reduction": reduction, "backend": "triton"}
        eager = run(*inputs, cross_entropy, **options)
        compiled = run(*inputs, torch.compile(cross_entropy, backend="aot_eager", fullgraph=True), **options)
        with DeviceWork(MODULE) as work:
            traced = run(*inputs, cross_entropy, **options)
        assert (work.launches, work.operators) == (2, [])
        for name, t in eager.items():
            assert torch.equal(traced[name], t)
            assert torch.equal(compiled[name], t)


def test_writes_stay_in_the_outputs(device, seed):
    logits, targets = torch.randn(3, 5, device=device), torch.tensor([4, 0, 1], device=device)
    with canaries(MODULE, "_fake_losses"):
        loss, statistics = launch_cross_entropy(logits, targets, "mean")
    with canaries(MODULE, "_fake_cross_entropy_backward"):
        launch_cross_entropy_backward(loss, logits, targets, statistics, "mean")


def test_many_classes_are_computed_in_plain_torch_or_refused(device, seed):
    logits, targets = torch.randn(2, MAX_CHANNELS + 1, device=device), torch.tensor([0, MAX_CHANNELS], device=device)
    torch.testing.assert_close(cross_entropy(logits, targets), formula(logits, targets, "mean"))
    with pytest.raises(ValueError, match=str(MAX_CHANNELS + 1)):
        cross_entropy(logits, targets, backend="triton")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits has shape \(3,\)"),
        ({"logits": torch.zeros(3, 4).int()}, "logits has dtype torch.int32"),
        ({"targets": torch.zeros(2).long()}, r"targets is \(2,\)"),
        ({"targets": torch.zeros(3, 4)}, "torch.float32, not"),
        ({"targets": torch.zeros(3, device="meta").long()}, "targets is on meta"),
        ({"reduction": "none"}, "reduction 'none'"),
        ({"logits": torch.zeros(3, 4).double(), "backend": "triton"}, "does not compute torch.float64"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"logits": torch.zeros(3, 4), "targets": torch.zeros(3).long(), **changed})


@pytest.mark.parametrize("target", [-100, -1, 3])
def test_no_target_is_ignored(target):
    with pytest.raises(IndexError, match=str(target)):
        cross_entropy(torch.zeros(2, 3), torch.tensor([1, target]), backend="torch")
