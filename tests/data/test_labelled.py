"""Labelled images: pixels and labels as the model needs them, in every layout of folders; and accuracy."""

import socket
import urllib.error

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

import smi_fast
from smi_fast.data.files import read_image
from smi_fast.data.labelled import accuracy, download_data, load_data
from smi_fast.models import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, cifar10_vit

PLAIN_NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay")


@pytest.fixture
def model(seed) -> torch.nn.Module:
    return cifar10_vit(pretrained=False, depth=1, embed_dim=24)


def write_classes(folder, names, count=2, size=(32, 32)) -> dict[str, np.ndarray]:
    """Write `count` random images for each class, and return them by class, uint8 (count, H, W, 3)."""
    pixels = {name: np.random.default_rng().integers(0, 256, (count, *size, 3), dtype=np.uint8) for name in names}
    for name, images in pixels.items():
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{number}.png")
    return pixels


def test_images_of_the_models_size_are_only_normalised(model, tmp_path):
    pixels = write_classes(tmp_path, PLAIN_NAMES)
    dataset = load_data(tmp_path, model=model)
    assert len(dataset) == 20
    mean, std = np.array(CIFAR10_MEAN), np.array(CIFAR10_STD)
    for number, (image, label) in enumerate(dataset):
        expected = (pixels[PLAIN_NAMES[number // 2]][number % 2] / 255 - mean) / std
        assert label == number // 2
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, torch.from_numpy(expected).permute(2, 0, 1).float(), rtol=1e-5, atol=1e-5)


def test_other_images_are_scaled_and_cropped_like_timms(seed, tmp_path):
    """PIL alone scales to 160 / 0.95 = 168 pixels (bicubic) and crops the middle 160. The model is accelerated."""
    model = timm.create_model("test_vit", num_classes=1).eval()
    [image] = write_classes(tmp_path, ["all"], 1, (200, 200))["all"]
    config = model.pretrained_cfg
    assert (config["crop_pct"], config["interpolation"]) == (0.95, "bicubic")
    scaled = np.asarray(Image.fromarray(image).resize((168, 168), Image.Resampling.BICUBIC))[4:164, 4:164]
    expected = (torch.from_numpy(scaled / 255).permute(2, 0, 1) - 0.5) / 0.5
    [(found, _)] = load_data(tmp_path, model=smi_fast.accelerate(model))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("test_folder", "split", "expected"), [("test", "test", 3), ("val", "test", 3), ("val", "train", 1)]
)
def test_a_split_has_its_folder(model, tmp_path, test_folder, split, expected):
    write_classes(tmp_path / "train", PLAIN_NAMES, 1)
    write_classes(tmp_path / test_folder, PLAIN_NAMES, 3)
    assert len(load_data(tmp_path, split=split, model=model)) == 10 * expected


def test_a_class_may_be_called_train(model, tmp_path):
    write_classes(tmp_path, [*PLAIN_NAMES[:9], "train"], 1)
    assert [label for _, label in load_data(tmp_path, model=model)] == list(range(10))


def test_labels_follow_the_models_class_names(model, tmp_path):
    model.pretrained_cfg["label_names"] = tuple(reversed(CIFAR10_CLASSES))
    write_classes(tmp_path, CIFAR10_CLASSES, 1)
    dataset = load_data(str(tmp_path), model=model)
    assert [label for _, label in dataset] == dataset.targets == list(range(9, -1, -1))


def test_classes_may_be_missing(model, tmp_path):
    write_classes(tmp_path, ["truck", "cat"], 1)
    assert [label for _, label in load_data(tmp_path, model=model)] == [3, 9]


def test_a_named_data_set_has_torchvisions_split(model, tmp_path, monkeypatch):
    asked = []

    class Fake(torch.utils.data.TensorDataset):
        classes = list(CIFAR10_CLASSES)

        def __init__(self, root, transform, **which):
            asked.append((root, which))
            super().__init__(torch.zeros(1))

    for name in ("CIFAR10", "ImageNet"):
        monkeypatch.setattr(datasets, name, Fake)
        for split in ("train", "test"):
            load_data(name.lower(), tmp_path, split=split, model=model)
    which = [{"train": True}, {"train": False}]
    which += [{"split": split, "loader": read_image} for split in ("train", "val")]  # refuses pictures of unusual size
    assert asked == [(str(tmp_path), of) for of in which]


def test_a_data_set_is_downloaded_by_torchvision_or_says_what_to_do_without_a_network(tmp_path, monkeypatch):
    asked = []

    def fake(root, download):
        asked.append((root, download, socket.getdefaulttimeout()))
        if len(asked) > 1:
            raise urllib.error.URLError("no route")

    monkeypatch.setattr(datasets, "CIFAR10", fake)
    before = socket.getdefaulttimeout()
    download_data("cifar-10", tmp_path)
    with pytest.raises(ValueError, match=r"CIFAR10 cannot be downloaded: .*no route.*; without a network, copy"):
        download_data("CIFAR10", tmp_path)
    assert [given[:2] for given in asked] == [(str(tmp_path), True)] * 2
    assert all(0 < given[2] < 60 for given in asked)
    assert socket.getdefaulttimeout() == before
    for name in ("ImageNet", "pictures"):
        with pytest.raises(ValueError, match=f"{name} cannot be downloaded, only CIFAR10 and CIFAR100 can"):
            download_data(name, tmp_path)


def test_what_cannot_be_data_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"CIFAR10 cannot be read from .*not found or corrupted"):
        load_data("CIFAR10", tmp_path, model=model)
    with pytest.raises(ValueError, match="ImageNet cannot be read from "):
        load_data("ImageNet", tmp_path, model=model)
    with pytest.raises(ValueError, match="CIFAR100 needs root"):
        load_data("CIFAR100", model=model)
    with pytest.raises(ValueError, match="MNIST is no data set known by name, such as CIFAR10"):
        load_data("MNIST", tmp_path, model=model)
    with pytest.raises(ValueError, match="nowhere is neither a folder nor one of CIFAR10"):
        load_data(tmp_path / "nowhere", model=model)
    with pytest.raises(ValueError, match="holds no folders of classes"):
        load_data(tmp_path, model=model)
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        load_data(tmp_path, split="val", model=model)
    write_classes(tmp_path / "train", PLAIN_NAMES[:7], 1)
    with pytest.raises(ValueError, match="holds classes in train, but in no test or val"):
        load_data(tmp_path, model=model)
    with pytest.raises(ValueError, match="has 7 classes, the model has 10"):
        load_data(tmp_path / "train", model=model)
    (tmp_path / "train" / "yak").mkdir()
    with pytest.raises(ValueError, match="no valid file for the classes yak"):
        load_data(tmp_path, split="train", model=model)


def test_a_picture_that_cannot_be_read_is_named(model, tmp_path, monkeypatch):
    write_classes(tmp_path, ["truck", "cat"], 1)
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    dataset = load_data(tmp_path, model=model)
    with pytest.raises(ValueError, match=r"cat/0\.png: cannot be read as an image"):
        dataset[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # of 32x32, more than twice as many
    with pytest.raises(ValueError, match=r"truck/0\.png: cannot be read as an image .*exceeds limit"):
        dataset[1]


def test_a_package_that_torchvision_lacks_is_named(model, tmp_path, monkeypatch):
    def imagenet(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(datasets, "ImageNet", imagenet)
    with pytest.raises(ValueError, match=r"ImageNet cannot be read from .*: torchvision needs scipy for it"):
        load_data("imagenet", tmp_path, model=model)


def test_accuracy_is_the_share_of_right_images(model, tmp_path):
    write_classes(tmp_path, PLAIN_NAMES, 3)
    dataset = load_data(tmp_path, model=model)
    with torch.no_grad():
        right = [int(model(image[None]).argmax()) == label for image, label in dataset]
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert accuracy(model, DataLoader(dataset, batch_size=7), progress=False) == sum(right) / 30
    assert [module.training for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_accuracy_takes_a_function_and_uneven_batches(seed):
    logits, labels = torch.rand(10, 4), torch.randint(4, (10,))
    batches = list(zip(logits.split([7, 3]), labels.split([7, 3]), strict=True))
    expected = np.mean(logits.numpy().argmax(1) == labels.numpy())
    assert accuracy(lambda x: x, batches, progress=False) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no images"):
        accuracy(lambda x: x, [], progress=False)
