"""Whether a process that works for long stays as it is: its memory, its open files and its threads.

    python bench/soak.py [--inversions 2000] [--images 2000]

Inverts a small model again and again in one process, each tenth time into the folder of a run, and compares the process
after a tenth of the inversions with the process at the end. Then compares the peak memory of a process that makes 20
images with that of one that makes many. The exit code is 1 if something grew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import smi_fast
from smi_fast.cli.report import write_report
from smi_fast.models import cifar10_vit
from smi_fast.runs.inversion import invert
from smi_fast.runs.machine import processor
from smi_fast.studies.report import as_text

FEW, BATCH, SIDE = 20, 10, 64  # images, images at once, and pixels
ALLOWED = 4.0  # MiB that memory may grow by, because an allocator keeps some of what was freed


def small_inverter(iterations: int, side: int = 8) -> smi_fast.Inverter:
    """Return an inverter for images of side x side pixels in 4x4 patches, half of which stop in the middle."""
    torch.manual_seed(0)
    shape = dict(img_size=side, patch_size=side // 4, depth=2, embed_dim=32, num_heads=2, num_classes=5)
    stopping = {iterations // 2: 0.5}
    return smi_fast.Inverter(cifar10_vit(False, **shape), stopping=stopping, iterations=iterations, progress=False)


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}


def memory() -> float:
    """Return this process's memory in MiB, without files that are mapped into it, which the system may drop."""
    return int(status()["RssAnon"]) / 1024


def measure() -> dict[str, float]:
    """Return the memory of this process in MiB, without what is free but kept by the allocators of Python and of the C
    library, and the numbers of its open files and threads."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"MiB": memory(), "files": len(os.listdir("/proc/self/fd")), "threads": int(status()["Threads"])}


def soak(inversions: int) -> dict[int, dict[str, float]]:
    """Invert so many times, and return what `measure` says after each tenth of them."""
    inverter, targets = small_inverter(8), torch.arange(4)
    found = {}
    for number in range(1, inversions + 1):
        if number % 10 == 0:
            with tempfile.TemporaryDirectory() as folder:
                invert(inverter, targets, folder, batch_size=2, seed=number, checkpoint_every=1e-9)
        else:
            inverter.run(targets, seed=number)
        if number % (inversions // 10) == 0:
            found[number] = measure()
    return found


def peak_memory(images: int) -> float:
    """Return the peak memory, in MiB, of a new process that makes so many images, as `smi-fast invert` does."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_make, images).result()


def _make(images: int) -> float:
    found = []

    def note(*_: object) -> None:
        found.append(memory())

    with tempfile.TemporaryDirectory() as folder:
        dataset = invert(
            small_inverter(2, SIDE), torch.arange(images) % 5, folder, batch_size=BATCH, callback=note,
            finish=lambda run: write_report(run.folder),
        )  # fmt: skip
        assert len(dataset) == images
        note()
    return max(found)


def timed(work: Callable, *arguments: object) -> tuple[object, str]:
    """Return what the work returns, and how long it took."""
    started = time.perf_counter()
    return work(*arguments), f"{time.perf_counter() - started:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inversions", type=int, default=2000, help="inversions in one process")
    parser.add_argument("--images", type=int, default=2000, help="images whose peak memory is compared with that of 20")
    args = parser.parse_args(arguments)
    print(f"{processor(torch.device('cpu'))}, {torch.get_num_threads()} threads")
    found, took = timed(soak, args.inversions)
    rows = [["", "MiB", "open files", "threads"]]
    for number, at in found.items():
        rows.append([f"after {number} inversions", f"{at['MiB']:.1f}", str(at["files"]), str(at["threads"])])
    print(f"{as_text(rows)}\n{took}")
    (few, many), took = timed(lambda: (peak_memory(FEW), peak_memory(args.images)))
    rows = [["", "peak MiB", "pixels in MiB"]]
    for number, peak in ((FEW, few), (args.images, many)):
        rows.append([f"{number} images", f"{peak:.1f}", f"{number * 3 * SIDE**2 * 4 / 2**20:.1f}"])
    print(f"{as_text(rows)}\n{took}")
    growth = {what: found[max(found)][what] - found[min(found)][what] for what in found[min(found)]}
    grew = {
        "the memory": growth["MiB"] > ALLOWED,
        "the peak memory": many - few > ALLOWED,
        "the number of open files": growth["files"] > 0,
        "the number of threads": growth["threads"] > 0,
    }
    for what in (what for what, has_grown in grew.items() if has_grown):
        print(f"{what} grew", file=sys.stderr)
    return int(any(grew.values()))


if __name__ == "__main__":
    sys.exit(main())
