"""A correction of Triton's interpreter, which rounds to bfloat16 toward zero and multiplies such tiles as integers."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _round(x: np.ndarray) -> np.ndarray:
    """Round float32 to the bits of the nearest bfloat16, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _widen(bits: np.ndarray) -> np.ndarray:
    """Convert the bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair() -> None:
    """Replace the interpreter's conversion from float32 to bfloat16, and its matrix product of two bfloat16 tiles."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_round(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(_widen(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *args)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
