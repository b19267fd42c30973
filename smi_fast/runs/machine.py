"""What results depend on besides their settings: versions, the device, and the number of threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import smi_fast


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of the libraries that results depend on."""
    libraries = {"torch": torch.__version__, "timm": timm.__version__}
    return {"smi_fast": smi_fast.__version__, "python": platform.python_version()} | libraries


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return processor(device)
    threads = torch.get_num_threads()
    return f"{processor(device)}, {threads} thread{'s' * (threads > 1)}"


def processor(device: torch.device) -> str:
    """Return the name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def made_with(device: torch.device, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what the manifest of a run says about how it was made.

    Args:
        device: the device of the run.
        command: the arguments of the command that began it, for `--resume`.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else None
    command = None if command is None else list(command)
    where = {"command": command, "directory": os.getcwd()}
    return {"device": processor(device), "versions": versions(), "threads": threads, **where}
