"""A distillation that ends early, wherever that is, goes on with the same bits."""

import copy
import signal
import warnings

import pytest
import torch
from distillation_cases import CLASSES, make_dataset, tiny, tiny_cnn

import smi_fast
from smi_fast.data.sparse import InvertedDataset
from smi_fast.distillation import DistillationResult, distill
from smi_fast.distillation.training import Training
from smi_fast.inversion.competition import competition
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped
from smi_fast.seeds import batch_seed

CASES = ["linear probing", "fine-tuning", "adaptive", "dataset"]
SMALL = {"rounds": 2, "steps": 3, "samples": 5, "batch_size": 3, "seed": 3, "lr": 0.05, "progress": False}


def case(name: str) -> tuple[torch.nn.Module, torch.nn.Module, dict]:
    """Return a teacher, a student and the arguments of a distillation."""
    options = SMALL | {"evaluate": lambda student: torch.rand(()).item() * 0 + 0.5}  # draws from torch's generator
    if name == "adaptive":  # with the statistics of BatchNorm
        teacher, student = tiny_cnn(), tiny_cnn(width=4)
        options |= {"adaptive": 10.0, "inversion_batch_size": 3}
        inverter = smi_fast.Inverter(teacher, objective=smi_fast.deep_inversion(), iterations=3, progress=False)
        return teacher, student, options | {"inverter": inverter}
    teacher, student = tiny(), tiny(mean=0.4, proj_drop_rate=0.2)
    options["linear_probing"] = name == "linear probing"
    if name == "dataset":
        return teacher, student, options | {"dataset": make_dataset(n=8)}
    inverter = smi_fast.Inverter(teacher, iterations=4, stopping={2: 0.5}, progress=False)
    return teacher, student, options | {"inverter": inverter}


class Asked(Run):
    """A run that a signal asks for an end after a number of checkpoints, each of which is saved."""

    def __init__(self, folder, after: int | None = None, settings: dict | None = None):
        super().__init__(folder, "distillation", settings or {}, checkpoint_every=1e-9)
        self.left = after

    def save(self, name, state):
        super().save(name, state)
        self.left = None if self.left is None else self.left - 1
        if self.left == 0:
            self.signals.asked = signal.SIGTERM


class Killed(Asked):
    """A run that ends abruptly where it would save one of its checkpoints."""

    def save(self, name, state):
        if self.left == 1:
            raise ZeroDivisionError
        super().save(name, state)


def assert_equal(found: DistillationResult, expected: DistillationResult, student, model) -> None:
    exact = [
        [(r.number, r.samples, r.iterations, r.steps, r.loss, r.accuracy) for r in result.history]
        for result in (found, expected)
    ]
    assert exact[0] == exact[1]
    for ours, theirs in zip(found.batches, expected.batches, strict=True):
        assert len(ours) == len(theirs)
        for sample, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(sample, other, strict=True))
    weights, expected = student.state_dict(), model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.parametrize("name", CASES)
def test_stopped_at_every_iteration_and_step_it_ends_with_the_same_bits(seed, name, tmp_path):
    teacher, student, options = case(name)
    model = copy.deepcopy(student)
    expected = distill(teacher, model, **options)
    before, exit_codes = copy.deepcopy(student.state_dict()), []
    while True:
        try:
            with Asked(tmp_path, after=1) as run:
                found = distill(teacher, student, run=run, **options)
            break
        except Stopped as stopped:
            exit_codes.append(stopped.exit_code)
        assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert set(exit_codes) == {143}
    assert len(exit_codes) >= expected.history[-1].iterations + 2 * SMALL["steps"]
    assert_equal(found, expected, student, model)
    with Asked(tmp_path) as run:  # nothing is left to be done
        again = copy.deepcopy(student)
        again.load_state_dict(before)
        assert_equal(distill(teacher, again, run=run, **options), expected, again, model)
        assert run.left is None
    if name != "dataset":
        images = InvertedDataset.load(tmp_path / "images")
        assert torch.equal(images.images(), torch.cat([batch.images() for batch in expected.batches]))


def test_ended_abruptly_wherever_it_goes_on_from_the_checkpoint_before(seed, tmp_path):
    teacher, start, options = case("adaptive")
    options |= {"steps": 2, "inversion_batch_size": 5}
    model = copy.deepcopy(start)
    expected, number, ended = distill(teacher, model, **options), 0, True
    while ended:
        number, student, folder = number + 1, copy.deepcopy(start), tmp_path / str(number)
        try:
            with Killed(folder, after=number) as run:
                distill(teacher, student, run=run, **options)
            ended = False
        except ZeroDivisionError:
            student.load_state_dict(start.state_dict())
            with Asked(folder) as run:
                assert_equal(distill(teacher, student, run=run, **options), expected, student, model)
    assert number > expected.history[-1].iterations + 2 * options["steps"]


def against(inverter: smi_fast.Inverter, student) -> smi_fast.Inverter:
    return inverter.with_objective(competition(inverter.objective, student, 10.0))


@pytest.mark.parametrize(
    ("name", "after", "damaged", "harm", "steps"),
    [
        ("adaptive", 21, "00001", "flip", 6),  # all steps: the training begins anew
        ("adaptive", 21, "00003", "cut", 6),
        ("adaptive", 21, "00000", "remove", 6),
        ("adaptive", 16, "00002", "flip", 3),
        ("by hand", 16, "00000", "flip", 6),
        ("linear probing", 16, "00000", "flip", 1),
        ("linear probing", 16, "00001", "remove", 1),
    ],
)
def test_images_that_are_damaged_or_gone_are_made_again(seed, name, after, damaged, harm, steps, tmp_path, monkeypatch):
    """The training begins anew only if the student has learnt from images that depend on the student as it was."""
    teacher, student, options = case("linear probing" if name == "by hand" else name)
    model, begun = copy.deepcopy(student), copy.deepcopy(student.state_dict())
    others = options
    if name == "by hand":  # the objective itself holds the student
        others, options = (options | {"inverter": against(options["inverter"], each)} for each in (model, student))
    expected = distill(teacher, model, **others)
    with pytest.raises(Stopped), Asked(tmp_path, after=after) as run:
        distill(teacher, student, run=run, **options)
    student.load_state_dict(begun)
    file = tmp_path / "images" / f"{damaged}.safetensors"
    content = bytearray(file.read_bytes())
    file.unlink()
    content[-3] ^= 4
    if harm != "remove":
        file.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    train, trained = Training._train, []
    monkeypatch.setattr(Training, "_train", lambda *args: trained.append(1) or train(*args))
    with warnings.catch_warnings(record=True) as warned, Asked(tmp_path) as run:
        warnings.simplefilter("always")
        assert_equal(distill(teacher, student, run=run, **options), expected, student, model)
    assert len(trained) == steps
    assert any("training begins anew" in str(w.message) for w in warned) == (steps == 6)
    assert any(f"{damaged}.safetensors" in str(w.message) for w in warned) == (harm != "remove")


def test_other_settings_are_named(seed, tmp_path):
    teacher, student, options = case("linear probing")
    with pytest.raises(Stopped), Asked(tmp_path, after=3) as run:
        distill(teacher, student, run=run, **options)

    def refused(match, student=student, **changed):
        with pytest.raises(ValueError, match=match), Asked(tmp_path) as run:
            distill(teacher, student, run=run, **(options | changed))

    refused("begun with steps 3, not 4", steps=4)
    refused("begun with lr 0.05, not 0.1", lr=0.1)
    refused("begun with linear_probing True, not False", linear_probing=False)
    refused("begun with student", tiny(mean=0.4))
    inverter = smi_fast.Inverter(teacher, iterations=5, stopping={2: 0.5}, progress=False)
    refused("begun with inversion_iterations 4, not 5", inverter=inverter)
    refused("begun with dataset None, not [0-9]+", inverter=None, dataset=make_dataset())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.safetensors").write_text("precious")
    refused("mine.safetensors is no file of this run")


def test_a_rounds_images_are_inverted_in_batches_with_seeds_of_their_own(seed):
    teacher, _, options = case("linear probing")
    result = distill(teacher, tiny(), **(options | {"inversion_batch_size": 2}))
    assert [len(batch) for batch in result.batches] == [5, 5]
    assert [r.iterations for r in result.history] == [12, 24]
    for number, batch in enumerate(result.batches):
        targets = torch.arange(5 * number, 5 * number + 5) % CLASSES
        assert batch.targets.equal(targets)
        for part, (alone, images) in enumerate(zip(targets.split(2), batch.images().split(2), strict=True)):
            made = options["inverter"].run(alone, seed=batch_seed(3, 3 * number + part))
            assert images.equal(made.images)


def test_distillations_share_a_run_as_its_parts(seed, tmp_path):
    teacher, start, options = case("dataset")
    rates, students = {"a": 0.05, "b": 0.02}, {}
    for _ in range(2):  # the second time nothing is left to be done
        for name, lr in rates.items():
            student, model = copy.deepcopy(start), copy.deepcopy(start)
            with Asked(tmp_path) as run:
                found = distill(teacher, student, run=run.part(name), **(options | {"lr": lr}))
            assert_equal(found, distill(teacher, model, **(options | {"lr": lr})), student, model)
            students[name] = student
    assert not torch.equal(students["a"].head.weight, students["b"].head.weight)
    teacher, student, options = case("linear probing")
    with pytest.raises(ValueError, match="take their images from datasets"), Asked(tmp_path) as run:
        distill(teacher, student, run=run.part("c"), **options)
