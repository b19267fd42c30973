"""What tests of several commands share: small data, inverted images, and accuracy computed by hand."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from smi_fast.cli import main
from smi_fast.models import CIFAR10_CLASSES


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with a training and a test split of two random images of each class."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in CIFAR10_CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def inverted(tmp_path_factory):
    """The folder that smi-fast invert wrote, with half of the patches of 20 images."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("inverted") / "run"
    assert main(["invert", "--iterations", "6", "--stopping", "2:0.5", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def accuracy_by_hand(data):
    """A function that computes a model's accuracy on the test split, whose labels follow the alphabet."""

    def accuracy(model) -> float:
        right = []
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        for label, name in enumerate(sorted(CIFAR10_CLASSES)):
            for file in sorted((data / "test" / name).iterdir()):
                pixels = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(32, 32, 3)
                with torch.no_grad():
                    logits = model((pixels.permute(2, 0, 1)[None] / 255 - mean) / std)
                right.append(int(logits.argmax() == label))
        return sum(right) / len(right)

    return accuracy


@pytest.fixture
def refused(capsys, tmp_path):
    """A function that runs a command which must end in one sentence and exit code 2, and write nothing."""

    def run(arguments: list[str], message: str) -> None:
        out = [] if "--out" in arguments or arguments[0] == "evaluate" else ["--out", str(tmp_path / "out")]
        assert main([*arguments, *out, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("smi-fast: error: ")
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    return run


@pytest.fixture
def stopped(capsys):
    """A function that runs a command in a process of its own, which gets a signal after its first checkpoint. Until it
    has ended, its folder is refused to others. It returns the exit code and what the process said to its error stream.
    """

    def run(arguments: list[str], out: Path, number: signal.Signals) -> tuple[int, str]:
        program = [sys.executable, "-m", "smi_fast", *arguments, "--quiet", "--checkpoint-every", "0.00001"]
        before = _checkpoints(out)
        with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
            while _checkpoints(out) == before:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.001)
            process.send_signal(signal.SIGSTOP)  # so that it is still there when another one comes
            assert main([arguments[0], "--resume", str(out)]) == 2
            assert "is in use by another process" in capsys.readouterr().err
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            error = process.communicate()[1]
        return process.returncode, error

    return run


def _checkpoints(out: Path) -> dict[Path, int]:
    """The checkpoints of a run, and when each was written, in nanoseconds."""
    files = {}
    for file in out.glob("checkpoints/*.state"):
        with suppress(FileNotFoundError):  # the run has just discarded it
            files[file] = file.stat().st_mtime_ns
    return files
