"""The folder that a command writes its results to, which is tested before the work begins."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended


class Results:
    """The results of a command: the folder `args.out`, and in `args.written` the names of the files that are complete.

    After Ctrl-C, `main` reads `args.written` to say what the command has written.

    Args:
        args: the options of the command, among them those that `add_output` adds.
        files: the names of all files that the command may write.

    Raises:
        ValueError: the folder cannot be made or written to, is not empty without --overwrite, or holds a folder by the
            name of a file.
    """

    def __init__(self, args: argparse.Namespace, files: Sequence[str]):
        self.folder, self.written = args.out, args.written
        check_writable(self.folder)
        if self.folder.is_dir() and any(self.folder.iterdir()) and not args.overwrite:
            raise ValueError(f"--out: the folder {self.folder} is not empty; --overwrite replaces the results in it")
        for name in files:
            if (self.folder / name).is_dir():
                raise ValueError(f"--out: {self.folder / name} is a folder, but the command writes a file by that name")

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Let `save` write the file of this name. `save` returns False if it cannot write the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if save(self.folder / name) is not False and name not in self.written:
            self.written.append(name)

    def __str__(self) -> str:
        return f"wrote {', '.join(self.written)} to {self.folder}"


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --out, --overwrite and --quiet."""
    output = parser.add_argument_group("output")
    add_out(output, default, "folder for the results")
    output.add_argument("--overwrite", action="store_true", help="replace results in a folder that is not empty")
    add_quiet(output)


def add_out(parser: argparse._ActionsContainer, default: str, what: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(default), metavar="FOLDER", help=what)


def add_quiet(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def check_writable(out: Path) -> None:
    """Make the folder `out`, write a file to it, and leave everything as it was.

    Raises:
        ValueError: the folder cannot be made or written to. The message says why.
    """
    if "\0" in str(out):
        raise ValueError(f"--out: {str(out)!r} holds a NUL byte")
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise ValueError(f"--out: {out} is {'a link to nothing' if out.is_symlink() else 'a file, not a folder'}")
        missing = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out) as probe:
                probe.write(b"results")
        finally:
            for folder in missing:
                with suppress(OSError):  # another run may have made the folder, or use it
                    folder.rmdir()
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be written to: {error.strerror}") from error
