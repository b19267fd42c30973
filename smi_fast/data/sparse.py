"""InvertedDataset: sparse images of which only the kept patches are stored, and transforms of their patches."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smi_fast.data.files import PARTIAL, checksum
from smi_fast.data.manifest import IMAGES, MANIFEST, planned_images
from smi_fast.data.pngs import read_pngs, write_pngs
from smi_fast.data.shards import INDEX, KIND, Shard, check_tensor, describe, open_shard, write_shard
from smi_fast.data.tensors import SUFFIX, new_file
from smi_fast.grid import PatchGrid
from smi_fast.kernels.rows import cumulative_lengths
from smi_fast.packed import Keep, PackedTokens, pack_keep

Sample = tuple[Tensor, Tensor, int]


class InvertedDataset(torch.utils.data.Dataset):
    """N inverted images of which only the kept patches are stored.

    A sample is `(patches (K, C * ph * pw) float32, positions (K,) int32, target int)` on the CPU, in memory of its own.
    K may differ between images. `DataLoader(dataset, collate_fn=...)` makes batches of samples. With `collate` they are
    packed, and have a view (B, K, C * ph * pw) if all images keep equally many patches. With `collate_images` they are
    whole images.

    Images have a fixed order, so that `DataLoader(dataset, shuffle=True, generator=torch.Generator().manual_seed(s))`
    gives the same batches with any number of workers. The exception is `persistent_workers`, with which the loader
    draws fewer numbers from its generator. If the order must depend only on seed and epoch, for example to resume,
    use torch's sampler: `DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0, seed=s))` and its `set_epoch`.

    Args:
        patches: (T, C * ph * pw) float32, the kept patches of all images end to end: pixels in [0, 1], each patch in
            (C, ph, pw) order. `load` gives a `Shard`, which reads them from a file.
        positions: (T,) int32, the index of each patch in the grid of its image, row-major from 0.
        cu_seqlens: (N + 1,) int32, cumulative number of patches: image i is `patches[cu_seqlens[i]:cu_seqlens[i + 1]]`.
        targets: (N,) int64 class labels.
        image_size: (C, H, W).
        patch_size: (ph, pw), which divides (H, W).
        metadata: how the images were made (model, mean, std, stopping schedule, seed, versions). It is converted as if
            saved to JSON and read again: tuples become lists, and keys become strings.

    Attributes:
        grid: the `PatchGrid` of the images.
        transform: a function that is applied to every sample that `dataset[i]` returns, such as
            `RandomHorizontalFlip`, or None. It is neither saved nor exported.
        missing: the number of images that are yet to be made, if `load` has read folders of runs.

    Raises:
        ValueError: the shapes, dtypes or values of the tensors contradict each other. The message names the first
            contradiction.
        TypeError: `metadata` has no JSON form.
    """

    image_size: tuple[int, int, int]
    patch_size: tuple[int, int]
    transform: Callable[[Sample], Sample] | None = None
    missing = 0

    def __init__(
        self,
        patches: Tensor | Shard,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        image_size: tuple[int, int, int],
        patch_size: tuple[int, int],
        metadata: dict | None = None,
    ):
        shard = patches if isinstance(patches, Shard) else Shard(patches.detach())
        self.grid = _grid(image_size, patch_size)
        total, images = positions.numel(), targets.numel()
        check_tensor("patches", shard.patches, torch.float32, (total, image_size[0] * patch_size[0] * patch_size[1]))
        check_tensor("positions", positions, torch.int32, (total,))
        check_tensor("targets", targets, torch.int64, (images,))
        check_tensor("cu_seqlens", cu_seqlens, torch.int32, (images + 1,))
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total:
            raise ValueError(f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}, not from 0 to {total}")
        _check_positions(positions, cu_seqlens.long().diff(), self.grid.num_patches)
        self.positions, self.cu_seqlens, self.targets = positions, cu_seqlens, targets
        self.image_size, self.patch_size = tuple(image_size), tuple(patch_size)
        self.metadata = json.loads(json.dumps(metadata or {}))
        self._shards, self._first_images = [shard], [0]

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        keep: Keep | None,
        targets: Tensor,
        patch_size: tuple[int, int],
        metadata: dict | None = None,
    ) -> InvertedDataset:
        """Make a dataset, on the CPU, of the kept patches of whole images.

        Args:
            images: (N, C, H, W) float32 in [0, 1]. Pixels outside the kept patches are ignored.
            keep: patch indices (N, K), a boolean mask (N, patches), a list of N index tensors, or None for all patches;
                see `pack_keep`.
            targets: (N,) int64 class labels.
            patch_size: (ph, pw), which divides (H, W).
            metadata: see the class.

        Raises:
            ValueError: a tensor has a wrong shape or dtype, an image keeps no patch, a patch is named twice or lies
                outside the grid, or a kept pixel lies outside [0, 1], for example because it is still normalised.
        """
        if images.ndim != 4 or images.dtype != torch.float32:
            raise ValueError(f"images must be (N, C, H, W) float32, not {describe(images)}")
        image_size = tuple(images.shape[1:])
        grid = _grid(image_size, patch_size)
        check_tensor("targets", targets, torch.int64, (len(images),))
        kept = pack_keep(keep, len(images), grid.num_patches, images.device).to("cpu")
        patches = grid.gather(images.detach().cpu(), kept)
        outside = ~((patches > -1e-4) & (patches < 1 + 1e-4)).all(1)  # room for the rounding of a de-normalisation
        if outside.any():
            raise ValueError(f"image {kept.owners()[outside.nonzero()[0, 0]]} has kept pixels outside [0, 1]")
        positions, cu_seqlens = kept.positions.clone(), kept.cu_seqlens
        return cls(patches, positions, cu_seqlens, targets.cpu().clone(), image_size, patch_size, metadata)

    @classmethod
    def from_image_folder(
        cls,
        folder: str | os.PathLike,
        patch_size: tuple[int, int],
        class_names: Sequence[str] | None = None,
        metadata: dict | None = None,
    ) -> InvertedDataset:
        """Read the images that torchvision's ImageFolder finds, such as `folder/<class>/.../<name>.png`, in its order.

        A patch that is completely black counts as stopped, which works for lossless formats, such as PNG. Kept patches
        are in row-major order. Images that `export` has written are read back rounded to 8 bits and in the order of
        their classes.

        Args:
            patch_size: (ph, pw), which divides the (H, W) of the images.
            class_names: the class of a folder is the index of its name in this list. None: the class is the number that
                is the folder's name or, if one of the names is not a number, the index of the name among the sorted
                names, as in ImageFolder.
            metadata: see the class.

        Raises:
            FileNotFoundError: there is no folder, it holds no class folders, or one of them holds no images.
            ValueError: a file cannot be read, has another size than the first or is completely black, or `class_names`
                does not hold the name of a class folder exactly once.
        """
        patches, positions, targets = [], [], []
        for file, pixels, target in read_pngs(folder, class_names):
            tiles = _grid(tuple(pixels.shape), patch_size).tiles(pixels[None]).flatten(3)[0].flatten(0, 1)
            kept = tiles.any(1).nonzero().flatten()
            if len(kept) == 0:
                raise ValueError(f"{file}: the image is wholly black, and an image needs at least one patch")
            patches.append(tiles[kept].float() / 255)
            positions.append(kept)
            targets.append(target)
        kept = PackedTokens.from_sequences(patches, positions)
        targets = torch.tensor(targets)
        return cls(kept.values, kept.positions, kept.cu_seqlens, targets, tuple(pixels.shape), patch_size, metadata)

    def export(self, folder: str | os.PathLike, class_names: Sequence[str] | None = None) -> None:
        """Write whole images as 8-bit PNGs, `folder/<class>/<number of the image>.png`: all of them, or nothing.

        torchvision's ImageFolder reads them, and so does `from_image_folder`. Stopped patches are black. The folder of
        a class has its name or, without `class_names`, its number with leading zeros, so that the folders sort by it.

        Raises:
            ValueError: the images do not have 1 or 3 channels, or a class has no name, the name of another class, or a
                name that no folder can have.
            FileExistsError: `folder` exists and is not an empty folder.
            FileNotFoundError: the parent folder of `folder` does not exist.
        """
        images = (self.images([number])[0] for number in range(len(self)))
        write_pngs(folder, images, self.targets.tolist(), class_names)

    @property
    def files(self) -> list[Path]:
        """The files that the images were loaded from, in the order of the images."""
        return [shard.file for shard in self._shards if shard.file is not None]

    @property
    def patches(self) -> Tensor:
        """(T, C * ph * pw) float32, the kept patches of all images end to end.

        They are not compared with their checksums. The patches of a single file are mapped from it. The patches of
        several files are copied into memory.
        """
        parts = [shard.patches for shard in self._shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        sample = self._sample(index)
        return sample if self.transform is None else self.transform(sample)

    def _sample(self, index: int) -> Sample:
        """Return a copy of the stored sample. A worker that sends a copy does not send the mapped file with it."""
        index = range(len(self))[operator.index(index)]
        start, end = self.cu_seqlens[index : index + 2].tolist()
        number = bisect_right(self._first_images, index) - 1
        first = self._first_images[number]
        offset = int(self.cu_seqlens[first])
        patches = self._shards[number].read(index - first, slice(start - offset, end - offset))
        return patches, self.positions[start:end].clone(), int(self.targets[index])

    def images(self, indices: Iterable[int] | None = None, stopped: float = 0.0) -> Tensor:
        """Return whole images (n, C, H, W) float32.

        Args:
            indices: the indices of the images, in the order in which they are returned. None: all images.
            stopped: the value of the pixels of stopped patches, which are black (0) unless another is given.

        Raises:
            IndexError: an index is out of range.
        """
        samples = [self._sample(i) for i in (range(len(self)) if indices is None else indices)]
        if not samples:
            return torch.zeros(0, *self.image_size)
        tokens, _ = self.collate(samples)
        return self.grid.scatter(tokens.values, tokens, torch.full((len(samples), *self.image_size), stopped))

    @staticmethod
    def collate(samples: list[Sample]) -> tuple[PackedTokens, Tensor]:
        """Make a packed batch: the samples' patches, with values (T, C * ph * pw), and targets (B,) int64."""
        patches, positions, targets = zip(*samples, strict=True)
        return PackedTokens.from_sequences(patches, positions), torch.tensor(targets, dtype=torch.int64)

    def collate_images(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Make a batch of whole images: (B, C, H, W) float32 with stopped patches black, and targets (B,) int64."""
        tokens, targets = self.collate(samples)
        return self.grid.scatter(tokens.values, tokens, torch.zeros(len(samples), *self.image_size)), targets

    def check_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Check that the images were made for a model with this normalisation, as far as `metadata` says.

        Raises:
            ValueError: `metadata` holds a mean or std that differs by more than 1e-6. The message names both.
        """
        for name, theirs in (("mean", list(mean)), ("std", list(std))):
            ours = self.metadata.get(name) or theirs
            if np.shape(ours) != np.shape(theirs) or not np.allclose(ours, theirs, rtol=0, atol=1e-6):
                raise ValueError(f"the images were made for a model of {name} {ours}, this one has {name} {theirs}")

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the dataset to one `.safetensors` file: complete, or not at all.

        The file's tensors are patches, positions, cu_seqlens and targets as for the class, and checksums (N,) int64,
        the CRC-32 of the patches of each image. The entry "smi_fast" of its header is a JSON object with the entries
        format_version, image_size, patch_size, metadata and checksum. The checksum is the CRC-32 of the other entries
        (as Python's `json.dumps(entries, sort_keys=True)`) followed by the bytes of positions, cu_seqlens, targets and
        checksums.

        Raises:
            ValueError: `path` does not end in .safetensors, or the dataset was loaded from a file that is damaged.
            FileExistsError: `path` exists and `overwrite` is false.
            FileNotFoundError: the folder of `path` does not exist.
        """
        path = new_file(path, KIND, overwrite)
        checksums = [checksum(self._sample(i)[0]) for i in range(len(self))]
        index = {name: getattr(self, name) for name in INDEX}
        header = {name: getattr(self, name) for name in ("image_size", "patch_size", "metadata")}
        write_shard(path, self.patches, checksums, index, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> InvertedDataset:
        """Read a file, the folder of a run, or all `*.safetensors` files in a folder and those below it, sorted by
        path, as one dataset. Of the folder of a run, only the files of its images are read.

        Several runs can thus add to one dataset: each saves a file of its own below the folder. Images keep their
        indices if later files have later names. Only metadata entries on which all files agree are kept.

        Header and index (positions, lengths, targets, checksums) are read and checked immediately. Patches stay on
        disk, mapped into memory. Whenever an image is requested, its patches are read and compared with their checksum;
        `verify` does so for all images. Files of format version 1 have no checksums. A pickled dataset, for example in
        a DataLoader's worker, does not contain the patches but opens its files again.

        Raises:
            FileNotFoundError: there is no such file, or no dataset in the folder, or none yet.
            ValueError: a file is truncated, damaged, foreign, inconsistent or of a newer format, or its image_size,
                patch_size, mean or std differs from the first file's. The message names the file and what is wrong.
        """
        path = Path(path)
        files, planned = _files(path)
        if not files:
            none = f"none of the {sum(planned.values())} images of its run yet" if planned else f"no {SUFFIX} file"
            raise FileNotFoundError(f"{path}: the folder holds {none}")
        parts, missing = [], planned
        for file in files:
            with open_shard(file) as (shard, arguments):
                parts.append(cls(shard, **arguments))
                parts[0]._check_joins(parts[-1], files[0].relative_to(path))
                parts[0].metadata = parts[-1].metadata = _common(parts[0].metadata, parts[-1].metadata)
                if file.parent.parent in missing:
                    missing[file.parent.parent] -= len(parts[-1])
        dataset = parts[0].join(parts)
        dataset.missing = sum(max(0, count) for count in missing.values())
        if dataset.missing:
            what = f"{path} holds {len(dataset)} of {len(dataset) + dataset.missing} images"
            warnings.warn(f"{what}, because its run is not finished", stacklevel=2)
        return dataset

    def _check_joins(self, other: InvertedDataset, name: Path) -> None:
        """Check that another file may belong to one dataset with this file, which is called `name`."""
        for key, ours, theirs in (
            ("image_size", self.image_size, other.image_size),
            ("patch_size", self.patch_size, other.patch_size),
            ("mean", self.metadata.get("mean"), other.metadata.get("mean")),
            ("std", self.metadata.get("std"), other.metadata.get("std")),
        ):
            if ours != theirs:
                raise ValueError(f"{key} is {theirs}, but {ours} in {name}")

    def join(self, parts: Sequence[InvertedDataset]) -> InvertedDataset:
        """Extend this dataset, the first of the parts, to the images of all parts, and return it."""
        for part in parts:
            self.metadata = _common(self.metadata, part.metadata)
        self._first_images = cumulative_lengths(torch.tensor([len(part) for part in parts]))[:-1].tolist()
        self._shards = [shard for part in parts for shard in part._shards]
        self.cu_seqlens = cumulative_lengths(torch.cat([part.cu_seqlens.diff() for part in parts]))
        self.positions = torch.cat([part.positions for part in parts])
        self.targets = torch.cat([part.targets for part in parts])
        return self

    def verify(self) -> None:
        """Read all patches once and compare them with their checksums.

        Raises:
            ValueError: a file is damaged. The message names the file and its first damaged image.
        """
        for index in range(len(self)):
            self._sample(index)


class RandomHorizontalFlip:
    """A dataset's `transform` that mirrors samples left-right: the pixels of their patches, and the positions.

    In a DataLoader's worker process, copies of one generator would give the same numbers in each worker and each epoch.
    There the numbers come from torch's global generator, which the DataLoader seeds for each worker from its own
    `generator`. If you pass that generator here too, it decides the flips with and without workers.

    Args:
        image_size, patch_size: (C, H, W) and (ph, pw) of the dataset.
        p: the probability with which a sample is mirrored.
        generator: the source of random numbers. None: torch's global generator.

    Raises:
        ValueError: `p` is not a probability, or the patches do not divide the image.
    """

    def __init__(
        self,
        image_size: tuple[int, int, int],
        patch_size: tuple[int, int],
        p: float = 0.5,
        generator: torch.Generator | None = None,
    ):
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in [0, 1], not {p}")
        self.grid, self.channels = _grid(image_size, patch_size), image_size[0]
        self.p, self.generator = p, generator

    def __getstate__(self) -> dict:
        return self.__dict__ | {"generator": None}  # workers have no use for it, and torch fails to send it to them

    def __call__(self, sample: Sample) -> Sample:
        generator = self.generator if torch.utils.data.get_worker_info() is None else None
        if torch.rand((), generator=generator) >= self.p:
            return sample
        patches, positions, target = sample
        patches = patches.unflatten(1, (self.channels, *self.grid.patch_size)).flip(-1).flatten(1)
        return patches, self.grid.mirrored(positions), target


def normalize_patches(tokens: PackedTokens, mean: Sequence[float], std: Sequence[float]) -> PackedTokens:
    """Normalise a packed batch of pixels in [0, 1], such as `InvertedDataset.collate` gives: (x - mean) / std.

    Args:
        tokens: values (T, C * ph * pw) of a floating-point dtype, each patch in (C, ph, pw) order.
        mean, std: one number for each of the C channels.

    Raises:
        ValueError: mean and std differ in length, or the patches do not have that many channels.
    """
    pixels = tokens.values.shape[1]
    if len(mean) != len(std) or not len(mean) or pixels % len(mean):
        raise ValueError(f"mean {list(mean)} and std {list(std)} do not fit patches of {pixels} values")
    mean, std = (tokens.values.new_tensor(v)[:, None] for v in (mean, std))
    values = (tokens.values.unflatten(1, (len(mean), -1)) - mean) / std
    return dataclasses.replace(tokens, values=values.flatten(1))


def _files(path: Path) -> tuple[list[Path], dict[Path, int]]:
    """Return the files of a dataset, and how many images there are to be in the folder of each run among them."""
    if not path.is_dir():
        return [path], {}
    folders = [Path(root) for root, _, _ in os.walk(path)]
    folders = [folder for folder in folders if not any(map(PARTIAL.fullmatch, folder.relative_to(path).parts))]
    runs = [folder for folder in folders if (folder / MANIFEST).exists()]
    if path in runs:
        folders, runs = [path / IMAGES], [path]
    # the folder of a run may hold other tensors beside its images
    files = (file for folder in folders if folder not in runs for file in folder.glob(f"*{SUFFIX}"))
    return sorted(files), {run: planned_images(run) for run in runs}


def _grid(image_size: tuple[int, int, int], patch_size: tuple[int, int]) -> PatchGrid:
    """Return the patch grid of images (C, H, W) after a check of the sizes, which may come from a file."""
    for name, size, length in (("image_size", image_size, 3), ("patch_size", patch_size, 2)):
        is_size = isinstance(size, (tuple, list)) and len(size) == length
        if not (is_size and all(type(n) is int and n > 0 for n in size)):
            raise ValueError(f"{name} must be {length} positive integers, not {size}")
    return PatchGrid.of(image_size[1:], tuple(patch_size))


def _common(metadata: dict, other: dict) -> dict:
    """Return the entries on which two files agree."""
    return {key: value for key, value in metadata.items() if (key, value) in other.items()}


def _check_positions(positions: Tensor, lengths: Tensor, patches: int) -> None:
    """Check that every image has a patch, that every patch lies in the grid, and that no patch is there twice."""
    empty = (lengths < 1).nonzero()
    if len(empty):
        raise ValueError(f"image {empty[0, 0]} has {lengths[empty[0, 0]]} patches, not at least 1")
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    outside = ((positions < 0) | (positions >= patches)).nonzero()
    if len(outside):
        i = outside[0, 0]
        raise ValueError(f"image {owner[i]} has a patch at {positions[i]}, outside its grid of {patches} patches")
    ordered = (owner * patches + positions).sort().values
    twice = ordered[1:][ordered.diff() == 0]
    if len(twice):
        raise ValueError(f"image {twice[0] // patches} has its patch {twice[0] % patches} twice")
