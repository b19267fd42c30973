"""The file of a quantised model: what it holds, its checksum, and how the model is built from it.

The tensors of the `.safetensors` file are those of the model's `state_dict`. Integer weights are int8, or two to a byte
as uint8 if they have up to 4 bits. The header's entry "smi_fast_quantized" is a JSON object: format_version,
weight_bits, activation_bits, arguments (of timm's VisionTransformer), pretrained_cfg, and places, which has low, high,
scale and zero_point for each place of quantisation. The entry "checksum" is the CRC-32 of that text, followed by each
tensor's name, dtype, shape and bytes, sorted by name. Files of version 1 do not have it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.data.files import atomic_write, checksum, first_line
from smi_fast.data.tensors import new_file, open_tensors

FORMAT_VERSION = 2
HEADER_KEY, CHECKSUM_KEY = "smi_fast_quantized", "checksum"
KIND = "quantised model"
MAX_PACKED_BITS = 4  # weights of up to this many bits lie two to a byte in a file


def save_model(model: nn.Module, path: str | os.PathLike, overwrite: bool) -> None:
    """Write a `QuantizedViT` to a file. Its method `save` lists the errors."""
    path = new_file(path, KIND, overwrite)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in _integer_weights(tensors):
        integers = tensors[name].to(torch.int8)
        tensors[name] = _pack(integers) if model.weight_bits <= MAX_PACKED_BITS else integers
    header = dict(
        format_version=FORMAT_VERSION,
        weight_bits=model.weight_bits,
        activation_bits=model.activation_bits,
        arguments=model.arguments,
        pretrained_cfg=model.pretrained_cfg,
        places={
            name: dict(low=place.low, high=place.high, scale=place.unit, zero_point=-place.rounding.lowest)
            for name, place in model.quantizers.items()
        },
    )
    text = json.dumps(header)
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
            if expected is None and header["format_version"] != 1:
                raise ValueError("it has no checksum")
            if header["format_version"] > FORMAT_VERSION:
                raise ValueError(f"format version {header['format_version']} is newer than {FORMAT_VERSION}")
            return _build(kind, header, tensors)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(f"not a {KIND} that is understood ({first_line(error)})") from None


def _build(kind: type[nn.Module], header: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """Build the model that a file's header and tensors describe."""
    arguments = dict(header["arguments"])
    if arguments["depth"] > len(tensors):
        raise ValueError(f"it has {len(tensors)} tensors, too few for {arguments['depth']} blocks")
    arguments["norm_layer"] = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    with torch.device("meta"):
        model = VisionTransformer(**arguments)
    model.pretrained_cfg = header["pretrained_cfg"]
    loaded = kind(model, header["weight_bits"], header["activation_bits"])
    for name in _integer_weights(tensors):
        if loaded.weight_bits <= MAX_PACKED_BITS:
            tensors[name] = _unpack(tensors[name], loaded.get_buffer(name).shape[1])
        tensors[name] = tensors[name].to(tensors["class_token"].dtype)
    loaded.load_state_dict(tensors, assign=True)
    for name, place in loaded.quantizers.items():
        saved = header["places"][name]
        place.low, place.high = saved["low"], saved["high"]
        place.round_with(saved["scale"], saved["zero_point"])
    loaded.split_products()
    return loaded


def model_arguments(model: VisionTransformer) -> dict:
    """Return the arguments, in JSON's types, with which timm's VisionTransformer has the same architecture."""
    block, embed = model.blocks[0], model.patch_embed
    return dict(
        img_size=list(embed.img_size),
        patch_size=list(embed.patch_size),
        in_chans=embed.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=(block.mlp.fc1.out_features + 0.5) / model.embed_dim,  # timm rounds down
        norm_eps=model.norm.eps,
    )


def model_config(model: VisionTransformer) -> dict:
    """Return a model's preprocessing, and its name and class names if they are known, in JSON's types."""
    given = dict(getattr(model, "pretrained_cfg", None) or {})
    known = {key: given[key] for key in ("architecture", "label_names") if given.get(key) is not None}
    return json.loads(json.dumps(resolve_data_config(model=model) | known))


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
