"""Which implementation of an operation runs: the Triton kernels, or the plain torch that defines them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradients import transformed
from .operators import wants_gradient

try:
    import triton
    import triton.language as tl

    jit, knobs = triton.jit, getattr(triton, "knobs", None)
except ImportError:  # Without Triton the kernels stay plain functions, which nothing launches.
    triton = tl = knobs = None

    def jit(function=None, **options):
        return jit if function is None else function


HOOKS = None  # the hooks of Triton's launches, if it is Triton 3.5 or newer
if hasattr(knobs, "HookChain"):
    HOOKS = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
LEAST_CAPABILITY = (8, 0)  # older GPUs have neither bfloat16 nor the shared memory of the kernels' tiles
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Triton decides when a kernel is defined whether it will be compiled or interpreted on the CPU.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from .interpreter import repair

    repair()


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the backend that an operation runs on, "triton" or "torch".

    Args:
        backend: "auto" chooses Triton on a CUDA device of compute capability 8.0 or later, if it can be imported, and
            plain torch otherwise.
        device: where the tensors of the operation are.

    Raises:
        ValueError: the name is unknown, or it is "triton" and Triton cannot run there.
    """
    # Each operation asks, so that the answer is kept. torch.compile would trace through the cache with a warning.
    return _resolve(backend, device) if torch.compiler.is_compiling() else _resolved(backend, device)


def _resolve(backend: str, device: torch.device) -> str:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend {backend!r} is none of "auto", "triton" and "torch"')
    if backend == "auto":
        return "triton" if device.type == "cuda" and _missing(device) is None else "torch"
    if backend == "triton" and (missing := _missing(device)) is not None:
        raise ValueError(f'backend "triton" needs {missing}')
    return backend


_resolved = lru_cache(_resolve)


def _missing(device: torch.device) -> str | None:
    """Return what Triton needs to run on a device and does not have, or None if it can run there."""
    if triton is None:
        return "the package triton, which cannot be imported here"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        hint = "TRITON_INTERPRET=1 in the environment interprets the kernels on the CPU, slowly"
        return f"tensors on a CUDA device, not on {device.type!r}; {hint}"
    # Fake tensors can be on a GPU that is not there, which counts as a recent one.
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else LEAST_CAPABILITY
    if capability < LEAST_CAPABILITY:
        return "a GPU of compute capability {}.{} or later, and {} has {}.{}".format(
            *LEAST_CAPABILITY, device, *capability
        )
    return None


def gives_way(backend: str, inputs: Sequence[Tensor | None], weights: Sequence[Tensor | None]) -> bool:
    """Return whether an operation whose kernels compute gradients of its inputs only runs in plain torch: if the
    backend says so, for float64, if one of the weights asks for a gradient, and while a transform is active.

    Args:
        backend: "auto", "triton" or "torch".
        inputs, weights: the operation's tensors, the first of which is on the operation's device, or None.

    Raises:
        ValueError: the backend is "triton", but cannot run there or one of the tensors is float64.
    """
    double = torch.float64 in [x.dtype for x in (*inputs, *weights) if x is not None]
    if double and backend == "triton":
        raise ValueError('backend "triton" does not compute torch.float64')
    if (double and backend == "auto") or resolve_backend(backend, inputs[0].device) == "torch" or transformed():
        return True
    return wants_gradient(*weights)


def check_floats(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a tensor that has not this shape and a dtype that kernels compute, or is on another device.

    Raises:
        ValueError: which names the tensor, and what is wrong with it.
    """
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {x.dtype}, not float32, bfloat16, float16 or float64")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, x on {device}")


def triton_status() -> str:
    """Return a sentence that says whether backend "auto" uses Triton on this machine, and why."""
    if triton is None:
        return "Triton is not in use: the package triton cannot be imported."
    if not torch.cuda.is_available():
        how = "interprets its kernels on request (TRITON_INTERPRET=1)" if INTERPRETED else "is not in use"
        return f"Triton {triton.__version__} {how}: torch sees no CUDA device."
    name, missing = torch.cuda.get_device_name(), _missing(torch.device("cuda", torch.cuda.current_device()))
    if missing is not None:
        return f"Triton {triton.__version__} is not in use on {name}: it needs {missing}."
    return f"Triton {triton.__version__} is in use on {name}."


class Launch(NamedTuple):
    """One launch of a kernel: its grid, and its arguments, constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_recording: list[Launch] | None = None


def launch(kernel, grid: tuple[int, ...], /, **arguments) -> None:
    """Run a kernel on the device of the first tensor among its arguments, which need not be the current device.

    Args:
        kernel: a function that `jit` made.
        grid: the number of programs along up to three axes.
        arguments: the kernel's arguments by name, and Triton's options such as num_warps.
    """
    if _recording is not None:
        _recording.append(Launch(kernel, grid, arguments))
        return
    key, values, addresses, device = [id(kernel), *arguments], [], 0, None
    for x in arguments.values():
        if isinstance(x, Tensor):
            if device is None:
                device = x.get_device()
            key.append(x.dtype)
            x = x.data_ptr()
            addresses |= x
        else:
            key.append(x)
        values.append(x)
    key.append(device)
    if addresses % 16:
        key += [x.data_ptr() % 16 for x in arguments.values() if isinstance(x, Tensor)]
    if device < 0 or device == torch._C._cuda_getDevice():
        _launch(kernel, grid, device, arguments, tuple(key), values)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, device, arguments, tuple(key), values)


class _Compiled(NamedTuple):
    """How Triton launches a compiled kernel."""

    run: Callable
    function: int
    metadata: tuple
    ordered: Callable[[list], tuple]  # puts the values of a launch's arguments in the kernel's order
    kernel: Any


_compiled: dict[tuple, _Compiled] = {}
MAX_COMPILED = 4096  # each number of tokens or rows makes entries of its own
ONES = (1, 1, 1)


def _launch(kernel, grid: tuple[int, ...], device: int, arguments: dict[str, Any], key: tuple, values: list) -> None:
    """Launch a kernel on the current device. Triton looks for the compiled kernel only if these arguments are new to
    the process, because its search takes several times as long as a launch.

    Triton compiles for the dtype of a tensor, for whether its address is a multiple of 16, and for constants and
    properties of numbers. In the key a number counts by its value, which decides all of these. The values are those of
    the arguments, with addresses for tensors, about which Triton would ask the driver.
    """
    known = _compiled.get(key)
    if known is not None and not _hooked():
        run, function, metadata, ordered, _ = known
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*grid, *ONES[len(grid) :], stream, function, metadata, None, None, None, *ordered(values))
        return
    compiled = kernel.run(grid=grid, warmup=False, **arguments)  # kernel[grid](**arguments) would copy them once more
    if compiled is not None and not _hooked():  # None comes from the interpreter
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        names = list(arguments)
        order = itemgetter(*map(names.index, kernel.arg_names))
        _compiled[key] = _Compiled(compiled.run, compiled.function, compiled.packed_metadata, order, kernel)


def _hooked() -> bool:
    """Return whether Triton has to make every launch, because a profiler, for example, has hooked onto its launches or
    its version does it in another way than the one that `_launch` knows."""
    if HOOKS is None:
        return True
    enter, exit_ = HOOKS
    changed = knobs.runtime.launch_enter_hook is not enter or knobs.runtime.launch_exit_hook is not exit_
    return changed or bool(enter.calls or exit_.calls)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of this process instead of running them, to see or to compile them.

    No kernel runs, so tensors may be on the device "meta", and outputs are left unwritten.
    """
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a new contiguous tensor of the shape of x. The host has it sooner than by `x.new_empty(x.shape)`."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()
