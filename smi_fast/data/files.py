"""Files that are written complete or not at all, their checksums, and errors that name the file."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")  # the temporary folder of a write, and what a killed one leaves
# Pillow takes the format from the content. It would start another program, Ghostscript, for a cat.png that is an EPS.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield the name of an empty temporary file. It replaces `path` at the end of the `with` block, or is removed after
    an error.

    `path` is the old file or the new one, whole, at every moment, also if the process is killed or the machine loses
    its power. After the block the new file is on the disk under its name: first the file is written through (fsync),
    then it is renamed, and then the folder is written through, which holds the name.

    The temporary file lies in a temporary folder beside `path`, with whatever else a library puts beside it. A process
    that is killed leaves that folder behind. `remove_partials` removes it.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: the file cannot be written, for example because the disk is full. The message names `path`, which is
            as it was. Only if the folder cannot be written through, `path` is the new file already.
    """
    with _replacing(Path(path)) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # as the umask says; safetensors writes files that only their owner can read


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder. It becomes `path`, which must be an empty folder or not exist, at the end of the
    `with` block, or is removed after an error. All that `atomic_write` says of files holds for the folder and the
    files in it.
    """
    with _replacing(Path(path)) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a name in a temporary folder. The file or folder that gets it replaces `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    temporary = path.parent / f".{uuid.uuid4().hex}.partial"
    partial = temporary / "new"
    try:
        temporary.mkdir()
        yield partial
        for written in (*partial.rglob("*"), partial):
            _write_through(written)
        os.replace(partial, path)
        _write_through(path.parent)
    except SafetensorError as error:  # safetensors reports every failure to write by this type
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        about = str(partial if error.filename is None else error.filename)
        if not about.startswith(str(temporary)):
            raise  # it is about another file
        inside = about.removeprefix(str(temporary)).removeprefix(f"{os.sep}{partial.name}")
        raise OSError(error.errno, error.strerror, f"{path}{inside}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_through(path: Path) -> None:
    """Return when the file, or the list of names in the folder, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # what some network file systems say of folders
            raise
    finally:
        os.close(opened)


def remove_partials(folder: str | os.PathLike) -> list[Path]:
    """Remove what killed processes have left of their writes to files in `folder`, and return its names.

    It would also remove the temporary files of a process that is writing, so the caller must know that there is none.
    Nothing else is touched, neither files with similar names nor what lies in folders below.
    """
    found = sorted(path for path in Path(folder).iterdir() if PARTIAL.fullmatch(path.name))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


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


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples as lists, keys as texts, and NaN and infinity as None."""
    return json.loads(json.dumps(_finite(value)))


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
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return record


def sealed(record: dict) -> dict:
    """Return a record for `write_json` with an entry "checksum": the CRC-32 of the rest, as `json.dumps` writes it with
    sorted keys."""
    record = as_json(record)
    return record | {"checksum": _record_checksum(record)}


def read_sealed(path: str | os.PathLike) -> dict:
    """Read a file that holds a `sealed` record, and return the record without its checksum.

    Raises:
        ValueError: the file does not hold the record that it was written with. The message names it.
    """
    record = read_json(path)
    if record.pop("checksum", None) != _record_checksum(record):
        raise ValueError(f"{path} is damaged: it does not have the checksum that it was saved with")
    return record


def _record_checksum(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def read_image(path: str | os.PathLike, modes: tuple[str, ...] = ("RGB",)) -> Image.Image:
    """Read and decode a picture, and convert it to RGB unless its mode is one of `modes`.

    PNGs have checksums, so that damage is found. In other formats a changed byte can be another picture.

    Raises:
        ValueError: the file is not a picture in one of `PICTURE_FORMATS`, is damaged, or has more pixels than Pillow's
            limit, `Image.MAX_IMAGE_PIXELS`, which protects the memory. The message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # below twice the limit Pillow only warns
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                if image.format == "PNG":
                    image.verify()  # compares the checksums of its parts, which decoding does not do for pixels
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                return image.copy() if image.mode in modes else image.convert("RGB")
    except Exception as error:  # Pillow's readers raise a dozen types for damaged files
        raise ValueError(f"{path}: cannot be read as an image ({first_line(error)})") from None


def checksum(tensor: Tensor, before: int = 0) -> int:
    """Return the CRC-32 of a CPU tensor's bytes. `before` is the checksum of the bytes that come before them."""
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(), before)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
