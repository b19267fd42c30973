"""Folders of PNGs: exported images come back, torchvision reads them, and bad files and names are named."""

import os

import numpy as np
import pytest
import torch
from damage_cases import cuts, flips, read_or_refused
from dataset_cases import make, masked, ragged, sparse_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from smi_fast.data.sparse import InvertedDataset


def to_8_bits(images):
    """(N, H, W, C) uint8, the nearest value of each pixel."""
    return (images.numpy() * np.float32(255) + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1)


@given(case=sparse_images(), named=st.booleans())
@settings(deadline=None, max_examples=40)
def test_exported_images_come_back_to_8_bits(tmp_path_factory, case, named):
    images, keep, targets, patch_size = case
    folder = tmp_path_factory.mktemp("export") / "pngs"
    dark = torch.rand(images.shape, generator=torch.Generator().manual_seed(int(targets[0]))) < 0.5
    dark[:, 0, :: patch_size[0], :: patch_size[1]] = False  # no patch is wholly black
    images = images.clamp(min=0.01).masked_fill(dark, 0)
    names = [f"class {-target}" for target in range(1000)] if named else None
    InvertedDataset.from_images(images, keep, targets, patch_size).export(folder, names)
    read = InvertedDataset.from_image_folder(folder, patch_size, names, metadata={"from": "pngs"})
    order = sorted(range(len(targets)), key=lambda i: (names[targets[i]] if named else int(targets[i]), i))
    assert read.targets.tolist() == targets[order].tolist()
    assert [read[i][1].tolist() for i in range(len(read))] == [sorted(keep[i].tolist()) for i in order]
    pixels = to_8_bits(masked(images, keep, patch_size)[order])
    assert np.array_equal(to_8_bits(read.images()), pixels)
    assert np.array_equal(read.images().permute(0, 2, 3, 1).numpy(), pixels.astype(np.float32) / 255)
    assert read.metadata == {"from": "pngs"}


def test_torchvision_reads_exported_images(seed, tmp_path):
    dataset = ragged(seed, n=12)
    pixels = to_8_bits(dataset.images())
    dataset.export(tmp_path / "numbers")
    dataset.export(tmp_path / "names", [f"class {99 - i}" for i in range(12)])
    for folder, targets in (("numbers", range(12)), ("names", reversed(range(12)))):
        read = ImageFolder(str(tmp_path / folder))
        assert len(read) == 12
        assert [label for _, label in read] == list(range(12))  # numbers sort as numbers
        for (image, _), target in zip(read, targets, strict=True):
            assert np.array_equal(np.asarray(image), pixels[target])
    assert (tmp_path / "names" / "class 96" / "03.png").is_file()


@pytest.mark.parametrize(
    ("folders", "class_names", "targets"),
    [
        (["207", "0281"], None, [281, 207]),
        (["dog", "cat"], None, [0, 1]),
        (["7", "cat"], None, [0, 1]),
        (["dog", "cat"], ["bird", "dog", "cat"], [2, 1]),
    ],
)
def test_class_folders_are_numbers_or_names(tmp_path, folders, class_names, targets):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), "white").save(tmp_path / name / "a.png")
    assert InvertedDataset.from_image_folder(tmp_path, (2, 2), class_names).targets.tolist() == targets


def test_export_is_all_or_nothing_and_replaces_nothing(seed, tmp_path, monkeypatch):
    dataset = make(seed, n=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    dataset.export(tmp_path / "empty")
    for existing in ("full", "empty", "full/notes.txt"):
        with pytest.raises(FileExistsError, match=f"{existing} exists already"):
            dataset.export(tmp_path / existing)
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        dataset.export(tmp_path / "missing" / "pngs")
    save, saved = Image.Image.save, []

    def interrupt(image, path):
        save(image, path)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dataset.export(tmp_path / "pngs")
    assert len(saved) == 3
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_export_does_not_write_through_a_link(seed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name, goal in (("link", "elsewhere"), ("broken", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / goal)
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            make(seed).export(tmp_path / name)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert sorted(os.listdir(tmp_path)) == ["broken", "elsewhere", "link"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(class_names=["cat", "dog"]), "class 2 is not among 2 class_names"),
        (dict(class_names=["cat", "a/b", "dog"]), "class 1 is called 'a/b', which no folder can be"),
        (dict(class_names=["cat", "..", "dog"]), "class 1 is called '..', which no folder can be"),
        (dict(class_names=["", "cat", "dog"]), "class 0 is called '', which no folder can be"),
        (dict(class_names=["/tmp", "cat", "dog"]), "class 0 is called '/tmp', which no folder can be"),
        (dict(class_names=["cat", "../cat", "dog"]), "class 1 is called '../cat', which no folder can be"),
        (dict(class_names=["cat", ".", "dog"]), "class 1 is called '.', which no folder can be"),
        (dict(class_names=["cat", "dog/", "dog"]), "class 1 is called 'dog/', which no folder can be"),
        (dict(class_names=["a\0b", "cat", "dog"]), r"class 0 is called 'a\\x00b', which no folder can be"),
        (dict(class_names=["cat", "crane", "crane"]), "class 1 is called 'crane', and so is another"),
        (dict(targets=torch.tensor([0, -1, 2])), "class -1 is not among the numbers from 0"),
        (dict(channels=2), "PNGs have 1 or 3 channels, these images have 2"),
    ],
)
def test_export_names_what_cannot_be_a_picture_or_a_folder(tmp_path, change, message):
    images = torch.rand(3, change.get("channels", 3), 4, 4)
    keep, targets = torch.arange(4).expand(3, -1), change.get("targets", torch.arange(3))
    dataset = InvertedDataset.from_images(images, keep, targets, (2, 2))
    with pytest.raises(ValueError, match=message):
        dataset.export(tmp_path / "pngs", change.get("class_names"))
    assert os.listdir(tmp_path) == []


def test_a_damaged_picture_in_a_folder_never_gives_other_pixels(seed, tmp_path):
    images = torch.rand(2, 3, 8, 8)
    InvertedDataset.from_images(images, None, torch.arange(2), (4, 4)).export(tmp_path / "pngs")
    (path,) = (tmp_path / "pngs" / "1").iterdir()
    expected = InvertedDataset.from_image_folder(tmp_path / "pngs", (4, 4))
    data = path.read_bytes()
    for damaged in [damaged for _, damaged in flips(data, seed, 80)] + cuts(data[:-12], seed, 10):
        path.write_bytes(damaged)
        read = read_or_refused(lambda _: InvertedDataset.from_image_folder(tmp_path / "pngs", (4, 4)), path)
        assert read is None or torch.equal(read.patches, expected.patches)


def test_import_names_a_bad_picture_or_folder(tmp_path):
    good = Image.effect_noise((4, 4), 50).convert("RGB").point(lambda value: value | 1)
    (tmp_path / "pngs" / "cat").mkdir(parents=True)
    bad = tmp_path / "pngs" / "cat" / "b.png"
    good.save(bad.with_name("a.png"))
    whole = bad.with_name("a.png").read_bytes()

    def read(message, error=ValueError, patch_size=(2, 2), class_names=None):
        with pytest.raises(error, match=message) as caught:
            InvertedDataset.from_image_folder(tmp_path / "pngs", patch_size, class_names)
        assert "\n" not in str(caught.value)

    read("images of 4x4 pixels are not divided by patches of 3x2", patch_size=(3, 2))
    read("the class folder 'cat' is 0 times in class_names", class_names=["dog"])
    read("the class folder 'cat' is 2 times in class_names", class_names=["cat", "cat"])
    Image.new("RGB", (4, 4)).save(bad)
    read(rf"^{bad}: the image is wholly black")
    Image.new("RGB", (6, 4), "white").save(bad)
    read(rf"^{bad}: the image is \(3, 4, 6\), the first one \(3, 4, 4\)")
    for broken in (b"", b"no picture", whole[: len(whole) // 2], whole[:40]):
        bad.write_bytes(broken)
        read(rf"^{bad}: cannot be read as an image")
    bad.unlink()
    (tmp_path / "pngs" / "dog").mkdir()
    read("no valid file for the classes dog", FileNotFoundError)
    for name in ("cat/a.png", "cat", "dog"):
        path = tmp_path / "pngs" / name
        path.rmdir() if path.is_dir() else path.unlink()
    read("find any class folder", FileNotFoundError)
    (tmp_path / "pngs").rmdir()
    read("pngs", FileNotFoundError)
