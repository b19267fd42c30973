"""InvertedDataset: sparse inverted images, in memory and on disk."""

from __future__ import annotations

import json
import operator
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .keep import Keep, pack_keep
from .tokens import PackedTokens

FORMAT_VERSION = 1
HEADER_KEY = "smi_fast"
TENSORS = ("patches", "positions", "cu_seqlens", "targets")


class InvertedDataset(torch.utils.data.Dataset):
    """N inverted images of which only the kept patches exist.

    A sample is `(patches (K, C * ph * pw) float32, positions (K,) int32, target int)`; K may differ between images.
    All tensors are on the CPU.

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

    Raises:
        ValueError: the tensors' shapes, dtypes or values contradict each other; names the first contradiction.
        TypeError: `metadata` has no JSON form.
    """

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
        self.patches, self.positions, self.cu_seqlens, self.targets = patches, positions, cu_seqlens, targets
        self.image_size, self.patch_size = tuple(image_size), tuple(patch_size)
        self.metadata = json.loads(json.dumps(metadata or {}))

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

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        index = range(len(self))[operator.index(index)]
        tokens = slice(*self.cu_seqlens[index : index + 2].tolist())
        return self.patches[tokens], self.positions[tokens], int(self.targets[index])

    def images(self, indices: Iterable[int] | None = None) -> Tensor:
        """Whole images (n, C, H, W) float32, stopped patches black (0): those at `indices`, in that order, or all.

        Raises:
            IndexError: an index is out of range.
        """
        chosen = torch.tensor([range(len(self))[i] for i in (range(len(self)) if indices is None else indices)]).long()
        lengths = self.cu_seqlens.long().diff()[chosen]
        owner = torch.arange(len(chosen)).repeat_interleave(lengths)
        tokens = torch.arange(len(owner)) + (self.cu_seqlens[chosen] - lengths.cumsum(0) + lengths)[owner]
        images = torch.zeros(len(chosen), *self.image_size)
        grid, positions = _patch_grid(images, self.patch_size), self.positions[tokens].long()
        columns = grid.shape[2]
        grid[owner, positions // columns, positions % columns] = self.patches[tokens].view(-1, *grid.shape[3:])
        return images

    @staticmethod
    def collate(samples: list[tuple[Tensor, Tensor, int]]) -> tuple[PackedTokens, Tensor]:
        """B samples as (PackedTokens with values (T, C * ph * pw), targets (B,) int64); a DataLoader's `collate_fn`."""
        patches, positions, targets = zip(*samples, strict=True)
        return PackedTokens.from_sequences(list(patches), list(positions)), torch.tensor(targets, dtype=torch.int64)

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write one `.safetensors` file: complete, or not at all.

        The header's entry "smi_fast" is a JSON object: format_version, image_size, patch_size, metadata.

        Raises:
            ValueError: `path` does not end in .safetensors.
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
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata={HEADER_KEY: json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> InvertedDataset:
        """Read a file, or all `*.safetensors` of a folder, sorted by name, as one dataset.

        Of a folder's metadata those entries remain on which all files agree.

        Raises:
            FileNotFoundError: no such file, or no dataset in the folder.
            ValueError: a file is truncated, foreign, inconsistent, of a newer format, or disagrees with the first file
                in image_size or patch_size; names the file and what is wrong.
        """
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path}: the folder holds no .safetensors file")
        parts = [cls._load_file(file) for file in files]
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        for file, part in zip(files, parts, strict=True):
            for name in ("image_size", "patch_size"):
                ours, theirs = getattr(first, name), getattr(part, name)
                if theirs != ours:
                    raise ValueError(f"{file}: {name} is {theirs}, but {ours} in {files[0].name}")
        metadata = {
            key: value
            for key, value in first.metadata.items()
            if all(key in part.metadata and part.metadata[key] == value for part in parts)
        }
        return cls(
            torch.cat([part.patches for part in parts]),
            torch.cat([part.positions for part in parts]),
            _cumulative(torch.cat([part.cu_seqlens.diff() for part in parts])),
            torch.cat([part.targets for part in parts]),
            first.image_size,
            first.patch_size,
            metadata,
        )

    @classmethod
    def _load_file(cls, file: Path) -> InvertedDataset:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            with safe_open(file, framework="pt") as opened:
                header = _parse_header((opened.metadata() or {}).get(HEADER_KEY))
                return cls(*[opened.get_tensor(name) for name in TENSORS], **header)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a complete dataset ({error})") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it replaces `path` once complete, and is removed after an error.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors writes files that only their owner reads; follow the umask, as others do
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _parse_header(text: str | None) -> dict:
    """The constructor's arguments that the header holds."""
    if text is None:
        raise ValueError(f'no "{HEADER_KEY}" in its header, so it is not an inverted dataset')
    try:
        header = json.loads(text)
        version = header.pop("format_version")
        newer = version > FORMAT_VERSION
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        raise ValueError(f'"{HEADER_KEY}" in its header is not the JSON of an inverted dataset') from None
    if newer:
        raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}, the newest that is understood")
    if header.keys() != {"image_size", "patch_size", "metadata"} or not isinstance(header["metadata"], dict):
        raise ValueError(f'"{HEADER_KEY}" in its header holds {sorted(header)} and not a dataset\'s entries')
    return header


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
