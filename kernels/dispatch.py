"""Which form of a kernel runs, and with which tiles. A table answers, by architecture and size; nothing is autotuned.

`dispatch.json` holds, for each architecture, where its figures come from ("source") and a list of rows for each
operation. A row says what it is for (sizes `up_to` a number and, for attention, the dtype and the head_dim), which
`form` of the operation runs, and with which constants. bench/tune.py writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend import next_power_of_2

TABLE = Path(__file__).with_name("dispatch.json")
DESCRIBES = ("up_to", "dtype", "head_dim", "form")  # the fields of a row that are no constants of a kernel
INTERPRETED_AS = "sm_90"  # the architecture that is assumed where there is no GPU
_overrides: dict[str, tuple[str, dict[str, Any]]] = {}
Kind = tuple[tuple[str, Any], ...]  # the fields besides its size that a row has to match, sorted by name


def choose(operation: str, device: torch.device, size: int, **kind) -> tuple[str, dict[str, Any]]:
    """The form of an operation, and a copy of the constants to launch it with.

    Args:
        operation: the name of a list in the table, such as "attention_forward".
        device: where the operation runs.
        size: the number that the rows' `up_to` is compared with, such as the tokens of the longest sequence.
        kind: further fields that a row has to match, such as dtype="half" and head_dim=64.

    Raises:
        ValueError: the table has no row for these arguments.
    """
    if operation in _overrides:
        form, constants = _overrides[operation]
    else:
        form, constants = _choose(operation, architecture(device), size, tuple(sorted(kind.items())))
    return form, dict(constants)


@contextmanager
def override(choices: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[None]:
    """Let `choose` answer with these forms and constants instead of the table's, to tune, to test and to compile."""
    before = dict(_overrides)
    _overrides.update(choices)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def choose_attention(operation: str, qkv: Tensor, max_seqlen: int) -> tuple[str, dict[str, Any]]:
    """`choose` for the dtype and the head dim of a tensor (..., D)."""
    return choose(operation, qkv.device, max_seqlen, **_attention_kind(qkv))


def attention_has_form(form: str, operation: str, qkv: Tensor, max_seqlen: int) -> bool:
    """Whether `choose_attention` takes this form.

    `max_seqlen` is compared only with the lengths at which the answer changes. It may be a symbol while torch.compile
    traces, and the graph then serves all lengths that have the same answer.
    """
    if operation in _overrides:
        return _overrides[operation][0] == form
    kind = tuple(sorted(_attention_kind(qkv).items()))
    for up_to, same in _runs(form, operation, architecture(qkv.device), kind):
        if max_seqlen <= up_to:
            return same
    raise ValueError(f"no row of {TABLE.name} is for {operation}, size {max_seqlen}, {dict(kind)}")


def _attention_kind(qkv: Tensor) -> dict[str, Any]:
    dtype = "float32" if qkv.dtype == torch.float32 else "half"
    return {"dtype": dtype, "head_dim": padded_head_dim(qkv.shape[-1])}


def padded_head_dim(head_dim: int) -> int:
    """How many channels a tile has: the least power of two that holds a head, and no less than a product takes."""
    return max(16, next_power_of_2(head_dim))


@lru_cache
def architecture(device: torch.device) -> str:
    """The architecture of the table whose rows a device uses."""
    if device.type != "cuda":
        return INTERPRETED_AS
    return nearest(*torch.cuda.get_device_capability(device))


def nearest(major: int, minor: int) -> str:
    """The architecture of the table for a compute capability: its own or the nearest older one, else the oldest. So
    sm_103 uses the rows of sm_100, sm_87 those of sm_86, and sm_75 those of sm_80."""
    capability = 10 * major + minor
    known = sorted(int(name.removeprefix("sm_")) for name in table())
    return f"sm_{max((other for other in known if other <= capability), default=known[0])}"


@lru_cache
def table() -> dict[str, dict[str, Any]]:
    """The contents of `dispatch.json`."""
    return json.loads(TABLE.read_text())


@lru_cache
def _choose(operation: str, arch: str, size: int, kind: Kind) -> tuple[str, dict[str, Any]]:
    for row in rows_of(operation, arch, **dict(kind)):
        if size <= row["up_to"]:
            return choice_of(row)
    raise ValueError(f"no row of {TABLE.name} is for {operation} on {arch}, size {size}, {dict(kind)}")


def rows_of(operation: str, arch: str, **kind) -> list[dict[str, Any]]:
    """The rows of the table for one kind of an operation on an architecture, the least `up_to` first."""
    rows = [row for row in table()[arch][operation] if kind.items() <= row.items()]
    return sorted(rows, key=lambda row: row["up_to"])


@lru_cache
def _runs(form: str, operation: str, arch: str, kind: Kind) -> list[tuple[int, bool]]:
    """The sizes up to which the rows are, in turn, all of this form or all of others, each with which of the two."""
    answers = [(row["up_to"], row.get("form", "") == form) for row in rows_of(operation, arch, **dict(kind))]
    return [list(run)[-1] for _, run in groupby(answers, key=lambda answer: answer[1])]


def choice_of(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The form and the constants in a row of the table."""
    form, constants = row.get("form", ""), {name: value for name, value in row.items() if name not in DESCRIBES}
    return form, constants
