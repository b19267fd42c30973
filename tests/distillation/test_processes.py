"""Two processes of torchrun make the images of one process, bit for bit, and its student, to rounding."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distillation_cases import make_dataset, tiny, tiny_cnn

import smi_fast
from smi_fast.data.sparse import InvertedDataset
from smi_fast.data.states import load_state
from smi_fast.distillation import distill
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped

PROGRAM = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_processes as cases
for name in cases.CASES:
    cases.in_a_run(name, Path(sys.argv[2]), int(os.environ["RANK"]))
cases.share_a_run(Path(sys.argv[2]), int(os.environ["RANK"]))
"""
LONE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_processes as cases
from smi_fast.cli import _sentence
from smi_fast.distillation.training import Training
train = Training._train

def end_in_the_second_step(training, batch):
    if training.step == 1 and os.environ["RANK"] == "1":
        os._exit(7)
    return train(training, batch)

Training._train = end_in_the_second_step
teacher, student, options = cases.case("fine-tuning")
try:
    with cases.Run(sys.argv[2], "distillation", {}) as run:
        cases.distill(teacher, student, run=run, **options)
except ConnectionError as error:
    sys.exit(_sentence(error))
"""
CASES = ["linear probing", "fine-tuning", "adaptive"]


def case(name: str) -> tuple[torch.nn.Module, torch.nn.Module, dict]:
    """Return a teacher, a student and the arguments of a distillation, whose shares of a batch are 3 and 2 images."""
    torch.manual_seed(5)
    options = {"rounds": 2, "steps": 3, "samples": 7, "batch_size": 5, "lr": 0.05, "seed": 3, "progress": False}
    options |= {"inversion_batch_size": 2, "temperature": 2.0}
    if name == "adaptive":  # with BatchNorm, which sees what each process has
        teacher, student = tiny_cnn(), tiny_cnn(width=4)
        inverter = smi_fast.Inverter(teacher, objective=smi_fast.deep_inversion(), iterations=3, progress=False)
        return teacher, student, options | {"inverter": inverter, "adaptive": 10.0}
    teacher, student = tiny(), tiny(mean=0.4)
    inverter = smi_fast.Inverter(teacher, iterations=4, stopping={2: 0.5}, progress=False)
    return teacher, student, options | {"inverter": inverter, "linear_probing": name == "linear probing"}


def in_a_run(name: str, folder: Path, rank: int) -> None:
    """Distil in this process of torchrun, without an interruption and with one, and save the students."""
    from smi_fast.distillation.training import Training

    train, stopped = Training._train, []

    def ask(training: Training, *batch):
        if rank == 1 and len(training.history) == 1 and training.step == 1 and not stopped:
            run.signals.asked = 15
            stopped.append(True)
        return train(training, *batch)

    for what in ("whole", "stopped"):
        teacher, student, options = case(name)
        Training._train = ask if what == "stopped" else train
        while True:
            try:
                with Run(folder / name / what, "distillation", {}) as run:
                    result = distill(teacher, student, run=run, **options)
                break
            except Stopped as error:
                stopped = [error.exit_code]
                if rank == 0:
                    state = load_state(folder / name / what / "checkpoints" / "training.state")
                    stopped += [len(state["history"]), state["step"]]
        losses = [finished.loss for finished in result.history]
        torch.save([student.state_dict(), losses, stopped], folder / name / f"{what}-{rank}.pt")


def students(run: Callable[[str], Run | None]) -> list[torch.nn.Module]:
    """Teach two students, each in the part of a run that `run` returns."""
    found = []
    for part in ("a", "b"):
        teacher, student, options = case("fine-tuning")
        del options["inverter"], options["inversion_batch_size"]
        distill(teacher, student, dataset=make_dataset(), run=run(part), **options)
        found.append(student)
    return found


def share_a_run(folder: Path, rank: int) -> None:
    with Run(folder / "parts", "distillation", {}) as run:
        found = students(run.part)
    torch.save([student.state_dict() for student in found], folder / f"parts-{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which two processes have run all cases."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = start([*command, program(folder, PROGRAM)], folder)
    try:
        error = job.communicate(timeout=240)[1]
    finally:
        job.terminate()  # torchrun then ends its processes
        job.wait()
    assert job.returncode == 0, error[-4000:]
    return folder


def program(folder: Path, text: str) -> Path:
    (folder / "program.py").write_text(text)
    return folder / "program.py"


def start(command: list, folder: Path, **variables: str) -> subprocess.Popen:
    """Start a program with two arguments: the folder of this file, and the folder to work in."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | variables
    arguments = [*map(str, command), str(Path(__file__).parent), str(folder)]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def state_of(folder: Path) -> list:
    return torch.load(folder, weights_only=True)


def assert_same(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_images_and_the_student_of_one(name, runs):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    teacher, student, options = case(name)
    start = copy.deepcopy(student.state_dict())
    result = distill(teacher, student, **options)
    torch.set_num_threads(before)
    expected = torch.cat([batch.images() for batch in result.batches])
    images = InvertedDataset.load(runs / name / "whole" / "images").images()
    state, losses, _ = state_of(runs / name / "whole-0.pt")
    if name == "adaptive":  # the second round's images depend on the student
        assert torch.equal(images[:7], expected[:7])
        assert not torch.equal(images, expected)
        return
    assert torch.equal(images, expected)
    torch.testing.assert_close(losses, [finished.loss for finished in result.history], rtol=1e-5, atol=1e-6)
    for key, value in student.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=key)
    moved = student.head.weight - start["head.weight"]
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_all_processes_have_the_same_student(name, runs):
    """Also the statistics of BatchNorm, which the images of an adaptive inversion depend on."""
    assert_same(*(state_of(runs / name / f"whole-{rank}.pt")[0] for rank in (0, 1)))


@pytest.mark.parametrize("name", CASES)
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_they_go_on_with_the_same_bits(name, runs):
    whole, stopped = state_of(runs / name / "whole-0.pt"), state_of(runs / name / "stopped-0.pt")
    assert stopped[2] == [143, 1, 2]  # finished rounds, steps
    assert state_of(runs / name / "stopped-1.pt")[2] == [143]
    assert_same(whole[0], stopped[0])
    assert whole[1] == stopped[1]


def test_two_processes_make_several_students_in_one_run(runs):
    for student, state in zip(students(lambda part: None), state_of(runs / "parts-1.pt"), strict=True):
        for key, value in student.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_without_torchrun_the_end_of_a_process_in_a_step_is_one_sentence(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, program(tmp_path, LONE)]
    jobs = [start(command, tmp_path / "run", RANK=str(rank), **there) for rank in range(2)]
    try:
        errors = [job.communicate(timeout=120)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert [job.returncode for job in jobs] == [1, 7]
    assert "a process that shares the run has ended" in errors[0].splitlines()[-1]
    assert "Traceback" not in errors[0]
