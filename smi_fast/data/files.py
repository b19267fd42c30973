"""Files that are written complete or not at all, their checksums, and errors that name the file."""

from __future__ import annotations

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


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file beside `path`. It replaces `path` at the end of the `with` block, or is removed after an
    error.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: the file cannot be written, for example because the disk is full. The message names `path`.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    partial = path.parent / f".{uuid.uuid4().hex}.partial"
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # as the umask says; safetensors writes files that only their owner can read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
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


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Let errors of the system that name no file name `path`.

    Raises:
        OSError: the error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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


def remove_partials(folder: str | os.PathLike) -> list[Path]:
    found = sorted(Path(folder).glob(".*.partial"))
    for path in found:
        if path.is_dir():
            import shutil

            shutil.rmtree(path)
        else:
            path.unlink()
    return found
