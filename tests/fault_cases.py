"""What the tests of faults share: commands in processes of their own that can be killed at any moment, the log of what
they did, and comparisons of the folders that they leave."""

import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageSequence
from safetensors import safe_open

import smi_fast.cli
from smi_fast import InvertedDataset
from smi_fast.data.manifest import IMAGES, MANIFEST
from smi_fast.data.states import load_state
from smi_fast.models import CIFAR10_CLASSES, MODEL_INSIDE, STUDENT_INSIDE, cifar10_vit
from smi_fast.models.loading import INSIDE
from smi_fast.runs.run import CHECKPOINTS, LOCK, Run

with suppress(ImportError):  # so that no process has to import it again
    importlib.import_module("matplotlib.backends.backend_agg")

FAULTS = int(os.environ.get("SMI_FAST_FAULTS", 6))  # moments of each kind
EVERYTHING = FAULTS >= 100  # as make faults asks for
EVERY = 0.001  # minutes between two checkpoints
ALWAYS = 1e-9  # minutes, after which each iteration is saved
LIMIT = 120  # seconds after which a command hangs
TINY = dict(depth=2, embed_dim=32, num_heads=2)  # of the model inside, in these tests
OWN = ("started", "iteration", "saved", "began", "went on", "ended")  # events of the commands themselves
OF_TIME = {  # figures of time and memory, which differ between two runs
    "seconds", "inversion_seconds", "transfer_seconds", "images_per_hour", "iterations_per_second",
    "speedup_over_dense", "peak_memory", "peak_memory_bytes",
}  # fmt: skip
Note = Callable[[str, str], None]
Hook = Callable[[Path, Note], None]  # called in the process of a command, before it begins, with its folder and its log


@dataclass(frozen=True)
class Command:
    """A command whose process is to be killed.

    Args:
        name: the name of the command.
        options: its options, without those of its folder and its checkpoints.
        short: further options, with which it is as short as it can be.
        other: further options, with which it makes something else.
        changing: the files that are written again while the command runs.
    """

    name: str
    options: str
    short: str
    other: str
    changing: tuple[str, ...] = ()

    def arguments(self, folder: Path, *more: str, every: float = EVERY) -> list[str]:
        run = ["--out", str(folder), "--checkpoint-every", str(every), "--device", "cpu", "--quiet"]
        return [self.name, *self.options.split(), *run, *more]


INVERT = Command(
    "invert",
    "--classes 0-4 --images-per-class 1 --batch-size 2 --iterations 40 --stopping 10:0.3,20:0.3",
    short="--classes 0-1 --batch-size 1 --iterations 3 --stopping 1:0.3",
    other="--seed 1",
)
DISTILL = Command(
    "distill",
    "--data {data} --samples 4 --inversion-batch-size 2 --iterations 20 --rounds 2 --steps 20 --batch-size 4 --lr 0.01",
    short="--iterations 2 --samples 2 --inversion-batch-size 1 --steps 2",
    other="--seed 1",
    changing=("student.safetensors", "report.json"),
)
QUANTIZE = Command(
    "quantize",
    "--data {data} --images 16 --batch-size 2",
    short="--images 2 --batch-size 10",
    other="--seed 1",
)
COMMANDS = {command.name: command for command in (INVERT, DISTILL, QUANTIZE)}


@dataclass
class Process:
    """A command in a process of its own."""

    process: multiprocessing.Process
    output: Path
    log: Path

    @classmethod
    def start(cls, arguments: list[str], place: Path, hook: Hook | None = None, **environment: str) -> "Process":
        """Start a command, whose folder and whose log are in `place`."""
        _start_server()
        place.mkdir(exist_ok=True)
        number = len(list(place.glob("*.log")))
        process = cls(None, place / f"{number:05}.txt", place / f"{number:05}.log")
        process.output.touch(), process.log.touch()
        process.process = multiprocessing.get_context("forkserver").Process(
            target=_work, args=(arguments, process.output, process.log, hook, environment), daemon=True
        )
        process.process.start()
        return process

    def wait(self) -> int:
        """Wait for the end, and return the exit code, which is negative after a signal."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the command hangs after {self.text}")
        return self.process.exitcode

    def wait_for(self, event: str, count: int = 1) -> None:
        """Wait until something has happened so many times."""
        end = time.monotonic() + LIMIT
        while sum(name == event for name, *_ in self.events) < count:
            assert time.monotonic() < end, f"there is no {event} after {self.text}"
            assert self.process.is_alive(), f"the command ended before {event}: {self.text}"
            time.sleep(0.001)

    def send(self, number: int, seconds: float) -> bool:
        """Send a signal after so many seconds, and return whether the process was still there."""
        self.wait_for("started")
        self.process.join(seconds)
        if alive := self.process.is_alive():
            os.kill(self.process.pid, number)
        return alive

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def refusal(self) -> str:
        """The one sentence with which the command has ended."""
        sentences = [line for line in self.text.splitlines() if line.startswith("smi-fast: error: ")]
        assert self.process.exitcode == 2, self.text
        assert len(sentences) == 1, self.text
        assert self.text.endswith(sentences[0] + "\n")
        return sentences[0]

    @property
    def events(self) -> list[list]:
        """What the command did: what, to which checkpoint, and when by time.monotonic()."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def _start_server() -> None:
    """Start the process from which all commands are forked, so that none has to import torch, and whose threads are
    few, unlike those of a process that has tested other things before."""
    forkserver.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _work(arguments: list[str], output: Path, log: Path, hook: Hook | None, environment: dict[str, str]) -> None:
    """Be the process of a command."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    torch.set_num_threads(1)
    INSIDE[MODEL_INSIDE] = INSIDE[STUDENT_INSIDE] = _tiny_model
    note = _note_events(log)
    if hook is not None:
        hook(Path(arguments[arguments.index("--out") + 1]), note)
    code = smi_fast.cli.main(arguments)
    note("ended", "")
    sys.stdout.flush()
    os._exit(code)  # at once, so that no signal comes after the command has ended


def _tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return cifar10_vit(False, **TINY)


def _note_events(log: Path) -> Note:
    """Let a run note each iteration, each checkpoint that it saved, and each part that it began or went on with."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)

    def note(event: str, name: str = "") -> None:
        os.write(descriptor, (json.dumps([event, name, time.monotonic()]) + "\n").encode())

    pause, save, checkpoint, resumed = Run.pause, Run.save, Run.checkpoint, smi_fast.cli.resumed

    def noting_pause(run: Run, name: str, state: Callable) -> None:
        note("iteration", name)
        pause(run, name, state)

    def noting_save(run: Run, name: str, state: dict) -> None:
        save(run, name, state)
        note("saved", name)

    def noting_checkpoint(run: Run, name: str) -> dict | None:
        state = checkpoint(run, name)
        note("began" if state is None else "went on", name)
        return state

    def noting_resumed(given: list[str]) -> list[str]:
        note("started")
        return resumed(given)

    Run.pause, Run.save, Run.checkpoint = noting_pause, noting_save, noting_checkpoint
    smi_fast.cli.resumed = noting_resumed
    return note


class EachChange:
    """A hook that notes each change of a folder that is about to be made, and kills the process before one of them.

    A tensor file or a text is a change once more when half of it is written.

    Args:
        last: the number of the change that is not made any more. None: all are made.
    """

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink")

    def __init__(self, last: int | None = None):
        self.last, self.count = last, 0

    def __call__(self, folder: Path, note: Note) -> None:
        self.folder, self.note = str(folder), note
        sys.addaudithook(self._audit)
        os.fsync = self._before(os.fsync)
        for module in [module for name, module in sys.modules.items() if name.startswith("smi_fast.")]:
            if hasattr(module, "save_file"):
                module.save_file = self._in_two(module.save_file, 1)
        Path.write_text = self._in_two(Path.write_text, 0)

    def _change(self, what: str, where: object = "") -> None:
        self.note(what, str(where))
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _audit(self, event: str, details: tuple) -> None:
        if event == "open":
            writes = bool((details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and self._is_inside(details[0]):
                self._change(event, details[0])
        elif event in self.CHANGES and (self._is_inside(details[0]) or details[-1] != -1):
            self._change(event, details[0])  # shutil.rmtree names files as they are called in an open folder

    def _is_inside(self, path: object) -> bool:
        return not isinstance(path, int) and os.fsdecode(path).startswith(self.folder)

    def _before(self, function: Callable) -> Callable:
        def changed(*arguments, **options):
            self._change(function.__name__)
            return function(*arguments, **options)

        return changed

    def _in_two(self, write: Callable, position: int) -> Callable:
        """Let a function be killed with half of a file written, whose path is at a position of its arguments."""

        def changed(*arguments, **options):
            written, path = write(*arguments, **options), arguments[position]
            if self._is_inside(path):
                whole = Path(path).read_bytes()
                os.truncate(path, len(whole) // 2)
                Path(path).write_bytes(whole)
            return written

        return changed


def contents(folder: Path) -> dict[str, object]:
    """What is in the files of a folder, by their names, without figures of time. Each file has to be whole."""
    return {str(file.relative_to(folder)): content(file) for file in files(folder)}


def without_checkpoints(found: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in found.items() if not name.startswith(CHECKPOINTS)}


def check_same(found: dict[str, object], expected: dict[str, object]) -> None:
    """Check that the same files are in two folders, with the same contents."""
    different = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    assert not different, f"{different} differ; there are {sorted(found)}"


def files(folder: Path) -> list[Path]:
    """The files of a run, without its lock and without what a killed process was writing."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != LOCK]
    return [file for file in found if not any(part.endswith(".partial") for part in file.relative_to(folder).parts)]


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


def content(file: Path) -> object:
    if file.suffix == ".png":
        with Image.open(file) as image:
            return image.size, image.convert("RGB").tobytes()
    if file.suffix == ".webp":
        with Image.open(file) as image:
            return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(image)]
    if file.suffix == ".html":
        return re.sub(r"[\d.,]+", "#", file.read_text())  # it shows figures of time
    if file.suffix == ".json":
        return _timeless(json.loads(file.read_text()))
    if file.suffix == ".state":
        state = load_state(file)  # which compares the checksum of the state
        state.pop("checksum", None)  # of another file, in which the order of safetensors' header is not fixed
        return _timeless(state)
    with safe_open(file, framework="pt") as tensors:
        header = {name: _timeless(_parsed(text)) for name, text in (tensors.metadata() or {}).items()}
        header.get("smi_fast", {}).pop("checksum", None)  # it covers figures of time
        return header, {name: _bits(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118


def _parsed(text: str) -> object:
    return json.loads(text) if text[:1] in "[{" else text


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if name not in OF_TIME}
    if isinstance(value, torch.Tensor):
        return _bits(value)
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass
class Whole:
    """A run that nothing disturbs, with which others are compared."""

    contents: dict[str, object]
    events: list[list]  # see `Process.events`
    seconds: float  # from the start of the command to its end

    @classmethod
    def make(
        cls,
        arguments: list[str],
        folder: Path,
        hook: Hook | None = None,
        moved: Path | None = None,
        logs: Path | None = None,
    ) -> "Whole":
        """Let a command run. Its folder is removed, or else moved."""
        process = Process.start(arguments, logs or folder.with_suffix(".whole"), hook)
        assert process.wait() == 0, process.text
        seconds = time.monotonic() - process.events[0][2]
        whole = cls(contents(folder), process.events, seconds)
        shutil.rmtree(folder) if moved is None else shutil.move(folder, moved)
        return whole

    @property
    def iterations(self) -> Counter:
        """The number of iterations, by the name of their checkpoint."""
        return iterations_of([self])

    @property
    def changes(self) -> int:
        """The number of changes that `EachChange` has noted."""
        return sum(event not in OWN for event, *_ in self.events)


def iterations_of(attempts: list) -> Counter:
    return Counter(name for attempt in attempts for event, name, _ in attempt.events if event == "iteration")


def lost_work(attempt: Process, folder: Path, every: float) -> tuple[int, float]:
    """The iterations that a process had done since its last checkpoint when it ended, and their seconds. Those of a
    finished batch are not lost."""
    events = attempt.events
    last = max((n for n, (event, *_) in enumerate(events) if event in ("saved", "began", "went on")), default=None)
    since = [] if last is None else [entry for entry in events[last:] if entry[0] == "iteration"]
    if not since or (folder / IMAGES / f"{since[-1][1]}.safetensors").exists():
        return 0, 0.0
    # An iteration after which the interval is over saves. The last one may have been about to.
    for _, _, moment in since[:-1]:
        assert moment - events[last][2] < 60 * every, "the command did not save when it was time to"
    return len(since), since[-1][2] - events[last][2]


@dataclass
class Record:
    """What a chain of interruptions found, to be printed."""

    moments: int = 0
    iterations: list[int] = field(default_factory=list)  # lost by each
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        lost = f"{max(self.iterations, default=0)} iterations, {1000 * max(self.seconds, default=0):.0f} ms"
        return f"{self.moments} moments, 0 images lost, most work lost: {lost} (interval {60000 * EVERY:.0f} ms)"


class Chain:
    """A command that is interrupted again and again, and each time goes on in the same folder.

    Args:
        command: the command.
        folder: the folder that it writes to.
        whole: the undisturbed run.
        every: the minutes between two checkpoints.
        logs: the folder for what the commands print and note. None: it is beside the run's.
    """

    def __init__(self, command: Command, folder: Path, whole: Whole, every: float = EVERY, logs: Path | None = None):
        self.command, self.folder, self.whole, self.every = command, folder, whole, every
        self.logs = logs or folder.with_suffix(".logs")
        self.attempts: list[Process] = []
        self.record, self._lost, self._shards = Record(), 0, {}

    def start(self, *more: str, hook: Hook | None = None) -> Process:
        arguments = self.command.arguments(self.folder, *more, every=self.every)
        self.attempts.append(Process.start(arguments, self.logs, hook))
        return self.attempts[-1]

    def interrupted(self, process: Process) -> None:
        """Check the folder after an interruption."""
        self.count(process)
        self.check_folder()

    def count(self, process: Process) -> None:
        """Count the work that an interruption has lost."""
        iterations, seconds = lost_work(process, self.folder, self.every)
        self._lost += iterations
        self.record.moments += 1
        self.record.iterations.append(iterations)
        self.record.seconds.append(seconds)

    def check_folder(self) -> None:
        """Check that each file is whole, and that no finished image is lost, changed or made again."""
        if not (self.folder / MANIFEST).exists():
            assert set(os.listdir(self.folder) if self.folder.exists() else ()) - set(litter(self.folder)) <= {LOCK}
            return
        found = without_checkpoints(contents(self.folder))
        found = {name: value for name, value in found.items() if name not in self.command.changing}
        check_same(found, {name: value for name, value in self.whole.contents.items() if name in found})
        shards = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in shards_of(self.folder)}
        assert self._shards.items() <= shards.items(), "a finished file was lost or written again"
        self._shards = shards
        if self.command.name == INVERT.name:
            check_images(self.folder, self.whole)

    def finished(self, process: Process) -> None:
        """Check a command that has ended by itself after any number of interruptions, and clear the folder."""
        assert process.process.exitcode == 0, process.text
        check_same(contents(self.folder), self.whole.contents)
        assert litter(self.folder) == []
        again = iterations_of(self.attempts)
        again.subtract(self.whole.iterations)
        assert min(again.values()) >= 0
        assert again.total() <= self._lost
        shutil.rmtree(self.folder)
        self.attempts, self._lost, self._shards = [], 0, {}

    def finish(self, *more: str) -> None:
        """Let the command end."""
        process = self.start(*more)
        process.wait()
        self.finished(process)


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / IMAGES).glob("*.safetensors"))


def check_images(folder: Path, whole: Whole) -> None:
    """Check that `InvertedDataset` gives the images that are finished, and says how many are missing."""
    names = [str(file.relative_to(folder)) for file in shards_of(folder)]
    planned = whole_images(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not names:
            with pytest.raises(FileNotFoundError, match=f"none of the {planned} images"):
                InvertedDataset.load(folder)
            return
        dataset = InvertedDataset.load(folder)
    dataset.verify()
    expected = b"".join(whole.contents[name][1]["patches"][2] for name in names)
    assert _bits(dataset.patches)[2] == expected
    assert len(dataset) + dataset.missing == planned


def whole_images(whole: Whole) -> int:
    shards = (entry for name, entry in whole.contents.items() if name.startswith(IMAGES))
    return sum(shard[1]["targets"][1][0] for shard in shards)


def make_data(folder: Path) -> Path:
    """Make a folder with two random test images of each class."""
    generator = torch.Generator().manual_seed(0)
    for name in CIFAR10_CLASSES:
        (folder / "test" / name).mkdir(parents=True)
        for number in range(2):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "test" / name / f"{number}.png")
    return folder


def moments(count: int) -> list[int]:
    """Of moments 0 to count - 1, all if there may be 100, or else a few that are spread over them at random."""
    if EVERYTHING:
        return list(range(count))
    return sorted(random.Random(count).sample(range(count), min(count, FAULTS)))


def is_one_run(folder: Path, old: Whole, new: Whole, changing: tuple[str, ...]) -> bool:
    """Check that a folder, in which a new run has begun to replace an old one, holds files of only one of them, and
    return whether it is the new one."""
    found = contents(folder)
    manifest = found.pop(MANIFEST, None)
    if manifest == new.contents[MANIFEST]:
        found = {name: value for name, value in without_checkpoints(found).items() if name not in changing}
        check_same(found, {name: value for name, value in new.contents.items() if name in found})
        return True
    if manifest is not None:
        found[MANIFEST] = manifest
        check_same(found, old.contents)
    check_same(found, {name: value for name, value in old.contents.items() if name in found})
    return False
