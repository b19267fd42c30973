"""Runs every product that we call, forward and backward, while a timer interrupts it (see test_linear.py).

    python interrupted_products.py STACK_PROBE

prints how often each was interrupted and how often its stack pointer was outside of the stack then, as JSON. Without a
probe the interrupts run an empty Python handler: a product that leaves its stack aborts the process sooner or later.
"""

import ctypes
import json
import signal
import sys
import time

import torch
from smi_fast.kernels import attention
from smi_fast.kernels.linear import PackedWeight, can_pack, linear

SHAPES = [(20, 192, 768), (47, 192, 10), (47, 10, 192), (300, 192, 576), (300, 768, 192), (1300, 192, 768)]


def products():
    """name -> a function that multiplies forward and backward."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, inputs, outputs in SHAPES:
            x, weight = (
                torch.randn(rows, inputs, dtype=dtype, requires_grad=True),
                torch.randn(outputs, inputs).to(dtype),
            )
            layouts = {"plain": weight, "transposed": weight.t().contiguous().t()}
            if can_pack(dtype, x.device):
                layouts["packed"] = PackedWeight(weight)
            grad = torch.randn(rows, outputs, dtype=dtype)
            for layout, laid_out in layouts.items():
                name = f"{rows}x{inputs}x{outputs} {layout} {dtype}"
                yield name, lambda x=x, w=laid_out, grad=grad: torch.autograd.grad(linear(x, w), x, grad)
        qkv = torch.randn(8 * 47, 3, 3, 64, dtype=dtype, requires_grad=True)
        lengths = torch.arange(0, 9 * 47, 47, dtype=torch.int32)
        yield f"attention {dtype}", lambda x=qkv, n=lengths: torch.autograd.grad(attention(x, n, 47).sum(), x)


def repeat(function, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        function()


def main() -> None:
    torch.set_num_threads(1)
    probe = ctypes.CDLL(sys.argv[1]) if len(sys.argv) > 1 else None
    counts = {}
    for name, function in products():
        function()
        if probe:
            interrupts = ctypes.c_long()
            probe.probe_start(ctypes.c_long(100))
            repeat(function, 0.05)
            counts[name] = [probe.probe_stop(ctypes.byref(interrupts)), interrupts.value]
        else:
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            repeat(function, 0.05)
            signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
