"""Check in eight minutes all that needs a GPU: python bench/gpu_check.py [--out DIR] [--smi-checkout PATH]

This runs the tests that need a GPU, the kernels under compute-sanitizer, bench/tune.py, the benchmarks of the kernels
and of the loop, and their report. Groups that there was no time for are missing in the report; `make bench` measures
all of them. Each step has a time limit of its own. If it runs over, it is ended and the next one begins. The output of
the steps goes to gpu-check.log, beside the results.
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
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch
from report import as_text

ROOT = Path(__file__).resolve().parent.parent
# These tests run small kernels in every form: forward and backward, on equal, ragged and empty sequences, and on
# tensors with strides.
SMALL = "triton and (ragged_and_empty or strides or neither_read)"


class Step(NamedTuple):
    """A command that may take up to `limit` seconds. `needs` is a program or a file without which it cannot run."""

    name: str
    command: list[str]
    limit: float
    needs: str | Path | None = None
    environment: dict[str, str] = {}


class Result(NamedTuple):
    step: str
    verdict: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("failed")


def run(step: Step, log: IO[str]) -> Result:
    """Run a step and write its output to the log. It has passed if it ends in time with exit status 0."""
    print(f"\n== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    if isinstance(step.needs, Path) and not step.needs.exists():
        return Result(step.name, f"not run: no {step.needs.name}")
    if isinstance(step.needs, str) and shutil.which(step.needs) is None:
        return Result(step.name, f"not run: no {step.needs}")
    started = time.monotonic()
    process = subprocess.Popen(
        step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": _with_root(), "PYTHONUNBUFFERED": "1"} | step.environment,
    )  # fmt: skip
    try:
        status = process.wait(step.limit)
        verdict = f"failed: exit status {status}" if status else "passed"
    except subprocess.TimeoutExpired:
        verdict = f"failed: ended after {step.limit:g} s"
    finally:
        _end(process)
    return Result(step.name, verdict, time.monotonic() - started)


def _with_root() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _end(process: subprocess.Popen) -> None:
    """End the step and every process that it started. They are a process group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(steps: Iterable[Step], log: IO[str]) -> list[Result]:
    results = []
    for step in steps:
        results.append(run(step, log))
        print(f"{step.name}: {results[-1].verdict} ({results[-1].seconds:.0f} s)", flush=True)
    return results


def steps(out: Path, gpu: str, smi_checkout: Path | None = None) -> list[Step]:
    """The steps in their order. Their limits add up to eight minutes at most."""
    name = "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())
    python, results, loop = sys.executable, out / f"{name}.json", out / f"{name}-loop.json"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    in_parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    kernel_tests = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/kernels/test_*.py"))]

    def sanitizer(tool: str, limit: float) -> Step:
        command = f"compute-sanitizer --tool {tool} --error-exitcode 1 --target-processes application-only".split()
        return Step(
            f"compute-sanitizer {tool}", [*command, *tests, *kernel_tests, "-k", SMALL], limit, "compute-sanitizer",
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # lets it see where each tensor ends
        )  # fmt: skip

    def benchmarks(name: str, files: list[str], results: Path, limit: float, *options: str) -> Step:
        command = [*tests, *files, "--bench-device", "cuda", "--stop-after", f"{limit - 30:g}", *options]
        return Step(name, [*command, "--benchmark-json", str(results)], limit)

    published = ["--smi-checkout", str(smi_checkout)] if smi_checkout else []
    loops = ["bench/bench_inversion.py", "bench/bench_forward.py"]
    report = ["bench/report.py", str(results), str(loop), "--markdown", "--targets", "--plots", str(out / name)]
    return [
        Step("tests on the GPU", [*tests, "-m", "cuda", *in_parallel], 90),
        sanitizer("memcheck", 35),
        sanitizer("racecheck", 35),
        Step("tune", [python, "bench/tune.py", "--seconds", "35"], 50),
        benchmarks("benchmarks of the kernels", ["bench/bench_kernels.py"], results, 120),
        benchmarks("benchmarks of the loop", loops, loop, 135, *published),
        Step("report", [python, *report, "--output", str(results.with_suffix(".md"))], 15, results),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where results and the log go")
    parser.add_argument("--smi-checkout", type=Path, help="the authors' published code, to measure beside ours")
    arguments = parser.parse_args()
    out, checkout = arguments.out.resolve(), arguments.smi_checkout
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU that torch can see, so nothing was checked.")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "gpu-check.log", "w") as log:
        results = run_all(steps(out, torch.cuda.get_device_name(), checkout), log)
    print()
    print(as_text([("step", "verdict", "seconds"), *((r.step, r.verdict, f"{r.seconds:.0f}") for r in results)]))
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
