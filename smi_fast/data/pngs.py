"""Images as a folder of PNGs with one folder for each class, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from smi_fast.data.files import atomic_folder, read_image


def write_pngs(
    folder: str | os.PathLike, images: Iterable[Tensor], targets: Sequence[int], class_names: Sequence[str] | None
) -> None:
    """Write images (C, H, W) in [0, 1] of the classes `targets`. `InvertedDataset.export` describes the files."""
    folder = Path(folder)
    names = _folder_names(sorted(set(targets)), class_names)
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not an empty folder")
    digits = len(str(len(targets)))
    with atomic_folder(folder) as partial:
        for name in names.values():
            (partial / name).mkdir()
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            _as_picture(image).save(partial / names[target] / f"{number:0{digits}}.png")


def read_pngs(folder: str | os.PathLike, class_names: Sequence[str] | None) -> Iterator[tuple[str, Tensor, int]]:
    """Yield the file, the pixels and the class of each image, as `InvertedDataset.from_image_folder` describes.

    Pixels are uint8 and all have the same size: (1, H, W) for greyscale images, (3, H, W) for all others.
    """
    found = ImageFolder(str(folder))
    labels, first = _folder_labels(found.classes, class_names), None
    for file, label in found.samples:
        pixels = np.atleast_3d(np.array(read_image(file, ("L", "RGB"))))  # (H, W, C)
        pixels = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        first = first or tuple(pixels.shape)
        if pixels.shape != first:
            raise ValueError(f"{file}: the image is {tuple(pixels.shape)}, the first one {first}")
        yield file, pixels, labels[label]


def _as_picture(image: Tensor) -> Image.Image:
    """Return the image (C, H, W) in [0, 1] as a picture with 8 bits per channel, rounded as torchvision does it."""
    if len(image) not in (1, 3):
        raise ValueError(f"PNGs have 1 or 3 channels, these images have {len(image)}")
    pixels = image.mul(255).add(0.5).clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())  # (H, W) or (H, W, 3)


def _folder_names(targets: Sequence[int], class_names: Sequence[str] | None) -> dict[int, str]:
    """Return the name of the folder of each class."""
    for target in targets:
        if target < 0 or (class_names is not None and target >= len(class_names)):
            names = "the numbers from 0" if class_names is None else f"{len(class_names)} class_names"
            raise ValueError(f"class {target} is not among {names}")
    if class_names is None:
        digits = len(str(max(targets, default=0)))
        return {target: f"{target:0{digits}}" for target in targets}
    names = {target: class_names[target] for target in targets}
    for target, name in names.items():
        if name in ("", "..") or "\0" in name or name != Path(name).name:
            raise ValueError(f"class {target} is called {name!r}, which no folder can be")
        if class_names.count(name) > 1:
            raise ValueError(f"class {target} is called {name!r}, and so is another: leave class_names out")
    return names


def _folder_labels(folders: list[str], class_names: Sequence[str] | None) -> list[int]:
    """Return the class of each folder, the inverse of `_folder_names`."""
    if class_names is None:
        numbers = all(name.isdecimal() for name in folders)
        return [int(name) if numbers else number for number, name in enumerate(folders)]
    for name in folders:
        if class_names.count(name) != 1:
            raise ValueError(f"the class folder {name!r} is {class_names.count(name)} times in class_names, not once")
    return [class_names.index(name) for name in folders]
