"""Labelled images, loaded from a folder or by name and preprocessed for a model, and a model's accuracy on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import datasets

from smi_fast.backbones.base import class_names, frozen
from smi_fast.bars import ProgressBar
from smi_fast.data.files import first_line, read_image
from smi_fast.data.network import impatient

NAMES = ("CIFAR10", "CIFAR100", "ImageNet")
DOWNLOADED = ("CIFAR10", "CIFAR100")  # by torchvision
FOLDERS = {"train": ("train",), "test": ("test", "val")}  # the names that the folder of a split may have


def load_data(
    name_or_folder: str | Path, root: str | Path | None = None, *, split: str = "test", model: nn.Module
) -> Dataset:
    """Load labelled images, preprocessed as timm preprocesses images to evaluate the model.

    Args:
        name_or_folder: CIFAR10, CIFAR100 or ImageNet, as torchvision stores them; or a folder with one folder of images
            for each class (an ImageFolder). The class folders may lie in folders `train` and `test` (or `val`), one for
            each split. If they lie in the folder itself, both splits hold all of its images. If the class folders have
            the names of the model's classes, labels follow the names and classes may be missing. Otherwise labels
            follow the alphabetical order.
        root: the folder in which torchvision keeps the data set of that name. Nothing is downloaded, see
            `download_data`.
        split: "train" or "test". For ImageNet, "test" is the validation split.
        model: a timm model or an `AcceleratedViT`. Its data config says how images are scaled, cropped and normalised,
            and the labels are its classes.

    Returns:
        A data set of samples (image (C, H, W) float32, label int).

    Raises:
        ValueError: the name, split or folder is unknown, `root` is missing or holds no complete data set, or the number
            of classes in the folder is 0 or not the model's. The message names it.
    """
    if split not in FOLDERS:
        raise ValueError(f"split must be train or test, got {split!r}")
    transform = _evaluation_transform(model)
    name = known_name(name_or_folder)
    if root is not None:
        if name is None:
            raise ValueError(f"{name_or_folder!s} is no data set known by name, such as {', '.join(NAMES)}")
        return _by_name(name, Path(root), split, model, transform)
    folder = Path(name_or_folder)
    if folder.is_dir():
        return _from_folder(_split_folder(folder, split), model, transform)
    if name is not None:
        raise ValueError(f"{name} needs root, the folder in which torchvision keeps it")
    raise ValueError(f"{name_or_folder!s} is neither a folder nor one of {', '.join(NAMES)}")


def download_data(name: str, root: str | Path) -> None:
    """Download a data set into the folder in which torchvision keeps it, unless it is there.

    Args:
        name: CIFAR10 or CIFAR100, in capitals or not.
        root: the folder. It is made if it does not exist.

    Raises:
        ValueError: torchvision does not download a data set of this name, or the download fails. The message says why.
    """
    known = known_name(name)
    if known not in DOWNLOADED:
        raise ValueError(f"{known or name} cannot be downloaded, only {' and '.join(DOWNLOADED)} can")
    try:
        with impatient():
            getattr(datasets, known)(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{known} cannot be downloaded: {first_line(error)}; without a network, copy torchvision's files of it to "
            f"{root}, or give a folder of images"
        ) from error


def known_name(name: str | Path) -> str | None:
    """Return a data set's name as torchvision writes it, or None."""
    return {known.lower(): known for known in NAMES}.get(str(name).lower().replace("-", ""))


def _evaluation_transform(model: nn.Module) -> Callable:
    """Return timm's preprocessing of a PIL image for evaluation, at the size that the model takes."""
    config = resolve_data_config(model=model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return create_transform(**config | ({"input_size": (config["input_size"][0], *size)} if size else {}))


def accuracy(
    model: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    progress: bool = True,
    before: tuple[int, int] = (0, 0),
    callback: Callable[[Tensor, int], None] | None = None,
) -> float:
    """Return the share of images whose largest logit is that of their label, in [0, 1].

    Args:
        model: maps images (B, C, H, W) to logits (B, classes). A module is put in evaluation mode for the time, and the
            images are moved to its device.
        loader: yields batches of images and labels (B,), such as a DataLoader.
        progress: show a progress bar.
        before: the numbers of images that were right, and that were seen, before the loader's first batch.
        callback: called with both numbers after every batch. The first is a tensor on the device of the logits.

    Raises:
        ValueError: there are no images.
    """
    is_module, device = isinstance(model, nn.Module), None
    if is_module:
        device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    right, count = before
    with frozen(model) if is_module else nullcontext(), torch.no_grad():
        for images, labels in ProgressBar(loader, "evaluating", shown=progress, unit="batch"):
            logits = model(images.to(device=device))
            # stays on the device, so that nothing waits
            right = right + (logits.argmax(1) == labels.to(logits.device)).sum()
            count += len(labels)
            if callback is not None:
                callback(right, count)
    if not count:
        raise ValueError("there are no images to evaluate on")
    return int(right) / count


def _by_name(name: str, root: Path, split: str, model: nn.Module, transform: Callable) -> Dataset:
    if name == "ImageNet":
        options = {"split": "train" if split == "train" else "val", "loader": read_image}
    else:
        options = {"train": split == "train"}
    try:
        dataset = getattr(datasets, name)(str(root), **options, transform=transform)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} cannot be read from {root}: torchvision needs {error.name} for it") from error
    except Exception as error:  # torchvision and the readers behind it raise a dozen types between them
        reason = first_line(error).removesuffix(" You can use download=True to download it")
        raise ValueError(f"{name} cannot be read from {root}: {reason}") from error
    if len(dataset.classes) != model.num_classes:
        raise ValueError(f"{name} has {len(dataset.classes)} classes, the model has {model.num_classes}")
    return dataset


def _split_folder(folder: Path, split: str) -> Path:
    """Return the folder that holds the class folders. A folder "train" that holds no folders is not a split but a class
    of that name."""
    candidates = {name: folder / name for names in FOLDERS.values() for name in names}
    splits = {name: path for name, path in candidates.items() if path.is_dir() and _folders(path)}
    if not splits:
        return folder
    found = next((splits[name] for name in FOLDERS[split] if name in splits), None)
    if found is None:
        raise ValueError(f"{folder} holds classes in {', '.join(splits)}, but in no {' or '.join(FOLDERS[split])}")
    return found


def _from_folder(folder: Path, model: nn.Module, transform: Callable) -> datasets.ImageFolder:
    if not _folders(folder):
        raise ValueError(f"{folder} holds no folders of classes")
    try:
        dataset = datasets.ImageFolder(str(folder), transform, loader=read_image)
    except FileNotFoundError as error:  # a class without images
        raise ValueError(f"{folder}: {error}") from error
    names = class_names(model)
    if sum(name in dataset.class_to_idx for name in names) == len(dataset.classes):
        dataset.class_to_idx = {name: names.index(name) for name in dataset.classes}
        dataset.samples = [(path, dataset.class_to_idx[dataset.classes[label]]) for path, label in dataset.samples]
        dataset.imgs, dataset.targets = dataset.samples, [label for _, label in dataset.samples]
    elif len(dataset.classes) != model.num_classes:
        raise ValueError(f"{folder} has {len(dataset.classes)} classes, the model has {model.num_classes}")
    return dataset


def _folders(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if child.is_dir()]
