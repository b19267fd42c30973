"""evaluate(): a model's accuracy within a run, which goes on in the middle of the test images, and contents(): by what
the run knows the images again."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from smi_fast.data.files import checksum
from smi_fast.data.labelled import accuracy
from smi_fast.runs.run import Run


def evaluate(
    run: Run, name: str, make: Callable[[], nn.Module], test: DataLoader, progress: bool = True
) -> dict[str, float]:
    """Measure a model's accuracy, from the checkpoint of this name if there is one. The last checkpoint stays, so that
    nothing is measured twice.

    Args:
        run: the run.
        name: the name of the checkpoint. It stands for the model and the images.
        make: returns the model. It is not called if all images have been seen.
        test: batches of images and labels, in the same order in every process.
        progress: show a progress bar.

    Returns:
        "accuracy", the share in [0, 1] of images whose largest logit is that of their label, and "seconds", the time
        that the evaluation took in all processes.

    Raises:
        Stopped: a signal has asked for an end. The checkpoint counts the images that were seen.
    """
    state, total = run.checkpoint(name) or {"right": 0, "seen": 0, "seconds": 0.0}, len(test.dataset)
    if state["seen"] < total:
        started, before = time.perf_counter() - state["seconds"], (int(state["right"]), state["seen"])
        rest = DataLoader(
            Subset(test.dataset, range(state["seen"], total)), test.batch_size, num_workers=test.num_workers
        )  # fmt: skip

        def callback(right: Tensor, seen: int) -> None:
            nonlocal state
            state = {"right": right, "seen": seen, "seconds": time.perf_counter() - started}
            run.pause(name, lambda: state)

        accuracy(make(), rest, progress=progress, before=before, callback=callback)
        run.save(name, state)
    return {"accuracy": int(state["right"]) / state["seen"], "seconds": state["seconds"]}


def contents(data: Dataset, prefix: str) -> dict[str, Any]:
    """Return what tells labelled images from others, wherever their folder lies: the names of their classes, the number
    of images, and a CRC-32 of names, sizes and labels of all files. Files are not read. Of images that are in memory,
    as those of CIFAR are, it is the CRC-32 of pixels and labels.

    Args:
        data: what `load_data` has returned, or a part of it.
        prefix: what the names of the entries begin with.
    """
    count = len(data)
    if isinstance(data, Subset):
        data = data.dataset
    if hasattr(data, "samples"):
        value = 0
        for file, label in data.samples:
            name = file.removeprefix(data.root).lstrip(os.sep)
            value = zlib.crc32(f"{name}\0{os.stat(file).st_size} {label}\n".encode(errors="surrogateescape"), value)
    else:
        value = checksum(torch.tensor(data.targets), checksum(torch.from_numpy(data.data)))
    return {f"{prefix}_classes": data.classes, f"{prefix}_images": count, f"{prefix}_files": value}
