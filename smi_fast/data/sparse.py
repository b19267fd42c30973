"""InvertedDataset: sparse inverted images, in memory and on disk."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import shutil
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.datasets import ImageFolder

from smi_fast.data.files import atomic_write, checksum, read_image
from smi_fast.packed import Keep, PackedTokens, pack_keep

FORMAT_VERSION = 2
HEADER_KEY = "smi_fast"
INDEX = ("positions", "cu_seqlens", "targets")

Sample = tuple[Tensor, Tensor, int]


class InvertedDataset(torch.utils.data.Dataset):
    """N inverted images of which only the kept patches exist.

    A sample is `(patches (K, C * ph * pw) float32, positions (K,) int32, target int)` in memory of its own, on the
    CPU; K may differ between images. `DataLoader(dataset, collate_fn=...)` makes batches of it: `collate` packed ones,
    of which those of equally many patches are also seen as (B, K, C * ph * pw), `collate_images` whole images.

    Images have a fixed order, so that `DataLoader(dataset, shuffle=True, generator=torch.Generator().manual_seed(s))`
    gives the same batches with any number of workers, unless `persistent_workers` draws less from the generator. Where
    the order of an epoch has to follow from seed and epoch alone, as on resuming, torch's sampler does it:
    `DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0, seed=s))` and the sampler's `set_epoch`.

    Args:
        patches: (T, C * ph * pw) float32, the kept patches of all images end to end, pixels in [0, 1], each patch in
            (C, ph, pw) order.
        positions: (T,) int32, the patch's index in its image's grid, row-major from 0.
        cu_seqlens: (N + 1,) int32, cumulative number of patches: image i is `patches[cu_seqlens[i]:cu_seqlens[i + 1]]`.
        targets: (N,) int64 class labels.
        image_size: (C, H, W).
        patch_size: (ph, pw), which divides (H, W).
        metadata: how the images came about (model, mean, std, stopping schedule, seed, versions); kept as JSON gives it
            back, so that tuples become lists and all keys strings.

    Attributes:
        transform: a function of a sample that gives the sample to be had from `dataset[i]`, such as
            `RandomHorizontalFlip`, or None. It is no part of what is saved or exported.

    Raises:
        ValueError: the tensors' shapes, dtypes or values contradict each other; names the first contradiction.
        TypeError: `metadata` has no JSON form.
    """

    transform: Callable[[Sample], Sample] | None = None

    def __init__(
        self,
        patches: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor,
        image_size: tuple[int, int, int],
        patch_size: tuple[int, int],
        metadata: dict | None = None,
    ):
        channels, rows, columns = _grid_size(image_size, patch_size)
        patch_dim = channels * patch_size[0] * patch_size[1]
        total, images = positions.numel(), targets.numel()
        _check_tensor("patches", patches, torch.float32, (total, patch_dim))
        _check_tensor("positions", positions, torch.int32, (total,))
        _check_tensor("targets", targets, torch.int64, (images,))
        _check_tensor("cu_seqlens", cu_seqlens, torch.int32, (images + 1,))
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total:
            raise ValueError(f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}, not from 0 to {total}")
        _check_positions(positions, cu_seqlens.long().diff(), rows * columns)
        self.positions, self.cu_seqlens, self.targets = positions, cu_seqlens, targets
        self.image_size, self.patch_size = tuple(image_size), tuple(patch_size)
        self.metadata = json.loads(json.dumps(metadata or {}))
        self._shards, self._first_images = [_Shard(patches.detach())], [0]

    @classmethod
    def from_images(
        cls,
        images: Tensor,
        keep: Keep,
        targets: Tensor,
        patch_size: tuple[int, int],
        metadata: dict | None = None,
    ) -> InvertedDataset:
        """The kept patches of whole images, on the CPU.

        Args:
            images: (N, C, H, W) float32 in [0, 1]; pixels outside the kept patches are ignored.
            keep: patch indices (N, K), a boolean mask (N, patches), or a list of N index tensors; see `pack_keep`.
            targets: (N,) int64 class labels.
            patch_size: (ph, pw), which divides (H, W).
            metadata: see the class.

        Raises:
            ValueError: a wrong shape or dtype; an image without patches; a patch twice or outside the grid; a kept
                pixel outside [0, 1], such as one that is still normalised.
        """
        if images.ndim != 4 or images.dtype != torch.float32:
            raise ValueError(f"images must be (N, C, H, W) float32, not {_describe(images)}")
        image_size = tuple(images.shape[1:])
        _, rows, columns = _grid_size(image_size, patch_size)
        _check_tensor("targets", targets, torch.int64, (len(images),))
        kept = pack_keep(keep, len(images), rows * columns, images.device)
        positions, cu_seqlens = kept.positions.cpu(), kept.cu_seqlens.cpu()
        owner = torch.arange(len(images)).repeat_interleave(cu_seqlens.diff())
        grid = _patch_grid(images.detach().cpu(), patch_size)
        patches = grid[owner, positions.long() // columns, positions.long() % columns].flatten(1)
        outside = ~((patches > -1e-4) & (patches < 1 + 1e-4)).all(1)  # room for the rounding of a de-normalisation
        if outside.any():
            raise ValueError(f"image {owner[outside.nonzero()[0, 0]]} has kept pixels outside [0, 1]")
        return cls(patches, positions, cu_seqlens, targets.cpu().clone(), image_size, patch_size, metadata)

    @property
    def patches(self) -> Tensor:
        """(T, C * ph * pw) float32, the kept patches of all images end to end, not compared with their checksums:
        mapped from the file where there is one, copied into memory where there are several."""
        parts = [shard.patches for shard in self._shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        sample = self._sample(index)
        return sample if self.transform is None else self.transform(sample)

    def _sample(self, index: int) -> Sample:
        """A sample as it was stored; what is copied does not drag the mapped file along when a worker hands it over."""
        index = range(len(self))[operator.index(index)]
        start, end = self.cu_seqlens[index : index + 2].tolist()
        number = bisect_right(self._first_images, index) - 1
        first = self._first_images[number]
        offset = int(self.cu_seqlens[first])
        patches = self._shards[number].read(index - first, slice(start - offset, end - offset))
        return patches, self.positions[start:end].clone(), int(self.targets[index])

    def images(self, indices: Iterable[int] | None = None) -> Tensor:
        """Whole images (n, C, H, W) float32, stopped patches black (0): those at `indices`, in that order, or all.

        Raises:
            IndexError: an index is out of range.
        """
        samples = [self._sample(i) for i in (range(len(self)) if indices is None else indices)]
        return self.collate_images(samples)[0] if samples else torch.zeros(0, *self.image_size)

    @staticmethod
    def collate(samples: list[Sample]) -> tuple[PackedTokens, Tensor]:
        """B samples as (PackedTokens with values (T, C * ph * pw), targets (B,) int64); a DataLoader's `collate_fn`."""
        patches, positions, targets = zip(*samples, strict=True)
        return PackedTokens.from_sequences(list(patches), list(positions)), torch.tensor(targets, dtype=torch.int64)

    def collate_images(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """B samples as (images (B, C, H, W) float32 with stopped patches black, targets (B,) int64); a DataLoader's
        `collate_fn`."""
        tokens, targets = self.collate(samples)
        images = torch.zeros(len(samples), *self.image_size)
        grid, positions = _patch_grid(images, self.patch_size), tokens.positions.long()
        owner = torch.arange(len(samples)).repeat_interleave(tokens.cu_seqlens.diff())
        columns = grid.shape[2]
        grid[owner, positions // columns, positions % columns] = tokens.values.view(-1, *grid.shape[3:])
        return images, targets

    def check_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Check that the images were made for a model of this normalisation; nothing recorded contradicts nothing.

        Raises:
            ValueError: `metadata` holds a mean or std that differs from this by more than 1e-6; names both.
        """
        for name, theirs in (("mean", list(mean)), ("std", list(std))):
            ours = self.metadata.get(name) or theirs
            if np.shape(ours) != np.shape(theirs) or not np.allclose(ours, theirs, rtol=0, atol=1e-6):
                raise ValueError(f"the images were made for a model of {name} {ours}, this one has {name} {theirs}")

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write one `.safetensors` file: complete, or not at all.

        Its tensors are the constructor's and `checksums` (N,) int64, the CRC-32 of each image's patches. The header's
        entry "smi_fast" is a JSON object: format_version, image_size, patch_size, metadata, and checksum, the CRC-32 of
        the other entries (as Python's `json.dumps(entries, sort_keys=True)`) followed by the bytes of positions,
        cu_seqlens, targets and checksums.

        Raises:
            ValueError: `path` does not end in .safetensors; the patches are read from a damaged file.
            FileExistsError: `path` exists and `overwrite` is false.
            FileNotFoundError: the folder of `path` does not exist.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: the name of a dataset must end in .safetensors")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already; overwrite=True replaces it")
        header = dict(
            format_version=FORMAT_VERSION,
            image_size=self.image_size,
            patch_size=self.patch_size,
            metadata=self.metadata,
        )
        checksums = [checksum(self._sample(i)[0]) for i in range(len(self))]
        tensors = {name: getattr(self, name).contiguous() for name in ("patches", *INDEX)}
        tensors["checksums"] = torch.tensor(checksums, dtype=torch.int64)
        header["checksum"] = _index_checksum(header, tensors)
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata={HEADER_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> InvertedDataset:
        """A file, or all `*.safetensors` in a folder and the folders below it, sorted by path, as one dataset.

        So runs add to a dataset by saving files of their own below one folder; images keep their numbers if later
        files have later names. Of the files' metadata those entries remain on which all agree.

        Header and index (positions, lengths, targets, checksums) are read and checked at once. Patches stay on disk,
        mapped into memory: an image's are read, and compared with their checksum, whenever the image is asked for;
        `verify` does it for all. Files of format version 1 have no checksums. A pickled dataset, such as a worker's,
        opens its files again and does not carry their patches.

        Raises:
            FileNotFoundError: no such file, or no dataset in the folder.
            ValueError: a file is truncated, damaged, foreign, inconsistent, of a newer format, or disagrees with the
                first file in image_size, patch_size, mean or std; names the file and what is wrong.
        """
        path = Path(path)
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: the folder holds no .safetensors file")
        parts = [cls._load_file(file) for file in files]
        first = parts[0]
        if len(parts) == 1:
            return first
        for file, part in zip(files, parts, strict=True):
            for name, ours in first._agreed().items():
                theirs = part._agreed()[name]
                if theirs != ours:
                    raise ValueError(f"{file}: {name} is {theirs}, but {ours} in {files[0].relative_to(path)}")
        lengths = torch.tensor([len(part) for part in parts])
        first.metadata = {
            key: value
            for key, value in first.metadata.items()
            if all(key in part.metadata and part.metadata[key] == value for part in parts)
        }
        first.positions = torch.cat([part.positions for part in parts])
        first.cu_seqlens = _cumulative(torch.cat([part.cu_seqlens.diff() for part in parts]))
        first.targets = torch.cat([part.targets for part in parts])
        first._shards = [part._shards[0] for part in parts]
        first._first_images = _cumulative(lengths)[:-1].tolist()
        return first

    @classmethod
    def _load_file(cls, file: Path) -> InvertedDataset:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(HEADER_KEY)
                header = _parse_header(text)
                index = {name: opened.get_tensor(name).clone() for name in INDEX}
                checksums = None
                if header["format_version"] > 1:
                    checksums, expected = opened.get_tensor("checksums").clone(), header.pop("checksum")
                    if _index_checksum(header, index | {"checksums": checksums}) != expected:
                        raise ValueError("its index does not have the checksum that it was saved with, it is damaged")
                    _check_tensor("checksums", checksums, torch.int64, (index["targets"].numel(),))
                del header["format_version"]
                patches = opened.get_tensor("patches")
                dataset = cls(patches, **index, **header)
                dataset._shards = [_Shard(patches, checksums, file, text)]
                return dataset
        except SafetensorError as error:
            raise ValueError(f"{file}: not a complete dataset ({error})") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def _agreed(self) -> dict:
        """What the files of one dataset have to agree on."""
        return {name: getattr(self, name) for name in ("image_size", "patch_size")} | {
            name: self.metadata.get(name) for name in ("mean", "std")
        }

    def verify(self) -> None:
        """Read all patches once and compare them with their checksums.

        Raises:
            ValueError: a file is damaged; names the file and the first image that is.
        """
        for index in range(len(self)):
            self._sample(index)

    def export(self, folder: str | os.PathLike, class_names: Sequence[str] | None = None) -> None:
        """Write whole images as 8-bit PNGs, `folder/<class>/<number of the image>.png`: all of them, or nothing.

        torchvision's ImageFolder reads it, and so does `from_image_folder`. Stopped patches are black. The folder of a
        class is its name or, without `class_names`, its number, with zeros in front so that all sort by number.

        Raises:
            ValueError: the images have other than 1 or 3 channels; a class without a name, or whose name is that of
                another or cannot be a folder's.
            FileExistsError: `folder` exists and is not an empty folder.
            FileNotFoundError: the folder that is to hold `folder` does not exist.
        """
        folder = Path(folder)
        if self.image_size[0] not in (1, 3):
            raise ValueError(f"PNGs have 1 or 3 channels, these images have {self.image_size[0]}")
        names = _folder_names(self.targets.unique().tolist(), class_names)
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists already and is not an empty folder")
        if not folder.absolute().parent.is_dir():
            raise FileNotFoundError(f"{folder}: the folder {folder.parent} does not exist")
        partial, digits = folder.parent / f".{uuid.uuid4().hex}.partial", len(str(len(self)))
        try:
            partial.mkdir()
            for name in names.values():
                (partial / name).mkdir()
            for index, target in enumerate(self.targets.tolist()):
                pixels = self.images([index])[0].mul(255).add(0.5).clamp(0, 255).byte()  # as torchvision rounds
                picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())  # (H, W) or (H, W, 3)
                picture.save(partial / names[target] / f"{index:0{digits}}.png")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_image_folder(
        cls,
        folder: str | os.PathLike,
        patch_size: tuple[int, int],
        class_names: Sequence[str] | None = None,
        metadata: dict | None = None,
    ) -> InvertedDataset:
        """Images as torchvision's ImageFolder finds them, in its order: `folder/<class>/.../<name>.png` and the like.

        A patch that is wholly black counts as stopped, which takes a format without loss, such as PNG; kept ones are in
        row-major order. What `export` wrote comes back to 8 bits, but for the order.

        Args:
            patch_size: (ph, pw), which divides the images' (H, W).
            class_names: the class of a folder is where its name stands here; None: the number that its name is if all
                are numbers, else where it stands among the sorted names, as for ImageFolder.
            metadata: see the class.

        Raises:
            FileNotFoundError: no folder, no class folders in it, or one without images.
            ValueError: a file that cannot be read, is of another size than the first or wholly black; a class folder
                that `class_names` does not name once.
        """
        found = ImageFolder(str(folder))
        labels = _folder_labels(found.classes, class_names)
        patches, positions, image_size = [], [], None
        for file, _ in found.samples:
            pixels = _read_pixels(file)
            image_size = image_size or tuple(pixels.shape)
            if pixels.shape != image_size:
                raise ValueError(f"{file}: the image is {tuple(pixels.shape)}, the first one {image_size}")
            _grid_size(image_size, patch_size)
            grid = _patch_grid(pixels[None], patch_size).flatten(3)[0].flatten(0, 1)  # [patches, C * ph * pw] uint8
            kept = (grid > 0).any(1).nonzero().flatten()
            if len(kept) == 0:
                raise ValueError(f"{file}: the image is wholly black, and an image needs at least one patch")
            patches.append(grid[kept].float() / 255)
            positions.append(kept.int())
        cu_seqlens = _cumulative(torch.tensor([len(kept) for kept in positions]))
        targets = torch.tensor([labels[number] for number in found.targets])
        return cls(torch.cat(patches), torch.cat(positions), cu_seqlens, targets, image_size, patch_size, metadata)


class RandomHorizontalFlip:
    """A dataset's `transform`: mirrors a sample left-right, the pixels of its patches and their positions.

    Args:
        image_size, patch_size: the dataset's.
        p: the probability.
        generator: what to draw from, None: torch's global one. In a DataLoader's worker, where all would draw the same
            in each epoch from copies of it, draws are from the worker's global one, which DataLoader seeds from its own
            `generator`: give that one here too, and flips follow from it with workers and without.

    Raises:
        ValueError: `p` is no probability; the patches do not tile the image.
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
        channels, _, self.columns = _grid_size(image_size, patch_size)
        self.patch_shape = (channels, *patch_size)
        self.p, self.generator = p, generator

    def __getstate__(self) -> dict:
        return self.__dict__ | {"generator": None}  # workers have no use for it, and torch fails to send it to them

    def __call__(self, sample: Sample) -> Sample:
        generator = self.generator if torch.utils.data.get_worker_info() is None else None
        if torch.rand((), generator=generator) >= self.p:
            return sample
        patches, positions, target = sample
        patches = patches.unflatten(1, self.patch_shape).flip(-1).flatten(1)
        return patches, positions + (self.columns - 1) - 2 * (positions % self.columns), target


def normalize_patches(tokens: PackedTokens, mean: Sequence[float], std: Sequence[float]) -> PackedTokens:
    """A batch of pixels in [0, 1], such as `InvertedDataset.collate` gives, as a model takes it: (x - mean) / std.

    Args:
        tokens: values (T, C * ph * pw) floating point, each patch in (C, ph, pw) order.
        mean, std: C numbers each.

    Raises:
        ValueError: mean and std differ in length, or patches do not have as many channels.
    """
    pixels = tokens.values.shape[1]
    if len(mean) != len(std) or not len(mean) or pixels % len(mean):
        raise ValueError(f"mean {list(mean)} and std {list(std)} do not fit patches of {pixels} values")
    mean, std = (tokens.values.new_tensor(v)[:, None] for v in (mean, std))
    values = (tokens.values.unflatten(1, (len(mean), -1)) - mean) / std
    return dataclasses.replace(tokens, values=values.flatten(1))


class _Shard:
    """The patches (T, C * ph * pw) of one file, mapped into memory; or of none, then without checksums.

    `checksums` (N,) int64 are those of its images, `header` the text that tells the file from one that replaced it.
    """

    def __init__(
        self, patches: Tensor, checksums: Tensor | None = None, file: Path | None = None, header: str | None = None
    ):
        self.patches, self.checksums, self.header = patches, checksums, header
        self.file = file and file.absolute()  # a worker may be in another folder

    def __reduce__(self):
        return (_Shard, (self.patches,)) if self.file is None else (_Shard.reopen, (self.file, self.header))

    @staticmethod
    def reopen(file: Path, header: str) -> _Shard:
        shard = InvertedDataset._load_file(file)._shards[0]
        if shard.header != header:
            raise ValueError(f"{file}: is not the file any more that the dataset was loaded from")
        return shard

    def read(self, image: int, tokens: slice) -> Tensor:
        """A copy of the patches of one image, compared with its checksum."""
        patches = self.patches[tokens].clone()
        if self.checksums is not None and checksum(patches) != self.checksums[image]:
            raise ValueError(f"{self.file}: image {image} does not have the checksum it was saved with, it is damaged")
        return patches


def _parse_header(text: str | None) -> dict:
    """The header's entries: format_version, the constructor's arguments that are no tensors, and from version 2 on
    checksum."""
    if text is None:
        raise ValueError(f'no "{HEADER_KEY}" in its header, so it is not an inverted dataset')
    try:
        header = json.loads(text)
        version = header["format_version"]
        newer = version > FORMAT_VERSION
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f'"{HEADER_KEY}" in its header is not the JSON of an inverted dataset') from None
    if newer:
        raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}, the newest that is understood")
    entries = {"format_version", "image_size", "patch_size", "metadata"} | ({"checksum"} if version > 1 else set())
    if header.keys() != entries or not isinstance(header["metadata"], dict):
        raise ValueError(f'"{HEADER_KEY}" in its header holds {sorted(header)} and not a dataset\'s entries')
    return header


def _index_checksum(header: dict, tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all that a file holds but the patches, whose own are among it; see `InvertedDataset.save`."""
    value = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in (*INDEX, "checksums"):
        value = checksum(tensors[name], value)
    return value


def _folder_names(targets: list[int], class_names: Sequence[str] | None) -> dict[int, str]:
    """The name of the folder of each class."""
    for target in targets:
        if target < 0 or (class_names is not None and target >= len(class_names)):
            names = "the numbers from 0" if class_names is None else f"{len(class_names)} class_names"
            raise ValueError(f"class {target} is not among {names}")
    if class_names is None:
        digits = len(str(max(targets, default=0)))
        return {target: f"{target:0{digits}}" for target in targets}
    names = {target: class_names[target] for target in targets}
    for target, name in names.items():
        if name in ("", "..") or name != Path(name).name:
            raise ValueError(f"class {target} is called {name!r}, which no folder can be")
        if class_names.count(name) > 1:
            raise ValueError(f"class {target} is called {name!r}, and so is another: leave class_names out")
    return names


def _folder_labels(folders: list[str], class_names: Sequence[str] | None) -> list[int]:
    """The class of each folder; the inverse of `_folder_names`."""
    if class_names is None:
        numbers = all(name.isdecimal() for name in folders)
        return [int(name) if numbers else number for number, name in enumerate(folders)]
    for name in folders:
        if class_names.count(name) != 1:
            raise ValueError(f"the class folder {name!r} is {class_names.count(name)} times in class_names, not once")
    return [class_names.index(name) for name in folders]


def _read_pixels(file: str) -> Tensor:
    """(1, H, W) uint8 of a greyscale image, (3, H, W) of any other."""
    pixels = np.array(read_image(file, ("L", "RGB")))
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def _patch_grid(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) seen as patches (N, rows, columns, C, ph, pw): a view where the memory allows it."""
    images, (ph, pw) = images.contiguous(), patch_size
    n, channels, height, width = images.shape
    return images.view(n, channels, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5)


def _grid_size(image_size: tuple[int, int, int], patch_size: tuple[int, int]) -> tuple[int, int, int]:
    """(channels, rows, columns) of the patch grid."""
    for name, size, length in (("image_size", image_size, 3), ("patch_size", patch_size, 2)):
        if (
            not isinstance(size, (tuple, list))
            or len(size) != length
            or not all(type(n) is int and n > 0 for n in size)
        ):
            raise ValueError(f"{name} must be {length} positive integers, not {size}")
    (channels, height, width), (ph, pw) = image_size, patch_size
    if height % ph or width % pw:
        raise ValueError(f"patches of {ph}x{pw} pixels do not tile an image of {height}x{width}")
    return channels, height // ph, width // pw


def _check_positions(positions: Tensor, lengths: Tensor, patches: int) -> None:
    """Every image holds a patch, every patch lies in the grid, and none is there twice; reads values on the host."""
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


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {shape} {str(dtype).removeprefix('torch.')}, not {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _cumulative(lengths: Tensor) -> Tensor:
    """Lengths (N,) as cumulative lengths (N + 1,) int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
