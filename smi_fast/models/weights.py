"""The weights in a user's file. Nothing in the file is ever run, and it cannot claim more memory than it has bytes."""

from __future__ import annotations

import argparse
import ast
import json
import math
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.models import clean_state_dict
from torch import nn

from smi_fast.data.files import atomic_write, first_line
from smi_fast.data.tensors import SUFFIX

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # under which timm, too, looks for a state dict
ZIP = b"PK\3\4"  # how a torch file in the zip format begins


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict, whose tensors are dense and on the CPU, from a safetensors file or a torch file.

    A torch file may hold the state dict under one of the names in `CONTAINERS`. The prefixes that
    DistributedDataParallel and torch.compile add are removed. The weights may be mapped from the file.

    Records of torch's zip format are compared with their CRC-32, which torch itself does not do. Safetensors files and
    torch's older format have no checksums: there, a weight that has become another finite number is not found.

    Raises:
        ValueError: the file is missing or damaged, holds anything but a state dict, or claims more than its size.
    """
    if not path.is_file():
        raise ValueError(f"the checkpoint {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        content = load_file(path) if path.suffix == SUFFIX else _unpickle(path)
        weights = _state_dict(content)
        fault = _fault(weights, path.stat().st_size)
    except Exception as error:  # A damaged pickle can raise almost any error.
        unsafe = "weights_only" in str(error)  # torch's message advises to load the file with weights_only=False
        reason = "it is damaged, or holds more than weights" if unsafe else first_line(error)
        raise ValueError(f"the checkpoint {path} cannot be read: {reason}") from error
    if fault is not None:
        raise ValueError(f"the checkpoint {path} {fault}")
    return weights


def save_weights(
    path: Path,
    model: nn.Module,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: Sequence[int],
) -> None:
    """Write a model's state dict to a safetensors file, and beside it what `read_description` returns.

    Args:
        path: the file, which is replaced if it exists.
        model: a torch module. Tensors are written in its dtype.
        classes: the names of the classes, in the order of the logits.
        mean, std: of the normalisation of its images, a number for each channel.
        image_size: height and width of its images.
    """
    about = {"classes": list(classes), "mean": list(mean), "std": list(std), "image_size": list(image_size)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as partial:
        partial.write_bytes(save(tensors, {key: json.dumps(value) for key, value in about.items()}))


def read_description(path: Path) -> dict[str, Any]:
    """Read what a safetensors file says about the model of its weights, in the words of timm's configurations.

    `label_names`, `mean`, `std` and `input_size` come from the entries `classes`, `mean`, `std` and `image_size` of the
    header, each a JSON list, or a tuple as Python prints it. An entry that is not there is left out. Other kinds of
    files have none of them.

    Raises:
        ValueError: an entry is not what `save_weights` writes. The message names it.
    """
    if path.suffix != SUFFIX:
        return {}
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    found = {}
    for key, (ours, fits) in DESCRIPTION.items():
        if key in header:
            value = _sequence(header[key])
            if not value or not fits(value):
                raise ValueError(f"the checkpoint {path} has a header whose {key} is {header[key][:80]!r}")
            found[ours] = value
    if "input_size" in found:
        found["input_size"] = (len(found.get("mean", (0, 0, 0))), *found["input_size"])
    return found


def _sequence(text: str) -> tuple | None:
    """Read a list in JSON, or a list or tuple as Python prints it. Return None if the text is neither."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = read(text)
            return tuple(value) if isinstance(value, (list, tuple)) else None
    return None


def _is_real(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


DESCRIPTION = {  # entries of a header -> their names in timm's configurations, and what each list must be
    "classes": ("label_names", lambda names: all(isinstance(name, str) for name in names)),
    "mean": ("mean", lambda mean: all(map(_is_real, mean))),
    "std": ("std", lambda std: all(_is_real(value) and value > 0 for value in std)),
    "image_size": ("input_size", lambda size: len(size) == 2 and all(type(side) is int and side > 0 for side in size)),
}


def _unpickle(path: Path) -> object:
    with path.open("rb") as file:
        zipped = file.read(len(ZIP)) == ZIP
    if zipped:
        _check_records(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # timm's files hold `args`
        warnings.simplefilter("ignore")  # about old forms of pickles
        # A mapped storage cannot reach beyond the file, whatever size the pickle gives it.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _check_records(path: Path) -> None:
    """Check the size and the CRC-32 of each record of a torch file in the zip format.

    All checksums are 0 in a file that was saved after `torch.serialization.set_crc32_options(False)`.
    """
    with zipfile.ZipFile(path) as file:
        records, size = file.infolist(), path.stat().st_size
        claimed = sum(record.file_size for record in records)
        if claimed > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError(f"its records are compressed, which torch never does: {size} bytes claim to be {claimed}")
        damaged = file.testzip() if any(record.CRC for record in records) else None
        if damaged is not None:
            raise ValueError(f"its record {damaged} does not have the checksum that it was saved with, it is damaged")


def _state_dict(content: object) -> object:
    """Return the state dict in what a file holds, or what it holds instead."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        return None
    for container in CONTAINERS:
        if isinstance(content.get(container), dict):
            return _state_dict(content[container])
    return clean_state_dict(content)


def _fault(weights: object, size: int) -> str | None:
    """Return what stops the content of a file of `size` bytes from being a state dict, or None."""
    if not weights or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        return "holds no state dict"
    storages = {}
    for name, tensor in weights.items():
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        if kind != torch.strided or tensor.device.type != "cpu":
            return f"does not fit a model: its {name} is {'without data' if tensor.is_meta else kind}"
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            return f"holds fewer numbers than the {tensor.numel()} of its {name}"
    if sum(storages.values()) > size:
        return f"has {size} bytes, and its weights claim to have {sum(storages.values())}"
    return None
