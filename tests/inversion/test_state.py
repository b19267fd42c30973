"""A run that was saved goes on as if nothing had happened, in another process too."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from cnn_cases import small_cnn
from inversion_cases import SureOfEven, small_model

from smi_fast import Inverter, Mass, RebirthSchedule, Until, WarmupCosine, deep_inversion
from smi_fast.models import cifar10_vit

OPTIONS = {"iterations": 8, "lr": 0.05, "jitter": 1 / 2, "objective": deep_inversion(1e-2, 1e-3), "progress": False}
RUNS = {
    "dense": {"stopping": "dense"},
    "sparse": {"stopping": {3: 0.3, 4: 0.3, 6: 0.3}},
    "mass": {"stopping": {3: Mass(0.8), 6: 0.3}},
    "published": {"stopping": {2: 0.3, 6: 0.3}, "published": True},
    "random": {"stopping": {3: 0.3, 6: 0.3}, "select": "random"},
    "views": {"stopping": {5: 0.3}, "view_per_image": True},
    "bfloat16": {"stopping": {5: 0.3}, "dtype": torch.bfloat16},
    "float16": {"stopping": {5: 0.3}, "dtype": torch.float16},
    "norms": {"stopping": {5: Mass(0.8)}, "objective": deep_inversion(1e-2, 1e-3, norm="image")},
    "rebirth": {"stopping": RebirthSchedule(4)},
    "schedule": {"stopping": {3: 0.3}, "lr_schedule": WarmupCosine(3), "clamp": False},
    "until": {"stopping": {2: 0.3}, "until": Until(0.25, checks=2, every=2)},
    "triton": {"stopping": {1: Mass(0.8)}, "iterations": 3, "backend": "triton"},
}


STREAM = {
    "iterations": 8, "lr": 0.05, "stopping": {2: 0.3, 4: 0.5}, "until": SureOfEven(checks=1, every=3),
    "objective": deep_inversion(1e-2, norm="image"), "progress": False,
}  # fmt: skip
STREAMS = {
    "dense": {"stopping": "dense", "until": SureOfEven(checks=2, every=1)},
    "rebirth": {"stopping": RebirthSchedule(2), "select": "random"},
    "schedule": {"lr_schedule": WarmupCosine(3), "until": Until(0.25, checks=1, every=2)},
    "float16": {"dtype": torch.float16, "graphs": False},
}


@pytest.fixture
def model(seed):
    return small_model()


def saved(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    json.dumps(state, default=torch.Tensor.tolist)  # raises TypeError if it holds anything but data
    return file.getvalue()


def read(state: bytes) -> dict:
    return torch.load(io.BytesIO(state), weights_only=True)


def assert_same_bits(result, expected) -> None:
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.losses, expected.losses)
    assert result.history == expected.history
    rows = [list(r.keep) for r in (result, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_any_iteration_with_the_same_bits(model, seed, name):
    states, targets = [], [4, 0, 2]
    expected = Inverter(model, **OPTIONS | RUNS[name]).run(
        targets, seed, lambda step: states.append(saved(step.state_dict()))
    )
    for state in states:
        result = Inverter(model, **OPTIONS | RUNS[name]).run(targets, seed, state=read(state))
        assert_same_bits(result, expected)


def test_a_new_process_goes_on_with_the_same_bits(seed, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from smi_fast import Inverter, Mass\n"
        "from smi_fast.models import cifar10_vit\n"
        "torch.set_num_threads(1)\n"
        "inverter = Inverter(cifar10_vit(), stopping={4: 0.3, 8: Mass(0.8)}, iterations=12, progress=False)\n"
        "def save(step):\n"
        "    if step.iteration == 7:\n"
        "        torch.save(step.state_dict(), sys.argv[1])\n"
        "state = torch.load(sys.argv[1], weights_only=True) if len(sys.argv) > 3 else None\n"
        "result = inverter.run([1, 2], 7, save, state=state)\n"
        "torch.save((result.images, result.losses), sys.argv[2])\n"
    )
    state = tmp_path / "state.pt"
    for arguments in ([state, tmp_path / "whole.pt"], [state, tmp_path / "resumed.pt", "resume"]):
        subprocess.run([sys.executable, script, *arguments], check=True)
    whole, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "resumed"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_saved_state_stays_as_it_was_while_the_run_goes_on(model, seed):
    states = []
    inverter = Inverter(model, **OPTIONS | RUNS["sparse"])
    inverter.run([0, 1], seed, lambda step: states.append((step.state_dict(), saved(step.state_dict()))))
    assert all(saved(state) == at_once for state, at_once in states)


def test_going_on_does_not_change_the_state_that_it_was_given(model, seed):
    options, states = OPTIONS | RUNS["float16"], []
    Inverter(model, **options).run([0, 1], seed, lambda step: states.append(step.state_dict()))
    before = saved(states[4])
    first, second = (Inverter(model, **options).run([0, 1], seed, state=states[4]) for _ in range(2))
    assert_same_bits(first, second)
    assert saved(states[4]) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"seed": 5}, "seed is 5"),
        ({"targets": torch.tensor([0, 2])}, "target 1 is 2, not 1"),
        ({"targets": torch.tensor([0, 1, 2])}, r"targets have shape \(3,\), not \(2,\)"),
    ],
)
def test_a_state_of_another_run_is_refused_by_what_differs(model, change, message):
    inverter = Inverter(model, **OPTIONS | {"stopping": {3: 0.3}})
    states = []
    inverter.run([0, 1], 3, lambda step: states.append(step.state_dict()))
    with pytest.raises(ValueError, match=message):
        inverter.run([0, 1], 3, state=states[4] | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stopping": {3: 0.4}}, r"stopping is .*\{3: 0.3\}.*, not .*\{3: 0.4\}"),
        ({"stopping": {3: 0.3000001}}, "stopping is"),
        ({"lr": 0.1}, "lr is 0.05, not 0.1"),
        ({"iterations": 9}, "iterations is 8, not 9"),
        ({"objective": deep_inversion(1e-2, 1e-4)}, "objective is .*l2=0.001.*, not .*l2=0.0001"),
        ({"select": "random"}, "select is attention, not random"),
        ({"dtype": torch.float16}, "dtype is torch.float32, not torch.float16"),
        ({"view_per_image": True}, "view_per_image is False, not True"),
        ({"published": True}, "published is False, not True"),
    ],
)
def test_a_run_with_other_settings_does_not_go_on(model, change, message):
    states, options = [], OPTIONS | {"stopping": {3: 0.3}, "dtype": torch.float32}
    Inverter(model, **options).run([0, 1], 3, lambda step: states.append(step.state_dict()))
    with pytest.raises(ValueError, match=message):
        Inverter(model, **options | change).run([0, 1], 3, state=states[4])


def test_a_model_with_other_patches_does_not_go_on(model):
    states, options = [], OPTIONS | {"stopping": {3: 0.3}}
    Inverter(model, **options).run([0, 1], 3, lambda step: states.append(step.state_dict()))
    coarse = cifar10_vit(False, img_size=8, patch_size=4, depth=2, embed_dim=32, num_heads=2, num_classes=5)
    with pytest.raises(ValueError, match=r"patch_size is \[2, 2\], not \[4, 4\]"):
        Inverter(coarse, **options).run([0, 1], 3, state=states[4])


def test_numbers_of_numpy_are_saved_as_plain_ones(model):
    plain = {"lr": 0.125, "betas": (0.5, 0.75), "mean": [0.5, 0.25, 0.5], "std": [0.5] * 3, "jitter": 0.25, "flip": 0.5}
    states = {}
    for name, options in ("plain", plain), ("numpy", {key: np.array(value)[()] for key, value in plain.items()}):
        inverter = Inverter(model, **OPTIONS | {"stopping": {3: 0.3}} | options)
        inverter.run([0, 1], 3, lambda step, name=name: states.setdefault(name, saved(step.state_dict())))
    assert read(states["numpy"])["settings"] == read(states["plain"])["settings"]


def same(a, b) -> bool:
    """Whether two states are equal bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def check_stream(inverter: Inverter, targets, seed: int) -> list[dict]:
    """Check that a stream with two slots goes on from each of its iterations as it did without an interruption: with
    the same states after all later iterations, and the same result. Return its states."""
    states = []
    expected = inverter.stream(targets, 2, seed, lambda step: states.append(saved(step.state_dict())))
    states = [read(state) for state in states]
    for done, state in enumerate(states, start=1):
        later = []
        result = inverter.stream(targets, 2, seed, lambda step, to=later: to.append(step.state_dict()), state)
        assert same(later, states[done:]), done
        assert_same_bits(result, expected)
        assert result.targets.tolist() == expected.targets.tolist()
        assert result.iterations.tolist() == expected.iterations.tolist()
    return states


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_goes_on_from_any_iteration_with_the_same_bits(model, seed, name, monkeypatch):
    monkeypatch.setattr("smi_fast.inversion.scaling.INTERVAL", 3)  # so that the scale of a float16 loss changes
    check_stream(Inverter(model, **STREAM | STREAMS[name]), [4, 1, 2], seed)


def test_a_stream_of_soft_labels_is_saved_at_every_moment_that_there_is(model, seed):
    labels = torch.full((5, 5), 0.05)
    labels[range(5), [4, 1, 2, 0, 3]] = 0.8
    states = check_stream(Inverter(model, **STREAM), labels, seed)
    images = [{*state["slots"]["numbers"]} for state in states]
    finished = [{found["number"] for found in state["results"]} for state in states]
    reserves = [state["reserve"] for state in states]
    settling = [reserve is not None and reserve["iteration"] < 4 for reserve in reserves]
    assert states[0]["slots"]["iteration"] == 1  # before the first images are settled
    assert any(settles and done & now for settles, done, now in zip(settling, finished, images, strict=True))
    assert any(reserve and not settles for reserve, settles in zip(reserves, settling, strict=True))
    # a finished image waits for the next check; after others have left and none comes, the batch is smaller
    assert any(done & now and len(done & now) < len(now) for done, now in zip(finished, images, strict=True))
    assert {len(now) for now in images} == {1, 2}
    ages = {found["number"]: found["iterations"] for found in states[-1]["results"]}
    assert ages == {0: 7, 1: 8, 2: 7, 3: 7, 4: 8}  # an image of an even class is sure at the first check, 3 after 4


def test_a_stream_of_a_cnn_goes_on_at_either_resolution_with_the_same_bits(seed):
    options = STREAM | {"stopping": "dense", "pooling": {0: 2, 2: 1}, "iterations": 5, "image_size": (16, 16)}
    check_stream(Inverter(small_cnn(torch.float32), **options), [2, 1, 0], seed)


def test_a_saved_stream_stays_as_it_was_while_it_goes_on_twice(model, seed):
    states, inverter = [], Inverter(model, **STREAM)
    inverter.stream([4, 1, 2], 2, seed, lambda step: states.append((step.state_dict(), saved(step.state_dict()))))
    for state, at_once in states:
        assert same(state, read(at_once))
    first, second = (inverter.stream([4, 1, 2], 2, seed, state=states[8][0]) for _ in range(2))
    assert_same_bits(first, second)
    assert same(states[8][0], read(states[8][1]))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, ([4, 1, 0], 2, 3), "target 2 is 2, not 0"),
        ({}, ([4, 1], 2, 3), r"targets have shape \(3,\), not \(2,\)"),
        ({}, ([4, 1, 2], 3, 3), "batch_size is 2, not 3"),
        ({}, ([4, 1, 2], 2, 4), "seed is 3, not 4"),
        ({"lr": 0.1}, ([4, 1, 2], 2, 3), "lr is 0.05, not 0.1"),
        ({"until": Until(0.5)}, ([4, 1, 2], 2, 3), r"until is SureOfEven.*, not Until"),
    ],
)
def test_another_stream_does_not_go_on_from_a_state(model, options, arguments, message):
    states = []
    Inverter(model, **STREAM).stream([4, 1, 2], 2, 3, lambda step: states.append(step.state_dict()))
    for state in (states[1], states[8]):
        with pytest.raises(ValueError, match=message):
            Inverter(model, **STREAM | options).stream(*arguments, state=state)


def test_runs_and_streams_refuse_each_others_states_and_what_is_none(model, seed):
    states, inverter = {}, Inverter(model, **STREAM)
    inverter.run([4, 1], seed, lambda step: states.update(run=step.state_dict()))
    inverter.stream([4, 1], 2, seed, lambda step: states.update(stream=step.state_dict()))
    with pytest.raises(ValueError, match=r"the state is of a stream, which Inverter\.run cannot go on from"):
        inverter.run([4, 1], seed, state=states["stream"])
    with pytest.raises(ValueError, match=r"the state is of a run, which Inverter\.stream cannot go on from"):
        inverter.stream([4, 1], 2, seed, state=states["run"])
    with pytest.raises(TypeError, match="got a str"):
        inverter.stream([4, 1], 2, seed, state="state.pt")
    del states["run"]["exp_avg"], states["stream"]["slots"]["exp_avg"]
    with pytest.raises(ValueError, match="holds no 'exp_avg'"):
        inverter.run([4, 1], seed, state=states["run"])
    with pytest.raises(ValueError, match="holds no 'exp_avg'"):
        inverter.stream([4, 1], 2, seed, state=states["stream"])
