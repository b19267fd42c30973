"""The folder that a command writes its results to and goes on from, which is tested before the work begins."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from smi_fast.cli.arguments import Parser
from smi_fast.cli.config import add_config
from smi_fast.data.manifest import MANIFEST, read_manifest
from smi_fast.runs.run import EVERY, is_occupied
from smi_fast.runs.signals import is_first


def add_run(parser: argparse.ArgumentParser, default: str) -> argparse._ArgumentGroup:
    """Add --config, --out, --overwrite, --resume, --checkpoint-every and --quiet, and return their group."""
    output = parser.add_argument_group("output")
    add_config(parser)
    what = "folder for the results; the same command goes on with what it finds there"
    add_out(output, default, what)
    output.add_argument("--overwrite", action="store_true", help="begin anew in a folder that is not empty")
    what = "go on with the run in this folder, with the options that it was begun with"
    output.add_argument("--resume", type=Path, metavar="FOLDER", help=what)
    what = "minutes between two checkpoints, from which a run goes on after an interruption"
    output.add_argument("--checkpoint-every", type=minutes, default=EVERY, metavar="MINUTES", help=what)
    add_quiet(output)
    return output


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text, in the first of the processes that share a run. It is lost if nobody reads it any more."""
    if is_first():
        with suppress(BrokenPipeError):
            print(text, file=file, flush=True)


def minutes(text: str) -> float:
    """Read a time in minutes."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of minutes, got {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0 and finite, got {text}")
    return value


def resumed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command, with those that began the run that --resume names in front of them.

    Raises:
        ValueError: the folder holds no run of this command.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--resume", type=Path)
    try:
        given, others = parser.parse_known_args(arguments)
    except ValueError:  # --resume without a folder, which the command's own parser refuses
        return list(arguments)
    if given.resume is None:
        return list(arguments)
    if "--overwrite" in others:
        raise ValueError("give either --resume or --overwrite, not both")
    if not (given.resume / MANIFEST).is_file():
        raise ValueError(f"--resume: {given.resume} holds no run")
    made_with = read_manifest(given.resume)["made_with"]
    command, begun_in = made_with.get("command"), made_with.get("directory")
    if not command or command[:1] != others[:1]:
        made = f"smi-fast {command[0]}" if command else "a program"
        raise ValueError(f"--resume: the run in {given.resume} was begun by {made}, which has to go on with it")
    if begun_in != os.getcwd() and any(Path(begun_in, word).exists() for word in command):
        raise ValueError(f"--resume: the run was begun in {begun_in}, where its options name files: go on from there")
    names = {word.partition("=")[0] for word in others if word.startswith("--")}
    return [*_without(command, names), *others[1:], "--out", str(given.resume)]


def _without(command: Sequence[str], names: set[str]) -> list[str]:
    """Return the words of a command without those options, whose values are given anew."""
    kept, given = [], False
    for word in command:
        if word.startswith("--"):
            given = word.partition("=")[0] in names
        if not given:
            kept.append(word)
    return kept


def check_out(args: argparse.Namespace, files: Sequence[str]) -> None:
    """Check early, before models are read, that a command may write these files to its folder. Only the first of the
    processes that share a run does so.

    Raises:
        ValueError: the folder cannot be made or written to, holds files of another origin and is not to be
            overwritten, or holds a folder by the name of a file.
    """
    if not is_first():
        return
    out = args.out
    check_writable(out)
    if out.is_dir() and not args.overwrite and not (out / MANIFEST).exists() and is_occupied(out):
        raise ValueError(f"--out: the folder {out} is not empty; --overwrite replaces the results in it")
    for name in (MANIFEST, *files):
        if (out / name).is_dir():
            raise ValueError(f"--out: {out / name} is a folder, but the command writes a file by that name")


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
