"""Files that are written complete or not at all, their checksums, and errors that name the file."""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

PARTIAL = ".partial"  # the suffix of files that are being written, and of folders that are being removed


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file beside `path`. It replaces `path` at the end of the `with` block, or is removed after an
    error. Then the file and its name are on the disk, and last through a power failure.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: the file cannot be written, for example because the disk is full. The message names `path`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    partial = partial_path(path.parent)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # as the umask says; safetensors writes files that only their owner can read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except SafetensorError as error:  # safetensors reports every failure to write by this type
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        if error.filename not in (None, str(partial)):
            raise  # it is about another file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power failure, if the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)


def partial_path(folder: Path) -> Path:
    """Return a new path in a folder for what is there only for a moment."""
    return folder / f".{uuid.uuid4().hex}{PARTIAL}"


def write_json(path: str | os.PathLike, record: dict) -> None:
    """Write `record` as strict JSON, complete or not at all. NaN and infinity, which JSON lacks, become null.

    Raises:
        OSError: see `atomic_write`.
    """
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | os.PathLike) -> dict:
    """Read a file that holds a JSON object.

    Raises:
        ValueError: the file does not hold a JSON object. The message names it.
    """
    try:
        record = json.loads(Path(path).read_text())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are subclasses
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return record


def read_image(path: str | os.PathLike, modes: tuple[str, ...] = ("RGB",)) -> Image.Image:
    """Read and decode a picture, and convert it to RGB unless its mode is one of `modes`.

    Raises:
        ValueError: the file is not a picture, is truncated, or has more pixels than Pillow's limit, which protects the
            memory. The message names the file.
    """
    try:
        with Image.open(path) as image:
            return image.copy() if image.mode in modes else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a broken PNG: SyntaxError
        raise ValueError(f"{path}: cannot be read as an image ({error})") from None


def checksum(tensor: Tensor, before: int = 0) -> int:
    """Return the CRC-32 of a CPU tensor's bytes. `before` is the checksum of the bytes that come before them."""
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), before)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def partials(folder: str | os.PathLike) -> list[Path]:
    """Return what killed processes have left in a folder: the temporary files of `atomic_write`, and folders that were
    being removed."""
    return sorted(path for path in Path(folder).glob(f".*{PARTIAL}") if len(path.stem) == len(f".{uuid.uuid4().hex}"))
