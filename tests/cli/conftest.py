"""What tests of several commands share: small data, inverted images, and accuracy computed by hand."""

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
