"""CUDA graphs of the loop: an iteration can be run again by its operators alone, and is the same then."""

import pytest
import torch
from cnn_cases import small_cnn
from smi_fast.kernels.linear import PackedWeight, can_pack
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smi_fast
from smi_fast import Inverter, Mass, StoppingSchedule, Until, WarmupCosine, deep_inversion
from smi_fast.inversion import graphs
from smi_fast.inversion import loop as loop_module
from smi_fast.inversion.graphs import Replayed
from smi_fast.inversion.schedule import Release
from smi_fast.models import cifar10_vit

# What waits for the device, or takes numbers from the host that a replay would not see change.
ASKS_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "unique_dim", "equal"}
STOPS = {3: 0.3, 9: 0.4}


@pytest.fixture
def model(seed) -> nn.Module:
    model = cifar10_vit(False, img_size=8, patch_size=2, depth=2, embed_dim=32, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1 / parameter.shape[-1] ** 0.5)
    return model


class Tape(TorchDispatchMode):
    """Operators as they ran. `replay` runs them again on the same memory, which is what a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            assert func.overloadpacket.__name__ not in ASKS_THE_HOST, func
            with torch.no_grad():
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class Taped(Replayed):
    """In the place of CUDA graphs. A tape runs what it records, so that only the second call is a replay."""

    replays = 0

    def __init__(self, function):
        self.function, self.graphs = function, {}

    def __call__(self, number):
        if number not in self.graphs:
            with Tape() as self.graphs[number]:
                self.function(number)
        else:
            self.graphs[number].replay()
            Taped.replays += 1


def users_loss(logits, images, targets):
    return nn.functional.cross_entropy(logits, targets) + 1e-2 * images.abs().mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": deep_inversion(0.0, 0.0)},
        {"objective": users_loss},
        {"view_per_image": True},
        {"stopping": StoppingSchedule({3: Mass(0.8), 9: 0.3})},
        {"stopping": StoppingSchedule({3: Mass(0.8)}), "objective": users_loss},
        {"dtype": torch.bfloat16},
        {"stopping": StoppingSchedule({3: Release(3), 9: Release(2)}), "lr_schedule": WarmupCosine(4)},
        {"published": True},
        {"backend": "triton", "dtype": torch.float32, "stopping": StoppingSchedule({1: 0.8}), "iterations": 10},
    ],
    ids=["", "no prior", "user", "views", "mass", "mass, user", "bfloat16", "rebirth", "published", "triton"],
)
def test_a_replayed_iteration_gives_the_same_bits(model, monkeypatch, options):
    options = {
        "stopping": StoppingSchedule(STOPS), "objective": deep_inversion(1e-2, 1e-3), "iterations": 16, "jitter": 1 / 2,
        "progress": False, "backend": "torch", **options,
    }  # fmt: skip
    expected = Inverter(model, **options).run([0, 3])
    use_tape(monkeypatch)
    check_same(Inverter(model, **options).run([0, 3]), expected)


def use_tape(monkeypatch) -> None:
    monkeypatch.setattr(loop_module, "has_graphs", lambda device: True)
    monkeypatch.setattr(loop_module, "Replayed", Taped)
    Taped.replays = 0


def check_same(replayed, expected) -> None:
    assert Taped.replays >= 5
    assert torch.equal(replayed.losses, expected.losses)
    assert torch.equal(replayed.images, expected.images)


class Scripted(Until):
    """In the place of what the model is sure of: the first image of each second check."""

    def __post_init__(self):
        object.__setattr__(self, "checked", [])

    def count(self, confident, logits, targets):
        self.checked.append(super().count(confident, logits, targets))
        return [int(slot == 0 and len(self.checked) % 2 == 0) for slot in range(len(confident))]


def streamed(model, **options):
    """Four images through two slots, of which the first is refilled until one is left."""
    inverter = Inverter(
        model, objective=deep_inversion(1e-2, norm="image"), stopping=StoppingSchedule({2: 0.3, 5: 0.5}), iterations=60,
        until=Scripted(checks=1, every=3), lr_schedule=WarmupCosine(4), jitter=1 / 2, progress=False, **options,
    )  # fmt: skip
    return inverter.stream([0, 3, 1, 2], 2)


def test_a_streams_replayed_iterations_give_the_same_bits_over_refills(model, monkeypatch):
    expected = streamed(model, graphs=False, backend="torch")
    use_tape(monkeypatch)
    replayed = streamed(model, backend="torch")
    check_same(replayed, expected)
    assert len(set(replayed.iterations.tolist())) > 1


def inverted(model: nn.Module, **options):
    """Images of a CNN in two resolutions, with a schedule of the learning rate."""
    inverter = Inverter(
        model, pooling={0: 2, 8: 1}, lr_schedule=WarmupCosine(3), iterations=16, image_size=(16, 16), progress=False,
        **options,
    )  # fmt: skip
    return inverter.run([0, 3])


def test_replayed_iterations_of_a_cnn_give_the_same_bits_in_two_resolutions(seed, monkeypatch):
    cnn = small_cnn()
    expected = inverted(cnn, backend="torch")
    use_tape(monkeypatch)
    check_same(inverted(cnn, backend="torch"), expected)


def test_the_tape_sees_a_loss_that_waits_for_the_host(model, monkeypatch):
    use_tape(monkeypatch)
    inverter = Inverter(model, objective=lambda logits, images, targets: logits.mean() * logits.mean().item(),
                        stopping=StoppingSchedule.dense(), iterations=4, progress=False)  # fmt: skip
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        inverter.run([0])


class FakeGraph:
    """Counts replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def fake_graphs(monkeypatch):
    """Graphs that are captured, in the place of those of CUDA."""
    made = []

    def capture(function, pool):
        function()
        made.append(FakeGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graphs, "capture", capture)
    return made


def test_a_call_runs_once_and_is_captured_once(fake_graphs):
    calls = []
    replayed = Replayed(calls.append)
    for iteration in range(10):
        replayed(iteration % 2)
    assert calls == [0, 1, 0, 1]
    assert [graph.replays for graph in fake_graphs] == [4, 4]


@pytest.mark.parametrize(("fails_at", "expected"), [(3, [0, 1, 0, 0, 1, 0, 1]), (4, [0, 1, 0, 1, 1, 0, 1])])
def test_what_cannot_be_captured_runs_as_it_is(fake_graphs, recwarn, fails_at, expected):
    """The third call and the fourth are captures."""
    calls = []

    def function(number):
        calls.append(number)
        if len(calls) == fails_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    replayed = Replayed(function)
    for iteration in range(6):
        replayed(iteration % 2)
    assert calls == expected
    assert [str(warning.message) for warning in recwarn] == [
        "iterations run without a CUDA graph: one cannot be captured, operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("pack", [True, False])
def test_cast_weights_give_the_same_numbers_and_are_gone_afterwards(model, pack):
    fast, images = smi_fast.accelerate(model.requires_grad_(False), dtype=torch.bfloat16), torch.randn(2, 3, 8, 8)
    expected, packed = fast(images), pack and can_pack(torch.bfloat16, torch.device("cpu"))
    tolerance = {"rtol": 1e-2, "atol": 3e-2} if packed else {"rtol": 0, "atol": 0}  # sums in another order
    with fast.cast_weights(pack=pack), fast.cast_weights(pack=pack):
        torch.testing.assert_close(fast(images), expected, **tolerance)
        weight, bias = model.blocks[0].mlp.fc1._cast_weights.copies
        assert (isinstance(weight, PackedWeight), bias.dtype) == (packed, torch.bfloat16)
        assert isinstance(model.blocks[-1].attn.qkv._cast_weights.copies[0], torch.Tensor)  # of which parts are read
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight.mul_(-4)
        changed = fast(images)
    torch.testing.assert_close(fast(images), changed, **tolerance)
    assert (changed - expected).abs().max() > 0.05
    assert not any(hasattr(module, "_cast_weights") for module in model.modules())


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:iterations run without a CUDA graph")
@pytest.mark.parametrize("objective", [deep_inversion(1e-2, 1e-3), users_loss], ids=["fused", "user"])
def test_cuda_graphs_give_the_bits_of_the_loop_without(model, objective):
    options = {"stopping": StoppingSchedule(STOPS), "objective": objective, "iterations": 24, "progress": False}
    with_graphs, without = (Inverter(model.cuda(), graphs=on, **options).run([0, 3]) for on in (True, False))
    assert torch.equal(with_graphs.losses, without.losses)
    assert torch.equal(with_graphs.images, without.images)


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:iterations run without a CUDA graph")
@pytest.mark.parametrize("is_cnn", [False, True], ids=["stream", "cnn"])
def test_cuda_graphs_of_a_stream_and_a_cnn_give_the_same_bits(model, is_cnn):
    run, model = (inverted, small_cnn(torch.float32)) if is_cnn else (streamed, model)
    with_graphs, without = (run(model.cuda(), graphs=on) for on in (True, False))
    assert torch.equal(with_graphs.losses, without.losses)
    assert torch.equal(with_graphs.images, without.images)


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:iterations run without a CUDA graph")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("objective", [deep_inversion(1e-2, 1e-3), users_loss], ids=["fused", "user"])
def test_no_iteration_waits_for_the_gpu(model, objective, graphs):
    """The bar is shown, and the callback runs."""
    inverter = Inverter(model.cuda(), objective=objective, stopping=StoppingSchedule({10: 0.3}), iterations=30,
                        graphs=graphs)  # fmt: skip

    def forbid(step):
        inside = 3 <= step.iteration < 8 or 14 <= step.iteration < 28  # behind the captures, which wait
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    try:
        inverter.run([0, 1], callback=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_warning_names_the_line_that_runs_the_inversion(model, monkeypatch):
    def fails(*_):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", tuple)
    monkeypatch.setattr(graphs, "capture", fails)
    monkeypatch.setattr(loop_module, "has_graphs", lambda device: True)
    inverter = Inverter(model, stopping="dense", iterations=4, progress=False)
    with pytest.warns(UserWarning, match="without a CUDA graph") as caught:
        inverter.run([0])
    assert caught[0].filename == __file__


@pytest.mark.cuda
def test_a_loss_that_waits_for_the_gpu_runs_without_graphs(model):
    def impatient(logits, images, targets):
        return nn.functional.cross_entropy(logits, targets) * (1 + 0 * logits.mean().item())

    options = {"stopping": StoppingSchedule(STOPS), "objective": impatient, "iterations": 16, "progress": False}
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        result = Inverter(model.cuda(), **options).run([0, 3])
    assert torch.equal(result.losses, Inverter(model, graphs=False, **options).run([0, 3]).losses)
