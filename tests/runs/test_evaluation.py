"""An evaluation goes on after the last batch, and measures nothing twice; its workers leave signals to it."""

import os
import shutil
import signal
from contextlib import suppress

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from smi_fast.runs.evaluation import contents, evaluate
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped


class InMemory(Dataset):
    """Images as torchvision's CIFAR10 holds them."""

    def __len__(self):
        return len(self.data)


class Counting(nn.Module):
    """Logits that are the images, and the number of images that were seen."""

    seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images


def test_an_evaluation_that_stops_after_every_batch_sees_each_image_once(seed, tmp_path):
    images, labels = torch.randn(11, 3), torch.randint(3, (11,))
    model, test, processes = Counting(), DataLoader(TensorDataset(images, labels), 4), 0
    found = None
    while found is None:
        processes += 1
        with Run(tmp_path / "run", "test", {}) as run, suppress(Stopped):
            run.signals.asked = signal.SIGTERM
            found = evaluate(run, "model", lambda: model, test, progress=False)
    assert processes == 4  # three batches, and the one that finds all of them done
    assert model.seen == 11
    assert found["accuracy"] == (images.argmax(1) == labels).sum().item() / 11
    with Run(tmp_path / "run", "test", {}) as run:
        assert evaluate(run, "model", None, test, progress=False) == found


def test_a_data_loaders_worker_leaves_signals_to_its_parent(tmp_path):
    """Ctrl-C in a terminal reaches the workers too, which have the handlers of the process that forked them."""
    with Run(tmp_path / "run", "test", {}) as run:
        worker = os.fork()
        if not worker:
            signal.raise_signal(signal.SIGINT)
            os._exit(0 if run.signals.asked is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
        signal.raise_signal(signal.SIGINT)
        assert run.signals.asked == signal.SIGINT


def test_images_are_known_by_their_files_classes_and_labels_and_not_by_their_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "images"
    for name, size in (("cat/0.png", 7), ("cat/1.png", 9), ("dog/0.png", 7)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))

    def known(path, part=None) -> dict:
        data = ImageFolder(str(path))
        return contents(data if part is None else Subset(data, part), "test")

    first = known(folder)
    assert first["test_classes"] == ["cat", "dog"]
    assert first["test_images"] == 3
    other = shutil.copytree(folder, tmp_path / "b" / "images")
    monkeypatch.chdir(other.parent)
    assert known(other) == known("./images") == known("images/") == first
    assert known(folder, [0, 2]) == first | {"test_images": 2}
    labelled = ImageFolder(str(folder))
    labelled.samples = [(file, 1 - label) for file, label in labelled.samples]
    assert contents(labelled, "test")["test_files"] != first["test_files"]
    for change in (
        lambda: (other / "cat" / "0.png").write_bytes(bytes(8)),
        lambda: (other / "cat" / "0.png").rename(other / "cat" / "2.png"),
        lambda: (other / "dog" / "0.png").rename(other / "dog" / "1.png"),
    ):
        before = known(other)
        change()
        assert known(other)["test_files"] != before["test_files"]
    (other / "dog").rename(other / "cow")
    assert known(other)["test_classes"] == ["cat", "cow"]


def test_images_in_memory_are_known_by_their_pixels_and_labels():
    pixels = torch.randint(0, 256, (4, 2, 2, 3), dtype=torch.uint8).numpy()
    data = InMemory()
    data.data, data.targets, data.classes = pixels, [0, 1, 1, 0], ["cat", "dog"]
    first = contents(data, "test")
    data.targets[0] = 1
    assert contents(data, "test")["test_files"] != first["test_files"]
    data.targets[0] = 0
    assert contents(data, "test") == first
    pixels[0, 0, 0, 0] ^= 1
    assert contents(data, "test")["test_files"] != first["test_files"]
