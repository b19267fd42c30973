"""The tape of a CPU: an iteration from it is the same, and what it could not repeat is not recorded."""

import copy

import pytest
import torch
from smi_fast.kernels.cpu import call_cpp, library, recording
from torch import nn

from smi_fast import Inverter, Mass, StoppingSchedule, deep_inversion
from smi_fast.inversion import loop as loop_module
from smi_fast.inversion.tape import Tape, Taped
from smi_fast.models import cifar10_vit


@pytest.fixture
def model(seed) -> nn.Module:
    return cifar10_vit(False, img_size=16, patch_size=2, depth=3, embed_dim=32, num_heads=2, num_classes=5)


class Counted(Taped):
    """Counts calls of the function."""

    calls = 0

    def __init__(self, function):
        super().__init__(lambda number: (self.count(), function(number)))

    def count(self):
        Counted.calls += 1


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(loop_module, "Taped", Counted)
    Counted.calls = 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": deep_inversion(0.0, 0.0)},
        {"objective": deep_inversion(1e-2, 1e-3, norm="image"), "view_per_image": True},
        {"stopping": StoppingSchedule({3: Mass(0.8), 12: 0.3})},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"backend": "torch"},
    ],
    ids=["", "no prior", "images", "mass", "bfloat16", "float16", "torch"],
)
def test_an_iteration_from_the_tape_gives_the_same_bits(model, options, counted):
    options = {
        "stopping": StoppingSchedule({3: 0.3, 12: 0.4}), "objective": deep_inversion(1e-2, 1e-3), "iterations": 24,
        "jitter": 1 / 2, "progress": False, **options,
    }  # fmt: skip
    states = {}

    def keep(step):
        states[step.iteration] = step.state_dict()

    taped = Inverter(model, **options).run([0, 3, 1], callback=keep)
    assert Counted.calls == 2 + 4 + 4  # the first stage is too short, and each of the others has two pairs of images
    expected = Inverter(model, graphs=False, **options).run([0, 3, 1])
    assert Counted.calls == 10
    assert torch.equal(taped.losses, expected.losses)
    assert torch.equal(taped.images, expected.images)
    resumed = Inverter(model, **options).run([0, 3, 1], state=states[17])
    assert torch.equal(resumed.images, expected.images)


def write(model):
    model.blocks[1].attn.qkv.weight.detach().mul_(2)


def replace(model):
    model.head.weight = nn.Parameter(2 * model.head.weight.detach())


def hook(model):
    model.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def swap(model):
    model.blocks[1].mlp.act = nn.ReLU()


@pytest.mark.parametrize("change", [write, replace, hook, swap], ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_callback_may_change_the_model(model, change, dtype):
    found = []
    for graphs in (True, False):
        used = copy.deepcopy(model)
        inverter = Inverter(used, stopping="dense", iterations=10, dtype=dtype, progress=False, graphs=graphs)
        found.append(inverter.run([0, 3], callback=lambda step, used=used: step.iteration == 5 and change(used)))
    assert torch.equal(*(result.losses for result in found))
    assert torch.equal(*(result.images for result in found))
    unchanged = Inverter(model, stopping="dense", iterations=10, dtype=dtype, progress=False).run([0, 3])
    assert not torch.equal(unchanged.losses[6:], found[0].losses[6:])


def test_autocast_around_a_run_does_not_reach_into_the_tape(model):
    """A model with a dtype of its own computes in it, within autocast too."""
    options = {"stopping": "dense", "iterations": 8, "dtype": torch.float32, "progress": False}
    with torch.autocast("cpu", torch.bfloat16):
        taped, expected = (Inverter(model, graphs=graphs, **options).run([0, 3]) for graphs in (True, False))
    assert torch.equal(taped.images, expected.images)


def test_code_of_others_is_never_taped(model, counted):
    def loss(logits, images, targets):
        return nn.functional.cross_entropy(logits, targets)

    options = {"stopping": "dense", "iterations": 8, "progress": False}
    Inverter(model, objective=loss, **options).run([0])
    Inverter(model, prior=lambda images, kept: images.abs().mean(), **options).run([0])
    seen = []
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(0))
    Inverter(model, **options).run([0])
    handle.remove()
    assert (Counted.calls, len(seen)) == (0, 8)
    model.blocks[0].mlp.act = type("Mine", (nn.GELU,), {})()
    Inverter(model, **options).run([0])
    assert Counted.calls == 0


def test_a_function_that_reads_values_on_the_host_runs_as_it_is():
    for read in (torch.Tensor.item, lambda x: len(x[x > 0]), lambda x: torch.tensor(2.0).add_(1)):
        x, ran = torch.ones(1), []
        taped = Taped(lambda number, x=x, ran=ran, read=read: (ran.append(read(x)), x.add_(1)))
        for _ in range(5):
            taped(0)
        assert len(ran) == 5
        assert x.item() == 6


def test_memory_is_found_again_by_its_place():
    """Views, results in place, lists of results, and gradients of what autograd keeps."""
    state, weight = torch.arange(12.0).view(3, 4), torch.randn(4, 4)

    def function(number):
        leaf = state[number : number + 2].detach().requires_grad_()
        first, second = (leaf @ weight).sigmoid().chunk(2, dim=1)
        loss = (torch.cat([first * second, leaf.tanh()[:, 1:3]]).t().contiguous() ** 2).sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        state[number : number + 2].sub_(grad)
        state.view(-1)[-1] += grad.numel()

    start = state.clone()
    for number in [0, 1] * 5:
        function(number)
    expected = state.clone()
    state.copy_(start)
    taped, calls = Taped(lambda number: (calls.append(number), function(number))), []
    for number in [0, 1] * 5:
        taped(number)
    assert calls == [0, 1, 0, 1]
    assert torch.equal(state, expected)


def test_memory_is_freed_as_soon_as_nothing_reads_it():
    x = torch.ones(1000)
    with Tape() as tape:
        y = x
        for _ in range(50):
            y = y + 1
        x.copy_(y)
    del y
    program = tape.program()
    del tape
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        program()
    assert torch.equal(x, torch.full((1000,), 101.0))
    live = most = 0
    for event in profile.events():
        live += event.self_cpu_memory_usage
        most = max(most, live)
    assert 4000 <= most <= 3 * 4096


@pytest.mark.skipif(library() is None, reason="nothing runs in C++ here")
def test_calls_of_cpp_are_on_the_tape():
    x, out, weight, statistics = torch.randn(3, 8), torch.empty(3, 8), torch.ones(8), torch.empty(3, 2)
    arguments = "residual_norm", None, out, statistics, x, None, None, weight, None, 3, 8, 8, 1e-6
    with Tape() as tape, recording(tape.call):
        call_cpp(*arguments)
    program, expected = tape.program(), nn.functional.layer_norm(x.mul_(2) - 1, (8,), eps=1e-6)
    x.sub_(1)
    program()
    torch.testing.assert_close(out, expected)
