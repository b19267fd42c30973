"""Files of tensors with a header, in the safetensors format: checks before writing, and errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

SUFFIX = ".safetensors"


def new_file(path: str | os.PathLike, kind: str, overwrite: bool) -> Path:
    """Check that a file of tensors may be written to `path`. `kind` is what it will hold, such as "dataset".

    Raises:
        ValueError: `path` does not end in .safetensors.
        FileExistsError: `path` exists and `overwrite` is false.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: the name of a {kind} must end in {SUFFIX}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; overwrite=True replaces it")
    return path


@contextmanager
def open_tensors(path: Path, key: str, kind: str) -> Iterator[tuple[safe_open, str]]:
    """Open a file of tensors, and name it in every `ValueError` that is raised inside the `with` block.

    Yields the open file, whose `get_tensor(name)` maps a tensor into memory, and the text of the header's entry `key`.
    A file with that entry holds a `kind`, such as a "dataset".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, has no such entry, or lacks a tensor that is asked for.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
            if text is None:
                raise ValueError(f'no "{key}" in its header, so it is not a {kind}')
            yield file, text
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete {kind} ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
