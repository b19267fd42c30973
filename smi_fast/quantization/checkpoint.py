"""The file of a quantised model: what it holds, its checksum, and how the model is built from it.

The tensors of the `.safetensors` file are those of the model's `state_dict`. Integer weights are int8, or two to a byte
as uint8 if they have up to 4 bits. The header's entry "smi_fast_quantized" is a JSON object: format_version; model,
which has each module's class and settings, and its modules by name under "parts"; and places, which has low, high,
scale and zero_point for each place of quantisation. The entry "checksum" is the CRC-32 of that text, followed by each
tensor's name, dtype, shape and bytes, sorted by name.

Files of versions 1 and 2 hold plain ViTs only. In place of `model` they have the arguments of timm's VisionTransformer,
and other names; files of version 1 have no checksum.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.data.files import atomic_write, checksum, first_line
from smi_fast.data.tensors import new_file, open_tensors
from smi_fast.quantization.blocks import Attention, Block, DifferentialAttention, Mlp
from smi_fast.quantization.heads import Activation, UnitLength
from smi_fast.quantization.layers import IntegerLinear, Norm
from smi_fast.quantization.observers import Quantizer
from smi_fast.quantization.pooling import AllTokens, AttentionPool, JoinedTokens, Pool

FORMAT_VERSION = 3
HEADER_KEY, CHECKSUM_KEY = "smi_fast_quantized", "checksum"
KIND = "quantised model"
MAX_PACKED_BITS = 4  # weights of up to this many bits lie two to a byte in a file
PARTS = {
    kind.__name__: kind
    for kind in (
        *(Quantizer, IntegerLinear, Norm, Attention, DifferentialAttention, Mlp, Block),
        *(JoinedTokens, AllTokens, Pool, AttentionPool, Activation, UnitLength),
        *(nn.Identity, nn.ModuleList, nn.Sequential),
    )
}
VERSION_2_NAMES = {  # of layers, norms and places
    r"class_token": r"prefix_tokens",
    r"(blocks\.\d+)\.norm([12])": lambda match: f"{match[1]}.{('attn', 'mlp')[int(match[2]) - 1]}.norm",
    r"(blocks\.\d+)\.(qkv|scores|attention|proj)": r"\1.attn.\2",
    r"(blocks\.\d+)\.(fc1|fc2)": r"\1.mlp.\2",
    r"(blocks\.\d+)\.sum1": r"\1.attn.sum",
    r"(blocks\.\d+)\.sum2": r"\1.mlp.sum",
    r"(blocks\.\d+)\.gelu": r"\1.mlp.act",
    r"(blocks\.\d+)\.mlp": r"\1.mlp.fc2",
}


def save_model(model: nn.Module, path: str | os.PathLike, overwrite: bool) -> None:
    """Write a `QuantizedViT` to a file. Its method `save` lists the errors."""
    path = new_file(path, KIND, overwrite)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in _integer_weights(tensors):
        integers = tensors[name].to(torch.int8)
        tensors[name] = _pack(integers) if model.weight_bits <= MAX_PACKED_BITS else integers
    places = {
        name: dict(low=place.low, high=place.high, scale=place.unit, zero_point=-place.rounding.lowest)
        for name, place in model.quantizers.items()
    }
    text = json.dumps(dict(format_version=FORMAT_VERSION, model=_described(model), places=places))
    with atomic_write(path) as partial_file:
        save_file(tensors, partial_file, {HEADER_KEY: text, CHECKSUM_KEY: str(_checksum(text, tensors))})


def load_model(kind: type[nn.Module], path: str | os.PathLike) -> nn.Module:
    """Read a model of the class `kind`, which is `QuantizedViT`, from a file. Its method `load` lists the errors."""
    with open_tensors(Path(path), HEADER_KEY, KIND) as (file, text):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = file.metadata().get(CHECKSUM_KEY)
        if expected is not None and expected != str(_checksum(text, tensors)):
            raise ValueError("does not have the checksum that it was saved with, it is damaged")
        try:
            header = json.loads(text)
            version = header["format_version"]
            if expected is None and version != 1:
                raise ValueError("it has no checksum")
            if version > FORMAT_VERSION:
                raise ValueError(f"format version {version} is newer than {FORMAT_VERSION}")
            if version < 3:
                header, tensors = _from_version_2(kind, header, tensors)
            return _load(kind, header, tensors)
        except (
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            RecursionError,
            ArithmeticError,
            ValueError,
        ) as error:
            raise ValueError(f"not a {KIND} that is understood ({first_line(error)})") from None


def _load(kind: type[nn.Module], header: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """Build the model that a file's header and tensors describe."""
    model = _built(header["model"], {kind.__name__: kind})
    for name in _integer_weights(tensors):
        stored, inputs, packed = (
            tensors[name],
            model.get_submodule(name.removesuffix(".weight")).inputs,
            model.weight_bits <= MAX_PACKED_BITS,
        )
        if (stored.dtype, stored.shape[1]) != ((torch.uint8, -(-inputs // 2)) if packed else (torch.int8, inputs)):
            raise ValueError(f"{name} is {tuple(stored.shape)} {stored.dtype}, and the layer has {inputs} inputs")
        tensors[name] = (_unpack(stored, inputs) if packed else stored).to(tensors["pos_embed"].dtype)
    for name, place in model.quantizers.items():
        saved = header["places"][name]
        place.low, place.high = saved["low"], saved["high"]
        place.round_with(saved["scale"], saved["zero_point"])
    _give(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    for layer in model.layers():
        layer.part = layer.inputs
    patch_size = model.num_channels * model.patch_size[0] * model.patch_size[1]
    logits = model.evaluate(torch.empty(1, model.grid.num_patches, patch_size, device="meta"))  # sizes fit each other
    if model.num_classes != logits.shape[-1] and model.num_classes:
        raise ValueError(f"it has {logits.shape[-1]} classes, not {model.num_classes}")
    _give(model, tensors)
    model.split_products()
    return model.eval()


def _described(module: nn.Module) -> dict[str, Any]:
    """Return a module's class, its settings and its modules, in JSON's types."""
    settings = {name: getattr(module, name) for name in getattr(module, "settings", ())}
    parts = {name: _described(part) for name, part in module._modules.items()}
    return {"class": type(module).__name__, **settings} | ({"parts": parts} if parts else {})


def _built(description: dict[str, Any], kinds: dict[str, type[nn.Module]]) -> nn.Module:
    """Build a module of one of these kinds without tensors, from the result of `_described`. Its parts are of PARTS."""
    kind = kinds[description["class"]]
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name in getattr(kind, "settings", ()):
        setattr(module, name, description[name])
    for name, part in description.get("parts", {}).items():
        module.add_module(name, _built(part, PARTS))
    return module


def _give(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model its tensors, under the names of its `state_dict`."""
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path).register_buffer(last, tensor)


def _from_version_2(
    kind: type[nn.Module], header: dict, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a header and tensors of version 1 or 2 as this version has them."""
    arguments = dict(header["arguments"])
    if arguments["depth"] > len(tensors):
        raise ValueError(f"it has {len(tensors)} tensors, too few for {arguments['depth']} blocks")
    arguments["norm_layer"] = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    with torch.device("meta"):
        model = VisionTransformer(**arguments)
        described = _described(kind(model, header["weight_bits"], header["activation_bits"]))

    def renamed(name: str) -> str:
        for pattern, to in VERSION_2_NAMES.items():
            if re.fullmatch(pattern, name):
                return re.sub(pattern, to, name)
        return name

    def renamed_tensor(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{renamed(module)}.{last}" if module else renamed(name)

    places = {renamed(name): place for name, place in header["places"].items()}
    described["pretrained_cfg"] = header["pretrained_cfg"]
    return dict(model=described, places=places), {renamed_tensor(name): tensors[name] for name in tensors}


def _integer_weights(tensors: Iterable[str]) -> list[str]:
    """Return the names of the integer weights, which are the tensors that have a scale."""
    return [name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")]


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    """Compute the checksum that the top of this file describes."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = checksum(tensor, value)
    return value


def _pack(integers: Tensor) -> Tensor:
    """Pack int8 (out, in) from -8 to 7 as uint8 (out, ceil(in / 2)), with even inputs in the low half of a byte."""
    padded = F.pad(integers, (0, integers.shape[1] % 2)) & 15
    return (padded[:, ::2] | padded[:, 1::2] << 4).view(torch.uint8)


def _unpack(packed: Tensor, inputs: int) -> Tensor:
    """Unpack the result of `_pack` for weights (out, inputs)."""
    halves = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :inputs].to(torch.int8)
    return (halves ^ 8) - 8  # extends the sign bit of 4 bits
