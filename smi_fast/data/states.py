"""States: nested dicts of tensors and numbers in a file, from which a long job goes on."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smi_fast.data.files import atomic_write, checksum
from smi_fast.data.tensors import open_tensors

HEADER_KEY = "smi_fast_state"
KIND = "saved state"
TENSOR, PAIRS = "tensor", "dict"  # the keys that stand for a tensor, and for a dict whose keys are not all texts


def save_state(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write a state to a safetensors file: complete, or not at all.

    The entry "smi_fast_state" of the file's header is a checksum and the state as JSON, in which {"tensor": NAME}
    stands for a tensor of the file. The checksum is the CRC-32 of the JSON followed by the dtypes, shapes and bytes of
    the tensors in their order. Nothing is pickled.

    Args:
        path: the file.
        state: dicts and lists, nested in any way, of tensors, texts, numbers, booleans and None. Tuples are read back
            as lists.

    Raises:
        TypeError: the state holds something else.
        OSError: see `atomic_write`.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_packed(state, tensors))
    named = {str(number): tensor for number, tensor in enumerate(tensors)}
    header = {HEADER_KEY: f"{_checksum(text, tensors):08x} {text}"}  # one entry, because their order is not fixed
    with atomic_write(path) as partial:
        save_file(named, partial, header)


def load_state(path: str | os.PathLike) -> dict[str, Any]:
    """Read a state that `save_state` has written. Its tensors are on the CPU, in memory of their own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else. The message names it.
    """
    with open_tensors(Path(path), HEADER_KEY, KIND) as (file, header):
        expected, _, text = header.partition(" ")
        tensors = [file.get_tensor(str(number)).clone() for number in range(len(file.keys()))]
        if expected != f"{_checksum(text, tensors):08x}":
            raise ValueError("does not have the checksum that it was saved with, it is damaged")
        return _unpacked(json.loads(text), tensors)


def model_checksum(model: nn.Module) -> int:
    """Return the CRC-32 of a model: of its weights, the types of its modules, and their numbers and texts, such as the
    number of heads."""
    value = 0
    for name, module in model.named_modules():
        plain = {key: part for key, part in vars(module).items() if isinstance(part, (int, float, str))}
        shown = sorted((key, part) for key, part in plain.items() if key != "training" and not key.startswith("_"))
        value = zlib.crc32(f"{name} {type(module).__qualname__} {shown}".encode(), value)
    for name, tensor in model.state_dict().items():
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = checksum(tensor.cpu(), value)
    return value


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value as JSON knows it, and append its tensors to the list."""
    if isinstance(value, Tensor):
        # a file may not hold two tensors that share memory
        tensors.append(value.detach().cpu().clone(memory_format=torch.contiguous_format))
        return {TENSOR: len(tensors) - 1}
    if isinstance(value, Mapping):
        pairs = [(key, _packed(item, tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) for key in value) and not {TENSOR, PAIRS} & value.keys()
        return dict(pairs) if plain else {PAIRS: pairs}
    if isinstance(value, (list, tuple)):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a state cannot hold {value!r}, a {type(value).__name__}")


def _unpacked(value: Any, tensors: list[Tensor]) -> Any:
    """Undo `_packed`."""
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        return tensors[value[TENSOR]]
    pairs = value[PAIRS] if value.keys() == {PAIRS} else value.items()
    return {key: _unpacked(item, tensors) for key, item in pairs}


def _checksum(text: str, tensors: list[Tensor]) -> int:
    """Compute the checksum that `save_state` describes."""
    value = zlib.crc32(text.encode())
    for tensor in tensors:
        value = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = checksum(tensor, value)
    return value
