"""Operations on a CPU in C++, in one pass each, where plain torch takes one for every operator.

`cpu.cpp` is compiled by g++ for the processor that it runs on when it is first needed, which takes two seconds, and
kept in the user's cache. Where there is no g++, plain torch computes everything. SMI_FAST_CPU_KERNELS=0 in the
environment does without, and =1 makes it an error if they cannot be had.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .gradients import transformed
from .operators import traced

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = "g++"
# Neither option changes a number. -ffast-math would, in the whole process.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
CPP_TYPES = {torch.float32: 0, torch.bfloat16: 1}
# The arguments of each function: r is a tensor of rows (its address and dtype), p any other tensor (its address), i an
# integer and f a float32. The number of threads follows.
ARGUMENTS = {
    "residual_norm": "rrprrrrriiif",
    "residual_norm_backward": "rrrrrprriii",
    "attention": "rpprpiiiif",
    "attention_backward": "rrprpiiiif",
    "gather_patches": "rpppppp" + 8 * "i",
    "prior_squares": "ppp" + 7 * "i",
    "pixel_step": "pppprppppppipipi" + "ffff" + 8 * "i",
}
CTYPES = {
    "r": (ctypes.c_void_p, ctypes.c_int64),
    "p": (ctypes.c_void_p,),
    "i": (ctypes.c_int64,),
    "f": (ctypes.c_float,),
}


def suits_cpp(*tensors: Tensor | None) -> bool:
    """Return whether an operation on these tensors can run in C++: they are on a CPU and float32 or bfloat16, and
    nothing but autograd has to see what is computed."""
    for x in tensors:
        if x is not None and not (x.is_cpu and x.dtype in CPP_TYPES):
            return False
    return not (traced(*tensors, modes=_recorder.record is not None) or transformed()) and library() is not None


def call_cpp(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of `cpu.cpp`. It reads and writes contiguous memory, unless it takes a stride.

    Raises:
        ValueError: indices, such as cumulative lengths, lead out of a tensor.
    """
    if _recorder.record is not None:
        _recorder.record(call_cpp, (function, *arguments))
    values = []
    for kind, value in zip(ARGUMENTS[function], arguments, strict=True):
        if kind in "rp":
            values.append(None if value is None else value.data_ptr())
            if kind == "r":
                values.append(0 if value is None else CPP_TYPES[value.dtype])
        else:
            values.append(value)
    wrong = getattr(library(), function)(*values, torch.get_num_threads())
    if wrong is not None:
        raise ValueError(wrong.decode())


class _Recorder(threading.local):
    record: Callable[[Callable, tuple], None] | None = None


_recorder = _Recorder()


@contextmanager
def recording(record: Callable[[Callable, tuple], None]) -> Iterator[None]:
    """Let a mode of torch's dispatcher that is active in this thread see what runs in C++ too: `record(function,
    arguments)` is called before each `function(*arguments)`."""
    before, _recorder.record = _recorder.record, record
    try:
        yield
    finally:
        _recorder.record = before


@lru_cache
def library() -> ctypes.CDLL | None:
    """Load the functions, compiled now or earlier, or return None where there are none.

    Raises:
        ValueError: SMI_FAST_CPU_KERNELS is none of auto, 0 and 1.
        RuntimeError: it is 1, and the functions cannot be compiled.
    """
    setting = os.environ.get("SMI_FAST_CPU_KERNELS", "auto")
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"SMI_FAST_CPU_KERNELS={setting} is none of auto, 0 and 1")
    if setting == "0":
        return None
    try:
        functions = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        if setting == "1":
            raise RuntimeError(f"SMI_FAST_CPU_KERNELS=1, but {SOURCE.name} cannot be compiled: {reason}") from error
        if not isinstance(error, FileNotFoundError):
            warnings.warn(f"plain torch computes everything: {SOURCE.name} cannot be compiled: {reason}", stacklevel=2)
        return None
    for name, kinds in ARGUMENTS.items():
        getattr(functions, name).argtypes = [*(c for kind in kinds for c in CTYPES[kind]), ctypes.c_int64]
        getattr(functions, name).restype = ctypes.c_char_p
    return functions


def _load() -> ctypes.CDLL:
    """Load the functions from the user's cache, after compiling them into it if it does not hold them. Where there is
    no such folder, or none that can be written to, they are compiled for this process alone."""
    if not _has_compiler():
        raise FileNotFoundError(f"there is no {COMPILER} for Linux")
    version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join((SOURCE.read_text(), *FLAGS, version, _processor())).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smi-fast"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"cpu-{key}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as build:  # another process may compile at the same time
                _compile(Path(build) / path.name).replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError):  # a RuntimeError says that the user has no home
        with tempfile.TemporaryDirectory(prefix="smi-fast-") as build:  # the library stays loaded without its file
            return ctypes.CDLL(str(_compile(Path(build) / "cpu.so")))


def _compile(path: Path) -> Path:
    subprocess.run([COMPILER, *FLAGS, SOURCE, "-o", path], check=True, capture_output=True, text=True)
    return path


def _has_compiler() -> bool:
    return sys.platform == "linux" and shutil.which(COMPILER) is not None


def _processor() -> str:
    """Return what decides the code for this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(
            line for line in lines if line.split(":")[0].strip() in ("vendor_id", "model", "flags", "Features")
        )
    except OSError:
        return platform.processor()


def cpu_status() -> str:
    """Return a sentence that says whether operations on a CPU run in C++, and if not, why."""
    if library() is not None:
        return f"{SOURCE.name} is compiled for this processor."
    if os.environ.get("SMI_FAST_CPU_KERNELS") == "0":
        return f"{SOURCE.name} is not in use: SMI_FAST_CPU_KERNELS=0."
    reason = f"there is no {COMPILER} for Linux here" if not _has_compiler() else f"{COMPILER} cannot compile it"
    return f"{SOURCE.name} is not in use: {reason}."
