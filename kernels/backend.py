"""Which implementation of an operation runs: the Triton kernels, or the plain torch that defines them."""

from __future__ import annotations

import os

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # a machine without Triton: the kernels stay plain functions that nothing launches
    triton = tl = None

    def jit(function):
        return function


# Triton decides once, when a kernel is defined, between compiling it and interpreting it on the CPU.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from .interpreter import repair

    repair()


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that runs, "triton" or "torch".

    Args:
        backend: "auto" takes Triton on a CUDA device where it can be imported, and plain torch elsewhere.
        device: where the tensors of the operation are.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend {backend!r} is none of "auto", "triton" and "torch"')
    if backend == "auto":
        return "triton" if device.type == "cuda" and triton is not None else "torch"
    if backend == "triton" and triton is None:
        raise ValueError('backend "triton" needs the package triton, which cannot be imported here')
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f'backend "triton" needs tensors on a CUDA device, not on {device.type!r}; '
            "TRITON_INTERPRET=1 in the environment interprets the kernels on the CPU, slowly"
        )
    return backend


def triton_status() -> str:
    """A sentence that says why backend "auto" does or does not take Triton on this machine."""
    if triton is None:
        return "Triton is not in use: the package triton cannot be imported."
    if not torch.cuda.is_available():
        how = "interprets its kernels on request (TRITON_INTERPRET=1)" if INTERPRETED else "is not in use"
        return f"Triton {triton.__version__} {how}: torch sees no CUDA device."
    return f"Triton {triton.__version__} is in use on {torch.cuda.get_device_name()}."


def launch(kernel, grid: tuple[int, ...], *args, **arguments) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current device.

    Args:
        kernel: a function that `jit` made.
        grid: the number of programs along up to three axes.
        arguments: the kernel's arguments by name, and Triton's options such as num_warps.
    """
    first = next(value for value in (*args, *arguments.values()) if isinstance(value, torch.Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*args, **arguments)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()
