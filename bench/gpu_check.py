"""Check all that needs a GPU: python bench/gpu_check.py [--step NAME] [--out DIR] [--smi-checkout PATH]

The steps, in their order: `tests` that need a GPU, the kernels under compute-sanitizer (`sanitize`), the dispatch table
(`tune`), and the benchmarks of the `kernels` and of the `loop` with their report. Each takes at most --limit seconds.
Without --step all of them run, one after the other.

Everything is written into --out when it is known, in files that are whole at any time: the outcome of each test, each
time that tuning takes, the tuned table, each group of benchmarks, and in NAME-check.json how each part of a step ended.
So a step that was stopped can be run again and goes on with what is missing. What was written by other code or on
another GPU is put aside under another name. The output of a step is in NAME-STEP.log.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch
from journal import DEAD, STOPPED, Journal, source
from report import as_text

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "gpu-check" / "libsmi_fast_kernels.so"
# The names of tests that run small kernels in every form, by the file of the kernels: forward and backward, on equal,
# ragged and empty sequences, and on rows that lie apart.
SMALL = {
    "attention": "ragged_and_empty or strides",
    "class_attention": "first_row",
    "cross_entropy": "far_from_zero",
    "embedding": "written_out",
    "mlp": "layout",
    "norm": "first_tokens or lie_apart",
    "patch_entropy": "negative_positions",
    "patches": "strides",
    "pixels": "neither_read or did_not_see or schedule",
    "selection": "strides",
}
MARGIN = 60  # seconds before the end of a step from which its commands begin nothing more
# With --quick: a case or two of each step, to see that all of them run and write.
QUICK = {
    "tests": ["tests/bench/test_bench.py", "-k", "gpu_rounds"],
    "tune": ["--only", "select_tokens_backward", "--processes", "2", "--keep"],
    "kernels": [
        "-k",
        "not 128 and not 512 and not 384 and not 768 and ((test_patches_forward and not backward and 137)"
        " or (test_pixel_step and 46) or (backward and (test_cross_entropy or (test_embed_tokens and 47))))",
    ],
    "loop": ["-k", "test_iteration and deit_tiny and not 46"],
}


class Settings(NamedTuple):
    out: Path
    name: str  # the GPU's name, as it stands in names of files
    arch: str = "90"  # its compute capability
    limit: float = 540.0
    smi_checkout: Path | None = None
    quick: bool = False
    end: float = 0.0  # when the running step has to end, by the monotonic clock

    def left(self) -> str:
        """The seconds after which a command that begins now should begin nothing more."""
        return f"{max(0.0, self.end - MARGIN - time.monotonic()):.0f}"

    def file(self, ending: str) -> Path:
        return self.out / f"{self.name}{ending}"


class Part(NamedTuple):
    """A command of a step.

    `needs` is a program or a file without which it cannot run. What `repeats` runs again even if it has passed, because
    what it reads may have changed. What `resumes` leaves out the work that ended its process before.
    """

    name: str
    command: list[str]
    needs: str | Path | None = None
    environment: dict[str, str] = {}
    repeats: bool = False
    resumes: bool = False


class Result(NamedTuple):
    part: str
    verdict: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("failed")


def run(part: Part, limit: float, log: IO[str]) -> Result:
    """Run a command and write its output to the log. It has passed if it ends in time with exit status 0. If the GPU
    stopped answering, or a signal ended a command that resumes, a new process goes on with what is missing."""
    print(f"\n== {part.name}: {' '.join(part.command)}", file=log, flush=True)
    if isinstance(part.needs, Path) and not part.needs.exists():
        return Result(part.name, f"not run: no {part.needs.name}")
    if isinstance(part.needs, str) and shutil.which(part.needs) is None:
        return Result(part.name, f"not run: no {part.needs}")
    started, status = time.monotonic(), DEAD
    while status == DEAD or (status < 0 and part.resumes):
        left = started + limit - time.monotonic()
        status = _status(part, left, log) if left > 0 else None
        if status is None:
            return Result(part.name, f"failed: ended after {limit:.3g} s", time.monotonic() - started)
    verdicts = {0: "passed", STOPPED: "stopped: run the step again for what is missing"}
    verdict = verdicts.get(status, f"failed: exit status {status}")
    return Result(part.name, verdict, time.monotonic() - started)


def _status(part: Part, limit: float, log: IO[str]) -> int | None:
    """The exit status of the command, or None if it was ended at its limit."""
    process = subprocess.Popen(
        part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"} | part.environment,
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end(process: subprocess.Popen) -> None:
    """End the command and every process that it started. They are a process group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def tests(settings: Settings) -> Iterator[Part]:
    """The C++ library is built once, and all tests use it."""
    folder = LIBRARY.parent
    options = {"ARCHS": settings.arch, "HEADS": "3", "MAX_SEQLEN": "197", "PATCHES": "3x224x224/16x16"}
    if not settings.quick:
        definitions = [f"-DSMI_FAST_{name}={value}" for name, value in options.items()]
        python = f"-DPython3_EXECUTABLE={sys.executable}"
        yield Part(
            "configure", ["cmake", "-S", str(ROOT), "-B", str(folder), python, *definitions], "cmake", repeats=True
        )
        yield Part("build", ["cmake", "--build", str(folder)], folder / "CMakeCache.txt", repeats=True)
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") and not settings.quick else []
    command = [*PYTEST, "-m", "cuda", *parallel, "-p", "resume", "--outcomes", str(settings.file("-tests.json"))]
    environment = {"SMI_FAST_KERNELS_LIBRARY": str(LIBRARY)} if LIBRARY.exists() else {}
    yield Part("tests", command + (QUICK["tests"] if settings.quick else []), environment=environment)


def sanitize(settings: Settings) -> Iterator[Part]:
    """Each file of kernel tests by itself, under each tool."""
    for tool in ("memcheck", "racecheck"):
        for module, names in SMALL.items():
            command = f"compute-sanitizer --tool {tool} --error-exitcode 1 --target-processes application-only".split()
            command += [*PYTEST, f"tests/kernels/test_{module}.py", "-k", f"triton and ({names})"]
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # lets it see where each tensor ends
            yield Part(f"{tool} {module}", command, "compute-sanitizer", environment)


def tune(settings: Settings) -> Iterator[Part]:
    files = ["--results", str(settings.file("-tune.json")), "--copy", str(settings.file("-dispatch.json"))]
    quick = QUICK["tune"] if settings.quick else []
    yield Part("tune", [sys.executable, "bench/tune.py", "--seconds", settings.left(), *files, *quick], repeats=True)


def kernels(settings: Settings) -> Iterator[Part]:
    return benchmarks(settings, "kernels", ["bench/bench_kernels.py"])


def loop(settings: Settings) -> Iterator[Part]:
    checkout = ["--smi-checkout", str(settings.smi_checkout)] if settings.smi_checkout else []
    return benchmarks(settings, "loop", ["bench/bench_inversion.py", "bench/bench_forward.py", *checkout])


def benchmarks(settings: Settings, name: str, arguments: list[str]) -> Iterator[Part]:
    """Kernels are compiled before they are timed, and the report is written of all results that there are."""
    if settings.quick:
        arguments = [arguments[0], *QUICK[name], "--rounds", "1"]
    results = settings.file("-kernels.json"), settings.file("-loop.json")
    path = str(settings.file(f"-{name}.json"))
    command = [*PYTEST, *arguments, "--bench-device", "cuda", "--results", path]
    if name == "kernels":  # the loop launches few kernels, before its timed iterations
        yield Part("compile", [*command, "--compile-only"], repeats=True)
    yield Part("benchmarks", [*command, "--stop-after", settings.left()], resumes=True)
    report = [sys.executable, "bench/report.py", *map(str, results), "--markdown", "--targets"]
    report += ["--output", str(settings.file(".md"))]
    report += [] if settings.quick else ["--plots", str(settings.file(""))]
    yield Part("report", report, Path(path), repeats=True)


STEPS: dict[str, Callable[[Settings], Iterator[Part]]] = {
    "tests": tests,
    "sanitize": sanitize,
    "tune": tune,
    "kernels": kernels,
    "loop": loop,
}


def run_step(name: str, settings: Settings) -> list[Result]:
    """Run the parts of a step that have not passed yet with this code and this dispatch table. Returns how all of them
    ended."""
    journal = Journal(settings.file("-check.json"), source(table=False), gpu=settings.name)
    same = {"step": name, "with": source(), "verdict": "passed"}
    passed = {record["part"] for record in journal["parts"] if record.items() >= same.items()}
    results, end = [], time.monotonic() + settings.limit
    parts = STEPS[name](settings._replace(end=end))  # each is made when the one before has ended
    with open(settings.file(f"-{name}.log"), "a") as log:
        for part in parts:
            if part.name in passed and not part.repeats:
                results.append(Result(part.name, "passed before"))
                continue
            left = end - time.monotonic()
            result = run(part, left, log) if left > 0 else Result(part.name, "failed: no time left")
            results.append(result)
            journal.add(parts=[{"step": name, "with": source(), **result._asdict()}])
            print(f"{name}, {part.name}: {result.verdict} ({result.seconds:.0f} s)", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", choices=STEPS, help="run this step only")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where results and logs go")
    parser.add_argument("--limit", type=float, default=540, help="seconds that a step may take")
    parser.add_argument("--smi-checkout", type=Path, help="the authors' published code, to measure beside ours")
    parser.add_argument("--quick", action="store_true", help="a case or two of each step, to try the harness itself")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU that torch can see, so nothing was checked.")
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name()
    name = "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
    out, checkout = arguments.out.resolve(), arguments.smi_checkout and arguments.smi_checkout.resolve()
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    settings = Settings(out, name, arch, arguments.limit, checkout, arguments.quick)
    rows = []
    for step in [arguments.step] if arguments.step else STEPS:
        rows += [(step, result) for result in run_step(step, settings)]
    print()
    cells = ((step, result.part, result.verdict, f"{result.seconds:.0f}") for step, result in rows)
    print(as_text([("step", "part", "verdict", "seconds"), *cells], left=(0, 1, 2)))
    return int(any(result.failed for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())
