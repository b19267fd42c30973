"""The file format of inverted images: one safetensors file, a shard, whose patches stay on disk until they are read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from smi_fast.data.files import atomic_write, checksum
from smi_fast.data.tensors import open_tensors

FORMAT_VERSION = 2
HEADER_KEY = "smi_fast"
INDEX = ("positions", "cu_seqlens", "targets")
KIND = "dataset of inverted images"


class Shard:
    """The patches of some images of a dataset: in memory, or mapped from one file.

    Args:
        patches: (T, C * ph * pw) float32, the patches of the images end to end.
        checksums: (N,) int64, the CRC-32 of the patches of each image. None: patches are read without a check.
        file: the file that the patches are mapped from, or None.
        header: the CRC-32 of that file's header, by which a file that has replaced it is recognised.
    """

    def __init__(
        self, patches: Tensor, checksums: Tensor | None = None, file: Path | None = None, header: int | None = None
    ):
        self.patches, self.checksums, self.header = patches, checksums, header
        self.file = file and file.absolute()  # a worker process may have another working directory

    def __reduce__(self):
        return (Shard, (self.patches,)) if self.file is None else (reopen, (self.file, self.header))

    def read(self, image: int, tokens: slice) -> Tensor:
        """Return a copy of the patches of image `image` of this shard, which are the rows `tokens` of `patches`.

        Raises:
            ValueError: the patches differ from their checksum.
        """
        patches = self.patches[tokens].clone()
        if self.checksums is not None and checksum(patches) != self.checksums[image]:
            raise ValueError(f"{self.file}: image {image} does not have the checksum it was saved with, it is damaged")
        return patches


def write_shard(path: Path, patches: Tensor, checksums: list[int], index: dict[str, Tensor], header: dict) -> None:
    """Write a file of format version 2, which `InvertedDataset.save` describes. `index` holds the tensors that `INDEX`
    names, and `header` the entries image_size, patch_size and metadata."""
    header = {"format_version": FORMAT_VERSION, **header}
    index = {name: tensor.contiguous() for name, tensor in index.items()}
    index["checksums"] = torch.tensor(checksums, dtype=torch.int64)
    header["checksum"] = _index_checksum(header, index)
    with atomic_write(path) as partial:
        save_file({"patches": patches.contiguous(), **index}, partial, metadata={HEADER_KEY: json.dumps(header)})


@contextmanager
def open_shard(file: Path) -> Iterator[tuple[Shard, dict]]:
    """Open a file that `write_shard` has written, and name it in every `ValueError` raised inside the `with` block.

    Yields the patches and the other arguments of `InvertedDataset`. They have not been checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign or of a newer format, or its index or header is damaged.
    """
    with open_tensors(file, HEADER_KEY, KIND) as (opened, text):
        header = _parse_header(text)
        index = {name: opened.get_tensor(name).clone() for name in INDEX}
        checksums = None
        if "checksum" in header:
            checksums, expected = opened.get_tensor("checksums").clone(), header.pop("checksum")
            if _index_checksum(header, index | {"checksums": checksums}) != expected:
                raise ValueError("its index does not have the checksum that it was saved with, it is damaged")
            check_tensor("checksums", checksums, torch.int64, (index["targets"].numel(),))
        del header["format_version"]
        yield Shard(opened.get_tensor("patches"), checksums, file, zlib.crc32(text.encode())), index | header


def reopen(file: Path, header: int) -> Shard:
    """Open the file of a pickled shard again. Raise a `ValueError` if another file has replaced it."""
    with open_shard(file) as (shard, _):
        if shard.header != header:
            raise ValueError("is not the file any more that the dataset was loaded from")
        return shard


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` that names the tensor if its dtype or shape is another one."""
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {shape} {str(dtype).removeprefix('torch.')}, not {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    """Return the shape and dtype of a tensor as text, such as "(3, 4) float32"."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _parse_header(text: str) -> dict:
    """Return the header's entries: format_version, the arguments of `InvertedDataset` that are not tensors and, from
    version 2 on, checksum."""
    try:
        header = json.loads(text)
        version = header["format_version"]
        newer = version > FORMAT_VERSION
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise ValueError(f'"{HEADER_KEY}" in its header is not the JSON of a {KIND}') from None
    if newer:
        raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}, the newest that is understood")
    entries = {"format_version", "image_size", "patch_size", "metadata"} | ({"checksum"} if version > 1 else set())
    if header.keys() != entries or not isinstance(header["metadata"], dict):
        raise ValueError(f'"{HEADER_KEY}" in its header holds {sorted(header)} and not a dataset\'s entries')
    return header


def _index_checksum(header: dict, tensors: dict[str, Tensor]) -> int:
    """Return the CRC-32 of the header and of all tensors except the patches, whose checksums are one of the tensors."""
    value = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in (*INDEX, "checksums"):
        value = checksum(tensors[name], value)
    return value
