"""Which form of a kernel runs, with which tiles: looked up in a table by architecture and size, never searched for.

`dispatch.json` holds, for each architecture, where its figures come from ("source") and a list of rows for each
operation. A row says what it is for (`up_to` a size, and where that matters dtype and head_dim), which `form` of the
operation runs and with which constants. bench/tune.py writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend import next_power_of_2

TABLE = Path(__file__).with_name("dispatch.json")
DESCRIBES = ("up_to", "dtype", "head_dim", "form")  # what of a row is no constant
INTERPRETED_AS = "sm_90"  # what the interpreter, and tensors without memory, take for the architecture
_overrides: dict[str, tuple[str, dict[str, Any]]] = {}


def choose(operation: str, device: torch.device, size: int, **kind) -> tuple[str, dict[str, Any]]:
    """The form of an operation, and the constants to launch it with: copied, so that the caller may change them.

    Args:
        operation: a list of the table, such as "attention_forward".
        device: where it runs.
        size: tokens of the longest sequence, or what else the rows count up to.
        kind: what else a row has to match, such as dtype="half" and head_dim=64.

    Raises:
        ValueError: the table has no row for that.
    """
    if operation in _overrides:
        form, constants = _overrides[operation]
    else:
        form, constants = _choose(operation, architecture(device), size, tuple(sorted(kind.items())))
    return form, dict(constants)


@contextmanager
def override(choices: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[None]:
    """Let `choose` answer with these forms and constants, whatever the table says: to tune, to test and to compile."""
    before = dict(_overrides)
    _overrides.update(choices)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def choose_attention(operation: str, qkv: Tensor, max_seqlen: int) -> tuple[str, dict[str, Any]]:
    """`choose` by the dtype and the head dim of a tensor whose last dimension is D."""
    dtype = "float32" if qkv.dtype == torch.float32 else "half"
    return choose(operation, qkv.device, max_seqlen, dtype=dtype, head_dim=padded_head_dim(qkv.shape[-1]))


def padded_head_dim(head_dim: int) -> int:
    """Channels in a tile: a power of two, and no fewer than a matrix product takes."""
    return max(16, next_power_of_2(head_dim))


@lru_cache
def architecture(device: torch.device) -> str:
    """The name in the table for a device: its own, or that of the nearest older one with as much shared memory."""
    if device.type != "cuda":
        return INTERPRETED_AS
    return nearest(*torch.cuda.get_device_capability(device))


def nearest(major: int, minor: int) -> str:
    """The architecture of the table for a compute capability: sm_103 runs as sm_100, sm_87 as sm_86, sm_75 as sm_80."""
    capability = 10 * major + minor
    known = sorted(int(name.removeprefix("sm_")) for name in table())
    return f"sm_{max((other for other in known if other <= capability), default=known[0])}"


@lru_cache
def table() -> dict[str, dict[str, Any]]:
    return json.loads(TABLE.read_text())


@lru_cache
def _choose(operation: str, arch: str, size: int, kind: tuple[tuple[str, Any], ...]) -> tuple[str, dict[str, Any]]:
    wanted = dict(kind)
    rows = [row for row in table()[arch][operation] if size <= row["up_to"] and wanted.items() <= row.items()]
    if not rows:
        raise ValueError(f"no row of {TABLE.name} is for {operation} on {arch}, size {size}, {wanted}")
    return choice_of(min(rows, key=lambda row: row["up_to"]))


def choice_of(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The form and the constants that a row of the table says."""
    form, constants = row.get("form", ""), {name: value for name, value in row.items() if name not in DESCRIBES}
    return form, constants
