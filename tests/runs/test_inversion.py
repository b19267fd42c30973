"""Long inversions: the same images however often they are interrupted and whoever makes them, and nothing lost."""

import json
import shutil
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

import smi_fast
from smi_fast import InvertedDataset, Inverter, deep_inversion
from smi_fast.data.manifest import MANIFEST
from smi_fast.models import cifar10_vit
from smi_fast.runs.inversion import invert, records, shard
from smi_fast.runs.processes import Processes
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped
from smi_fast.seeds import batch_seed

TARGETS = torch.tensor([3, 1, 4, 1, 5])
FIGURES_OF_TIME = ("seconds", "stages")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return cifar10_vit(False, depth=1)


def inverter(model, **options) -> Inverter:
    options = {"stopping": {2: 0.5, 4: 0.3}, "iterations": 7, "lr": 0.1, "progress": False} | options
    return Inverter(model, **options)


def of_streams(model) -> Inverter:
    """Of which no image is finished before its last iteration."""
    until = smi_fast.Until(0.999, checks=1, every=3)
    return inverter(model, objective=deep_inversion(norm="image"), until=until)


def contents(folder) -> list:
    """All that the shards of a run hold, without figures of time."""
    found = []
    for file in sorted((folder / "images").iterdir()):
        dataset = InvertedDataset.load(file)
        metadata = {name: value for name, value in dataset.metadata.items() if name not in FIGURES_OF_TIME}
        found.append(
            [file.name, dataset.patches.tolist(), dataset.positions.tolist(), dataset.targets.tolist(), metadata]
        )
    return found


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that nobody has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    invert(inverter(model), TARGETS, folder, batch_size=2)
    return folder


def test_each_batch_is_what_the_inverter_makes_of_it(model, whole):
    dataset = InvertedDataset.load(whole)
    for number, targets in enumerate(TARGETS.split(2)):
        result = inverter(model).run(targets, seed=batch_seed(0, number))
        assert torch.equal(dataset.images(range(2 * number, 2 * number + len(targets))), result.images)
        assert InvertedDataset.load(shard(whole, number)).metadata["loss"] == result.losses.tolist()
    assert dataset.targets.tolist() == TARGETS.tolist()
    assert dataset.missing == 0


class StopAfter:
    """A callback that asks for an end after so many iterations, as a signal does."""

    def __init__(self, monkeypatch, iterations: int):
        self.left, self.runs, enter = iterations, [], Run.__enter__
        monkeypatch.setattr(Run, "__enter__", lambda run: self.runs.append(run) or enter(run))

    def __call__(self, number, step) -> None:
        self.left -= 1
        if self.left == 0:
            self.runs[-1].signals.asked = 15


@pytest.mark.parametrize("make", [inverter, of_streams], ids=["batches", "streams"])
def test_a_run_stopped_at_any_iteration_goes_on_with_the_same_bits(make, model, tmp_path, monkeypatch):
    invert(make(model), TARGETS, tmp_path / "whole", batch_size=2)
    expected, iterations = contents(tmp_path / "whole"), 0
    for every in (1, 4, 5):  # as often as there are iterations, and in the middle of the second and third batch
        folder, stops, monkey = tmp_path / str(every), 0, pytest.MonkeyPatch()
        for _ in range(100):
            with monkey.context() as patch:
                stop = StopAfter(patch, every)
                try:
                    invert(make(model), TARGETS, folder, batch_size=2, callback=stop)
                    break
                except Stopped:
                    stops += 1
        iterations = max(iterations, stops)
        assert contents(folder) == expected
        assert not list((folder / "checkpoints").iterdir())
    assert iterations >= 20


def test_snapshots_and_costs_survive_an_interruption(model, whole, tmp_path, monkeypatch):
    for left in (3, 6, 0):
        with pytest.MonkeyPatch().context() as patch:
            try:
                invert(inverter(model), TARGETS, tmp_path / "run", batch_size=2, callback=StopAfter(patch, left))
            except Stopped:
                assert left
    assert (tmp_path / "run" / "process.state").read_bytes() == (whole / "process.state").read_bytes()
    ours, theirs = (list(records(InvertedDataset.load(folder).files)) for folder in (tmp_path / "run", whole))
    for a, b in zip(ours, theirs, strict=True):
        assert (
            [stage["iterations"] for stage in a["stages"]]
            == [stage["iterations"] for stage in b["stages"]]
            == [2, 2, 3]
        )
        assert [stage["flops"] for stage in a["stages"]] == [stage["flops"] for stage in b["stages"]]


def test_what_is_there_can_be_read_at_any_moment(model, whole, tmp_path):
    everything, seen = InvertedDataset.load(whole), []

    def read(number, step) -> None:
        if step.iteration == 3 and number == 0:
            with pytest.raises(FileNotFoundError, match="holds none of the 5 images of its run yet"):
                InvertedDataset.load(tmp_path)
        elif step.iteration == 3:
            with pytest.warns(UserWarning, match=f"{2 * number} of 5 images, because its run is not finished"):
                found = InvertedDataset.load(tmp_path)
            seen.append((len(found), found.missing))
            assert torch.equal(found.images(), everything.images(range(len(found))))

    invert(inverter(model), TARGETS, tmp_path, batch_size=2, callback=read)
    assert seen == [(2, 3), (4, 1)]


def test_a_shard_that_is_missing_is_made_again_and_no_other(model, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shard(folder, 1).unlink()
    made = []
    invert(inverter(model), TARGETS, folder, batch_size=2, callback=lambda number, step: made.append(number))
    assert made == [1] * 7
    assert contents(folder) == contents(whole)


def test_a_damaged_checkpoint_costs_its_batch_and_no_bits(model, whole, tmp_path):
    with pytest.MonkeyPatch().context() as patch, pytest.raises(Stopped):
        invert(inverter(model), TARGETS, tmp_path, batch_size=2, callback=StopAfter(patch, 11))
    (file,) = (tmp_path / "checkpoints").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"00001\.state: .*; what it held is computed again"):
        invert(inverter(model), TARGETS, tmp_path, batch_size=2)
    assert contents(tmp_path) == contents(whole)


def test_a_changed_plan_is_named_and_nothing_is_overwritten(model, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    changed = cifar10_vit(False, depth=1)
    for how, options, named in (
        (inverter(model), {"targets": TARGETS + 1}, "targets is"),
        (inverter(model), {"batch_size": 3}, "batch_size is 2, not 3"),
        (inverter(model), {"seed": 1}, "seed is 0, not 1"),
        (inverter(model, lr=0.2), {}, "lr is 0.1, not 0.2"),
        (inverter(changed), {}, "model is"),
    ):
        arguments = {"targets": TARGETS, "batch_size": 2, "seed": 0} | options
        with pytest.raises(ValueError, match=named):
            invert(how, folder=folder, **arguments)
    (folder / "images" / "99999.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"99999\.safetensors is no file of this run"):
        invert(inverter(model), TARGETS, folder, batch_size=2)
    (folder / "images" / "99999.safetensors").unlink()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_bad_arguments_are_named_before_a_folder_is_made(model, tmp_path):
    for options, message in (
        ({"targets": [10]}, "10"),
        ({"targets": torch.full((1, 10), 0.1)}, "not soft labels"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"checkpoint_every": 0}, "must be more than 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            invert(inverter(model), folder=tmp_path / "new", **{"targets": [0], **options})
    assert not (tmp_path / "new").exists()


def test_images_do_not_depend_on_the_number_of_processes(model, whole, tmp_path, monkeypatch):
    """Two processes, of which the first dies in its second batch, which the other takes over when it is silent."""
    store, made = dist.HashStore(), []

    def join(rank: int):
        monkeypatch.setattr(Processes, "of_environment", lambda: Processes(store, rank, 2, timeout=0.5))

    class Dead(BaseException):
        pass

    def die(number, step) -> None:
        made.append(number)
        if len(made) == 10:
            raise Dead

    join(0)
    with monkeypatch.context() as killed:
        killed.setattr(Processes, "leave", lambda self, wait: None)
        with pytest.raises(Dead):
            invert(inverter(model), TARGETS, tmp_path, batch_size=2, callback=die)
    join(1)
    invert(inverter(model), TARGETS, tmp_path, batch_size=2, callback=lambda number, step: made.append(number))
    assert made == [0] * 7 + [1] * 3 + [2] * 7 + [1] * 7
    assert contents(tmp_path) == contents(whole)


def test_more_processes_than_batches_are_said_and_not_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Processes, "of_environment", lambda: Processes(dist.HashStore(), 0, 4))
    monkeypatch.setattr(Processes, "leave", lambda self, wait: None)
    with pytest.warns(UserWarning, match="4 processes share 1 batches: some have nothing to do"):
        invert(inverter(model), [0], tmp_path)
    assert len(InvertedDataset.load(tmp_path)) == 1


def test_released_images_are_counted(model, tmp_path):
    rebirth = inverter(model, stopping=smi_fast.RebirthSchedule(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = invert(rebirth, TARGETS, tmp_path, batch_size=2)
    assert len(dataset) == 15
    assert json.loads((tmp_path / MANIFEST).read_text())["settings"]["images"] == 15


def test_the_folder_of_a_run_among_others_is_read_without_its_checkpoints(model, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    shutil.copytree(whole, tmp_path / "b")
    (tmp_path / "b" / "student.safetensors").write_bytes(b"weights of a model")
    assert len(InvertedDataset.load(tmp_path)) == 10
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert len(InvertedDataset.load(tmp_path / "moved")) == 5


def test_a_shard_with_a_damaged_index_is_made_again(model, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    content = shard(folder, 1).read_bytes()
    shard(folder, 1).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"00001\.safetensors: .*; the batch is made again"):
        invert(inverter(model), TARGETS, folder, batch_size=2)
    assert contents(folder) == contents(whole)


def test_what_cannot_begin_leaves_the_run_before_it(model, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    verified = of_streams(model)
    verified.verifier = model
    broken = cifar10_vit(False, depth=1)
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    monkeypatch.setitem(sys.modules, "smi_fast.runs.tensorboard", None)
    for how, options, message in (
        (verified, {}, "no verifier"),
        (inverter(broken), {}, "NaN"),
        (inverter(model), {"log": "tensorboard"}, "needs its package"),
        (inverter(model), {"log": "wandb"}, "must be one of csv, tensorboard"),
        (inverter(model), {"log_every": 0}, "every must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            invert(how, TARGETS, folder, overwrite=True, **options)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_model_with_the_same_weights_and_other_heads_is_another_model(model, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    other = cifar10_vit(False, depth=1, num_heads=6)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="model is"):
        invert(inverter(other), TARGETS, folder, batch_size=2)


def test_unfinished_runs_below_a_folder_are_counted(model, whole, tmp_path):
    for name in "ab":
        shutil.copytree(whole, tmp_path / name)
    shard(tmp_path / "b", 2).unlink()
    trash = tmp_path / "a" / f".{'0' * 32}.partial" / "images"
    trash.mkdir(parents=True)
    shutil.copy(shard(whole, 0), trash)  # what an overwriting that was killed has left
    with pytest.warns(UserWarning, match=f"{tmp_path} holds 9 of 10 images"):
        found = InvertedDataset.load(tmp_path)
    assert (len(found), found.missing) == (9, 1)


def test_settings_and_seeds_are_in_each_shard(whole):
    for number, metadata in enumerate(records(InvertedDataset.load(whole).files)):
        assert metadata["settings"]["iterations"] == 7
        assert (metadata["seed"], metadata["batch_seed"]) == (0, batch_seed(0, number))
