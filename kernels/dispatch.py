"""Look up which form of a kernel runs, and with which tiles, by architecture and size. Nothing is autotuned.

`dispatch.json` holds, for each architecture, where its figures come from ("source") and a list of rows for each
operation. A row says what it is for (sizes `up_to` a number and, for attention, the dtype and the head_dim), which
`form` of the operation runs, and with which constants. bench/tune.py writes the table.
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
DESCRIBES = ("up_to", "dtype", "head_dim", "form")  # the fields of a row that are not constants of a kernel
INTERPRETED_AS = "sm_90"  # the architecture that is assumed where there is no GPU
_overrides: dict[str, tuple[str, dict[str, Any]]] = {}
Kind = tuple[tuple[str, Any], ...]  # the fields besides its size that a row has to match, sorted by name


def choose(operation: str, device: torch.device, size: int, **kind) -> tuple[str, dict[str, Any]]:
    """Return the form of an operation, and a copy of the constants to launch it with.

    Args:
        operation: the name of a list in the table, such as "attention_forward".
        device: where the operation runs.
        size: the number that the rows' `up_to` is compared with, such as the tokens of the longest sequence.
        kind: further fields that a row has to match, such as dtype="half" and head_dim=64.

    Raises:
        ValueError: the table has no row for these arguments.
    """
    return _find(operation, device, size, tuple(sorted(kind.items())) if kind else ())


def _find(operation: str, device: torch.device, size: int, kind: Kind) -> tuple[str, dict[str, Any]]:
    form, constants = _overrides.get(operation) or _choose(operation, architecture(device), size, kind)
    return form, dict(constants)


@contextmanager
def override(choices: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[None]:
    """Make `choose` return these forms and constants instead of the table's, to tune, test or compile kernels."""
    before = dict(_overrides)
    _overrides.update(choices)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def choose_attention(operation: str, qkv: Tensor, max_seqlen: int) -> tuple[str, dict[str, Any]]:
    """Call `choose` for the dtype and the head dim of a tensor (..., D)."""
    return _find(operation, qkv.device, max_seqlen, _attention_kind(qkv.dtype, qkv.shape[-1]))


@lru_cache
def _attention_kind(dtype: torch.dtype, head_dim: int) -> Kind:
    return ("dtype", "float32" if dtype == torch.float32 else "half"), ("head_dim", padded_head_dim(head_dim))


def padded_head_dim(head_dim: int) -> int:
    """Return the channels of a tile: the smallest power of two that holds a head, at least the 16 that tl.dot needs."""
    return max(16, next_power_of_2(head_dim))


@lru_cache
def architecture(device: torch.device) -> str:
    """Return the architecture whose rows of the table a device uses."""
    if device.type != "cuda":
        return INTERPRETED_AS
    return nearest(*torch.cuda.get_device_capability(device))


def nearest(major: int, minor: int) -> str:
    """Return the architecture of the table for a compute capability: its own, the nearest older one, or the oldest.
    For example, sm_103 uses the rows of sm_100, sm_87 the rows of sm_86, and sm_75 the rows of sm_80."""
    capability = 10 * major + minor
    known = sorted(int(name.removeprefix("sm_")) for name in table())
    return f"sm_{max((other for other in known if other <= capability), default=known[0])}"


@lru_cache
def table() -> dict[str, dict[str, Any]]:
    """Return the contents of `dispatch.json`."""
    return json.loads(TABLE.read_text())


@lru_cache
def _choose(operation: str, arch: str, size: int, kind: Kind) -> tuple[str, dict[str, Any]]:
    for row in rows_of(operation, arch, **dict(kind)):
        if size <= row["up_to"]:
            return choice_of(row)
    raise ValueError(f"no row of {TABLE.name} is for {operation} on {arch}, size {size}, {dict(kind)}")


def rows_of(operation: str, arch: str, **kind) -> list[dict[str, Any]]:
    """Return the rows of the table for one kind of an operation on an architecture, sorted by `up_to`."""
    rows = [row for row in table()[arch][operation] if kind.items() <= row.items()]
    return sorted(rows, key=lambda row: row["up_to"])


def choice_of(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the form and the constants in a row of the table."""
    form, constants = row.get("form", ""), {name: value for name, value in row.items() if name not in DESCRIBES}
    return form, constants
