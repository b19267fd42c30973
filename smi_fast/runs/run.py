"""Run: the folder of a long job, which one job at a time writes to, and from which it goes on."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from smi_fast.data.files import PARTIAL, as_json, remove_partials
from smi_fast.data.manifest import IMAGES, MANIFEST, read_manifest, write_manifest
from smi_fast.data.states import load_state, save_state
from smi_fast.runs.processes import Processes
from smi_fast.runs.signals import Signals

LOCK, CHECKPOINTS, LOG = ".lock", "checkpoints", "log"
FOLDERS = (IMAGES, CHECKPOINTS, LOG)
SUFFIX = ".state"  # of a checkpoint, which is a safetensors file but no dataset
REMEMBERED = ("threads", "command", "directory")  # entries of `made_with` in which the first job counts
EVERY = 5.0  # minutes between two checkpoints
_held: set[tuple[int, Path]] = set()  # who has locked what in this process, since the system only tells processes apart


class Run:
    """The folder of a long job. Used as a context manager, it holds the folder's lock, which the end of the process
    frees however it comes, and takes signals (see `Signals`).

    The manifest in the folder says what the job makes. If it is there already, the job goes on, and its settings have
    to be the same.

    Args:
        folder: the folder. It is made if it does not exist.
        kind: what the job makes, such as "inversion".
        settings: what decides the results, in JSON's types.
        made_with: what the results depend on besides, as `machine.made_with` gives it. Another device or version is a
            warning. A job goes on with the number of torch's threads that it began with.
        files: the names of files that the job writes into the folder.
        folders: the names of folders that it writes to, besides those of images and checkpoints.
        overwrite: begin anew in a folder that holds files. Files by other names stay.
        checkpoint_every: the minutes between two checkpoints.
        processes: those that share the run. None: those of the environment.

    Raises:
        ValueError: the time between checkpoints is not positive. On entering: the folder is in use, holds files of
            another origin or a run with other settings, or its manifest is damaged. The message says which.
        ConnectionError: the store of the processes cannot be reached.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        kind: str,
        settings: dict[str, Any],
        made_with: dict[str, Any] | None = None,
        *,
        files: Sequence[str] = (),
        folders: Sequence[str] = (),
        overwrite: bool = False,
        checkpoint_every: float = EVERY,
        processes: Processes | None = None,
    ):
        if not checkpoint_every > 0:
            raise ValueError(f"the minutes between two checkpoints must be more than 0, got {checkpoint_every}")
        self.folder, self.kind = Path(folder), kind
        self.settings, self.made_with = as_json([settings, made_with or {}])
        self.files, self.folders = files, (*FOLDERS, *folders)
        self.overwrite, self.every = overwrite, 60 * checkpoint_every
        self.processes = processes or Processes.of_environment()
        self.signals = Signals()
        self._part = ""
        self._saved = time.monotonic()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.push(self._leave)
            manifest = self._open(stack) if self.processes.is_first else self._hear()
            if (threads := manifest["made_with"].get("threads")) is not None:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(threads)
            stack.enter_context(self.signals)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _leave(self, kind: type | None, *error: object) -> None:
        with suppress(ConnectionError):
            self.processes.leave(wait=kind is None)

    def pause(self, name: str, save: Callable[[], dict[str, Any]]) -> None:
        """Save a checkpoint if it is time to, or if a signal has asked for an end. Call it after every iteration.

        Args:
            name: the name of the checkpoint. A later one of the same name replaces it.
            save: returns the state to save, as `save_state` takes it.

        Raises:
            Stopped: a signal has asked for an end, and the checkpoint is saved.
        """
        if self.signals.asked is not None or self.is_due:
            self.save(name, save())
        self.signals.check()

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self._saved >= self.every

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Save a checkpoint."""
        self._checkpoint(name).parent.mkdir(exist_ok=True)
        save_state(self._checkpoint(name), state)
        self._saved = time.monotonic()

    def checkpoint(self, name: str) -> dict[str, Any] | None:
        """Return the last checkpoint of this name, with tensors on the CPU, or None if there is none. A damaged one is
        a warning, and the job begins that part again."""
        try:
            return load_state(self._checkpoint(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            warnings.warn(f"{error}; what it held is computed again", stacklevel=2)
            return None

    def part(self, name: str) -> Run:
        """Return this run with checkpoints of its own, for a part of the job that names its checkpoints itself."""
        part = copy.copy(self)
        part._part = f"{self._part}{name}-"
        return part

    @property
    def is_part(self) -> bool:
        """Whether this is a part of a run, whose folder others write to as well."""
        return bool(self._part)

    def discard(self, name: str) -> None:
        """Remove a checkpoint, if it is there."""
        self._checkpoint(name).unlink(missing_ok=True)

    def _checkpoint(self, name: str) -> Path:
        return self.folder / CHECKPOINTS / f"{self._part}{name}{SUFFIX}"

    def _open(self, stack: ExitStack) -> dict[str, Any]:
        """Lock the folder, make it ready for this run, and return its manifest."""
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock(stack)
            self._prepare()
            manifest = read_manifest(self.folder)
        except BaseException:
            self.processes.tell("folder", json.dumps(None))
            for folder in missing:
                with suppress(OSError):  # it is not empty if another run uses it
                    folder.rmdir()
            raise
        self.processes.tell("folder", json.dumps(manifest))
        return manifest

    def _hear(self) -> dict[str, Any]:
        """Return the manifest of the folder that the first process has opened."""
        manifest = json.loads(self.processes.hear("folder", lambda: None))
        if manifest is None:
            raise ValueError(f"the first of the processes was refused the folder {self.folder}")
        self._check(manifest)
        return manifest

    def _lock(self, stack: ExitStack) -> None:
        place = self.folder.resolve()
        held = os.getpid(), place
        if held in _held:
            raise ValueError(f"{self.folder} is in use by another run of this process")
        file = stack.enter_context((place / LOCK).open("a"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock that child processes do not inherit
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{self.folder} is in use by another process") from None
        _held.add(held)
        stack.callback(_held.discard, held)

    def _prepare(self) -> None:
        """Go on from the manifest that the folder holds, or begin."""
        goes_on = (self.folder / MANIFEST).exists() and not self.overwrite
        if goes_on:
            self._check(read_manifest(self.folder))
        elif not self.overwrite and is_occupied(self.folder):
            raise ValueError(
                f"the folder {self.folder} is not empty and holds no run; --overwrite replaces the results in it"
            )
        remove_partials(self.folder)
        for root in (self.folder / name for name in self.folders):
            for folder in (root, *root.glob("*")):
                if folder.is_dir():
                    remove_partials(folder)
        if not goes_on:
            self._clear()
            write_manifest(self.folder, self.kind, self.settings, self.made_with)

    def _clear(self) -> None:
        """Remove an earlier run. Its manifest goes first and its folders in one go, so that nothing of it is taken for
        a part of this run, whenever the process ends."""
        for name in (MANIFEST, *self.files):
            (self.folder / name).unlink(missing_ok=True)
        for name in self.folders:
            if (self.folder / name).exists():
                trash = self.folder / f".{uuid.uuid4().hex}.partial"
                os.replace(self.folder / name, trash)
                shutil.rmtree(trash)

    def _check(self, found: dict[str, Any]) -> None:
        """Check that a manifest is of this run."""
        if found["kind"] != self.kind:
            raise ValueError(f"{self.folder} holds a run of kind {found['kind']}, not {self.kind}")
        theirs, ours = found["settings"], self.settings
        different = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if different:
            listed = ", ".join(f"{n} is {_short(theirs.get(n))}, not {_short(ours.get(n))}" for n in different)
            raise ValueError(f"{self.folder} holds a run with other settings: {listed}; --overwrite begins anew")
        for name, value in self.made_with.items():
            before = found["made_with"].get(name)
            if before != value and name not in REMEMBERED:
                warnings.warn(
                    f"the run was begun with {name} {_short(before)} and goes on with {_short(value)}, "
                    "which may change the last bits of what follows", stacklevel=2,
                )  # fmt: skip


def is_occupied(folder: Path) -> bool:
    """Return whether a folder holds anything but a lock and what killed processes have left."""
    return any(name != LOCK and not PARTIAL.fullmatch(name) for name in os.listdir(folder))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
