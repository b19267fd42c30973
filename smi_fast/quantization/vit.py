"""quantize(): uniform min-max quantisation of a trained ViT, calibrated on sparse batches.

The scheme of Sparse Model Inversion (Hu et al., ICML 2024, Sec. 4.3.1, Eq. 5), x -> s (clip(round(x / s) + z) - z):
weights symmetric per output channel, activations asymmetric per tensor, ranges the smallest and the largest value that
calibration shows. Activations are quantised where PSAQ-ViT (Li et al., ECCV 2022) quantises them; softmax stays float.

From one such place to the next the numbers are integers held in floating point, the zero point taken off. A matrix
product of them is exact, whatever the order of its sum, while no partial sum can leave the integers that the dtype
holds; scales and bias follow in one pass that ends in the next place's units.
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.backbones.support import PLAIN, UnsupportedModelError, check_bypassed, obstacle
from smi_fast.data.files import atomic_write, checksum, first_line
from smi_fast.data.sparse import InvertedDataset, normalize_patches
from smi_fast.kernels.linear import linear
from smi_fast.packed import Keep, PackedTokens, pack_keep

FORMAT_VERSION = 2
HEADER_KEY, CHECKSUM_KEY = "smi_fast_quantized", "checksum"
BITS = range(2, 9)
MAX_PACKED_BITS = 4  # weights of up to so many bits lie two to a byte in a file
MAX_HEAD_DIM = 256  # 255^2 * 256 < 2^24: a score of 8-bit queries and keys is exact in float32
CALIBRATION_BATCH = 32  # images at a time; ranges do not depend on it
CACHED_VALUES = 3 * 2**19  # of the widest activation at a time on a CPU: what is written next is still in its cache
PLACES = ("input", "patch_embed", "tokens", "pos_embed", "embedded", "norm", "logits")
BLOCK_PLACES = ("norm1", "qkv", "scores", "attention", "proj", "sum1", "norm2", "gelu", "mlp", "sum2")


def quantize(
    model: VisionTransformer,
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable,
    weight_bits: int = 8,
    activation_bits: int = 8,
) -> QuantizedViT:
    """Quantise a trained timm ViT or DeiT, without training it further.

    Args:
        model: a plain VisionTransformer: Block, Attention and Mlp with GELU, a class token, a learned position
            embedding, LayerNorm, one linear head. It is copied and stays as it is.
        calibration: an InvertedDataset, whose kept patches alone are fed, normalised with the model's mean and std; or
            batches that are normalised already: PackedTokens of patches (T, C * ph * pw), images (B, C, H, W), or
            tuples that begin with one of the two, as a DataLoader gives them; or a single such batch.
        weight_bits, activation_bits: 2 to 8.

    Raises:
        UnsupportedModelError: the model has a part that the scheme does not cover; the message names it.
        ValueError: bits out of range; no image to calibrate on, or one that does not fit the model; an activation that
            is not finite.
        TypeError: a batch is none of the above.
    """
    quantized = QuantizedViT(model, weight_bits, activation_bits)
    quantized._calibrate(_batches(calibration, quantized))
    return quantized


class Quantizer:
    """A place where activations are observed and then rounded: asymmetric, one range for the tensor.

    Until `freeze` it observes, and its scale is 1. The range `low` to `high` includes zero, so that zero is an integer.
    """

    def __init__(self, bits: int):
        self.levels = 2**bits - 1
        self.low = self.high = 0.0
        self.scale, self.zero_point = 1.0, None

    def freeze(self) -> None:
        self.scale = (self.high - self.low) / self.levels or 1.0  # 1 where nothing but zeros was seen
        self.zero_point = round(-self.low / self.scale)

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest integer, the zero point taken off."""
        return -self.zero_point, self.levels - self.zero_point

    def __call__(self, x: Tensor) -> Tensor:
        """The integers of x, which comes in units of `scale` and is overwritten; while observing, x as it is."""
        if self.zero_point is not None:
            return x.round_().clamp_(*self.bounds)
        low, high = (value.item() for value in torch.aminmax(x))
        if not math.isfinite(low + high):
            raise ValueError(f"calibration leads to activations from {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        return x


class IntegerLinear(nn.Module):
    """A Linear, or a convolution that embeds patches, with integer weights: symmetric per output channel.

    Until `freeze` `weight` (out, in) holds the float weights and `weight_scale` (out,) is 1; `bias` (out,) stays float.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        weight = layer.weight.detach().flatten(1).clone()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.ones_like(bias))
        self.register_buffer("bias", bias)
        self.part = weight.shape[1]  # of the inputs: how many are summed in one product

    def freeze(self, bits: int) -> None:
        largest = 2 ** (bits - 1) - 1
        scale = self.weight.abs().amax(1) / largest
        self.weight_scale = torch.where(scale > 0, scale, 1)
        self.weight = (self.weight / self.weight_scale[:, None]).round_().clamp_(-largest, largest)

    def split(self, bounds: tuple[int, int]) -> None:
        """Split the sum, so that for inputs within `bounds` no partial sum leaves the integers that the dtype holds."""
        exact = 2 / torch.finfo(self.weight.dtype).eps  # 2^24 for float32: all integers up to it
        weight, (low, high) = self.weight.double(), bounds
        terms = torch.stack((weight * high, weight * low))
        sums = torch.stack((terms.amax(0), -terms.amin(0)))  # [2, out, in]: what a term adds, or takes, at most
        self.part = self.weight.shape[1]
        while max(part.sum(-1).max() for part in sums.split(self.part, -1)) > exact:
            self.part = -(-self.part // 2)

    def forward(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        """The product of integers x (..., in) and the weights of output `channels`, rounded once, to x's dtype."""
        weight = self.weight[channels]
        if self.part == weight.shape[1]:
            return linear(x, weight)
        parts = zip(x.split(self.part, -1), weight.split(self.part, 1), strict=True)
        return sum(linear(a.contiguous(), b.contiguous()).double() for a, b in parts).to(x.dtype)

    def affine(self, scale: float, channels: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(bias, multiplier), (out,) each, that turn a product of inputs in units of `scale` into real numbers."""
        return self.bias[channels], self.weight_scale[channels] * scale


class QuantizedBlock(nn.Module):
    """timm's Block on integers."""

    def __init__(self, block: Block, bits: int):
        super().__init__()
        self.norm1, self.norm2 = (copy.deepcopy(norm).requires_grad_(False) for norm in (block.norm1, block.norm2))
        self.qkv, self.proj = IntegerLinear(block.attn.qkv), IntegerLinear(block.attn.proj)
        self.fc1, self.fc2 = IntegerLinear(block.mlp.fc1), IntegerLinear(block.mlp.fc2)
        self.heads, self.head_dim, self.attention_scale = block.attn.num_heads, block.attn.head_dim, block.attn.scale
        self.quantizers = {place: Quantizer(bits) for place in BLOCK_PLACES}

    def layers(self) -> list[tuple[IntegerLinear, Quantizer]]:
        """Each layer, and the place that its inputs come from."""
        q = self.quantizers
        return [(self.qkv, q["norm1"]), (self.proj, q["attention"]), (self.fc1, q["norm2"]), (self.fc2, q["gelu"])]

    def forward(self, x: Tensor, scale: float, tokens: PackedTokens, first: Tensor | None) -> Tensor:
        """(T, C) in units of scale -> (T, C) in units of the place "sum2".

        Where `first` names rows, their output alone: keys and values for all tokens, everything else for those few.
        """
        q = self.quantizers
        y = _normalise(self.norm1, x, scale, q["norm1"])
        y = self._attend(y, tokens, first)
        y = _dense(self.proj, y, q["attention"], q["proj"])
        x = _add(x if first is None else x[first], scale, y, q["proj"].scale, q["sum1"])
        y = _normalise(self.norm2, x, q["sum1"].scale, q["norm2"])
        bias, multiplier = self.fc1.affine(q["norm2"].scale)
        product = self.fc1(y)
        y = F.gelu(torch.addcmul(bias, product, multiplier, out=product))
        y = q["gelu"](y.mul_(1 / q["gelu"].scale))
        y = _dense(self.fc2, y, q["gelu"], q["mlp"])
        return _add(x, q["sum1"].scale, y, q["mlp"].scale, q["sum2"])

    def _attend(self, y: Tensor, tokens: PackedTokens, first: Tensor | None) -> Tensor:
        """Attention within each sequence: (T, C) -> (T, C), or (B, C) where `first` names the rows that ask."""
        q, length = self.quantizers, tokens.max_seqlen
        if first is None:
            queries, keys, values = self._project(y, 0, 3, tokens, length)  # [B, H, N, D] each
        else:
            (queries,) = self._project(y[first], 0, 1, tokens, 1)
            keys, values = self._project(y, 1, 3, tokens, length)
        scale, scores = q["qkv"].scale, queries @ keys.transpose(-2, -1)  # [B, H, N, N]
        scores = q["scores"](scores.mul_(scale * scale * self.attention_scale / q["scores"].scale))
        scores = scores.mul_(q["scores"].scale)
        if not tokens.is_uniform:
            _, taken = tokens.pad(y[:, :1])
            scores.masked_fill_(~taken[:, None, None], -math.inf)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2)  # [B, N, H, D]
        out = torch.mul(mixed, scale / q["attention"].scale, out=mixed.new_empty(mixed.shape)).flatten(2)
        out = q["attention"](out)
        return out.flatten(0, 1) if first is not None or tokens.is_uniform else tokens.unpad(out)

    def _project(self, y: Tensor, start: int, stop: int, tokens: PackedTokens, length: int) -> Tensor:
        """Of queries, keys and values those from start to stop: (T, C) -> (stop - start, B, H, length, D)."""
        q, width = self.quantizers, y.shape[1]
        channels = slice(start * width, stop * width)
        product = self.qkv(y, channels)
        if len(y) < tokens.batch_size * length:
            product, _ = tokens.pad(product)
        product = product.view(tokens.batch_size, length, stop - start, self.heads, self.head_dim)
        product = product.permute(2, 0, 3, 1, 4)
        bias, multiplier = (
            (part / q["qkv"].scale).view(stop - start, 1, self.heads, 1, self.head_dim)
            for part in self.qkv.affine(q["norm1"].scale, channels)
        )
        return q["qkv"](torch.addcmul(bias, product, multiplier, out=product.new_empty(product.shape)))


class QuantizedViT(nn.Module):
    """A quantised VisionTransformer, evaluated on integers held in floating point. Made by `quantize` or `load`."""

    def __init__(self, model: VisionTransformer, weight_bits: int = 8, activation_bits: int = 8):
        super().__init__()
        check_supported(model)
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise ValueError(f"{name} must be an integer from {BITS[0]} to {BITS[-1]}, got {bits!r}")
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.arguments = _arguments(model)
        self.num_classes = model.num_classes
        self.pretrained_cfg = _pretrained_cfg(model)  # timm's resolve_data_config reads this model as it reads that one
        self.patch_embed = IntegerLinear(model.patch_embed.proj)
        self.register_buffer("class_token", model.cls_token.detach()[0].clone())  # [1, C]
        self.register_buffer("pos_embed", model.pos_embed.detach()[0].clone())  # [1 + N, C]
        self.blocks = nn.ModuleList(QuantizedBlock(block, activation_bits) for block in model.blocks)
        self.norm = copy.deepcopy(model.norm).requires_grad_(False)
        self.head = IntegerLinear(model.head)
        self._quantizers = {place: Quantizer(activation_bits) for place in PLACES}
        self.calibrated = False
        if self.class_token.dtype not in (torch.float32, torch.float64):
            self.float()  # half the bits hold no sum of integers
        self.eval()

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Every place of observation by name: "input", "blocks.0.qkv", ..., "logits"."""
        blocks = {
            f"blocks.{number}.{place}": quantizer
            for number, block in enumerate(self.blocks)
            for place, quantizer in block.quantizers.items()
        }
        return self._quantizers | blocks

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value that calibration has shown at each place, zero included."""
        return {name: (quantizer.low, quantizer.high) for name, quantizer in self.quantizers.items()}

    def extra_repr(self) -> str:
        return f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"

    def forward(self, images: Tensor, keep: Keep | None = None) -> Tensor:
        """Logits (B, num_classes) of the kept patches of each image.

        Args:
            images: (B, C, H, W), floating point, normalised as the model wants it.
            keep: which patches enter: indices (B, K), a boolean mask (B, N), or a list of B index tensors; None: all.

        Raises:
            ValueError: images or keep that do not fit the model or each other; the message names the value.
        """
        return self.forward_patches(self.patches(images, keep))

    def patches(self, images: Tensor, keep: Keep | None = None) -> PackedTokens:
        """The kept patches of images, as `forward` takes both and `forward_patches` wants them."""
        expected = (self.arguments["in_chans"], *self.arguments["img_size"])
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}, expected (B, {', '.join(map(str, expected))}) of a "
                "floating point dtype"
            )
        kept = pack_keep(keep, len(images), len(self.pos_embed) - 1, images.device)
        patches, cells = kernels.gather_patches(
            images, kept.positions, kept.cu_seqlens, patch_size=self.arguments["patch_size"]
        )
        return PackedTokens(patches, cells, kept.cu_seqlens, kept.max_seqlen)

    @torch.no_grad()
    def forward_patches(self, patches: PackedTokens) -> Tensor:
        """Logits (B, num_classes) of images that are given as patches alone, such as a batch of an `InvertedDataset`.

        No gradient flows. Until calibration is done, all places observe, all scales are 1, and this is the float model.

        Args:
            patches: values (T, C * ph * pw), normalised pixels in (C, ph, pw) order, at their positions in the grid.
        """
        if patches.values.shape[1] != self.patch_embed.weight.shape[1]:
            raise ValueError(
                f"patches have {patches.values.shape[1]} values each, the model's have "
                f"{self.patch_embed.weight.shape[1]}"
            )
        if not patches.values.is_cpu or patches.batch_size == 0:
            return self._logits(patches)
        tokens = CACHED_VALUES // self.blocks[0].fc1.weight.shape[0]
        groups = patches.groups(max(1, tokens // (1 + patches.max_seqlen)))
        return torch.cat([self._logits(group) for group in groups])

    def _logits(self, patches: PackedTokens) -> Tensor:
        norm, logits = self._quantizers["norm"], self._quantizers["logits"]
        tokens, scale = self._embed(patches), self._quantizers["embedded"].scale
        x, first = tokens.values, tokens.cu_seqlens[:-1].long()
        for block in self.blocks:
            last = block is self.blocks[-1] and self.calibrated  # places observe all tokens
            x, scale = block(x, scale, tokens, first if last else None), block.quantizers["sum2"].scale
        x = _normalise(self.norm, x if self.calibrated else x[first], scale, norm)
        return _dense(self.head, x, norm, logits).mul_(logits.scale)

    def _embed(self, patches: PackedTokens) -> PackedTokens:
        """Class token and patches, embedded and at their positions: integers in units of the place "embedded"."""
        pixels, patch_embed, tokens, pos_embed, embedded = (self._quantizers[place] for place in PLACES[:5])
        x = pixels(patches.values.to(self.class_token.dtype) * (1 / pixels.scale))
        x = _dense(self.patch_embed, x, pixels, patch_embed).mul_(patch_embed.scale / tokens.scale)
        packed = replace(patches, values=x).prepend(self.class_token / tokens.scale)
        table = pos_embed(self.pos_embed / pos_embed.scale)  # the whole table, whatever patches are kept
        pos = table[packed.positions.long() + 1]  # the class token's position is -1
        x = _add(tokens(packed.values), tokens.scale, pos, pos_embed.scale, embedded)
        return replace(packed, values=x)

    def _calibrate(self, batches: Iterable[PackedTokens]) -> None:
        images = 0
        for batch in batches:
            images += batch.batch_size
            # One by one where they differ in length: padding would be observed too.
            for tokens in batch.groups(CALIBRATION_BATCH if batch.is_uniform else 1):
                self.forward_patches(tokens)
        if not images:
            raise ValueError("the calibration set is empty: ranges are observed on at least one image")
        for quantizer in self.quantizers.values():
            quantizer.freeze()
        for layer, _ in self._layers():
            layer.freeze(self.weight_bits)
        self._finish()

    def _finish(self) -> None:
        for layer, quantizer in self._layers():
            layer.split(quantizer.bounds)
        self.calibrated = True

    def _layers(self) -> list[tuple[IntegerLinear, Quantizer]]:
        """Each layer, and the place that its inputs come from."""
        inside = [pair for block in self.blocks for pair in block.layers()]
        q = self._quantizers
        return [(self.patch_embed, q["input"]), *inside, (self.head, q["norm"])]

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write one `.safetensors` file: complete, or not at all.

        Weights are int8, or up to 4 bits two to a byte; everything else is as it is. The header's entry
        "smi_fast_quantized" is a JSON object: format_version, weight_bits, activation_bits, arguments (of timm's
        VisionTransformer), pretrained_cfg, and for each place low, high, scale and zero_point. The entry "checksum" is
        the CRC-32 of that text, followed by each tensor's name, dtype, shape and bytes, sorted by name.

        Raises:
            ValueError: `path` does not end in .safetensors.
            FileExistsError: `path` exists and `overwrite` is false.
            FileNotFoundError: the folder of `path` does not exist.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: the name of a quantised model must end in .safetensors")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already; overwrite=True replaces it")
        tensors = self.state_dict()
        for name, layer in self._named_layers():
            integers = layer.weight.to(torch.int8)
            tensors[f"{name}.weight"] = _pack(integers) if self.weight_bits <= MAX_PACKED_BITS else integers
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = dict(
            format_version=FORMAT_VERSION,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            arguments=self.arguments,
            pretrained_cfg=self.pretrained_cfg,
            places={
                name: dict(low=q.low, high=q.high, scale=q.scale, zero_point=q.zero_point)
                for name, q in self.quantizers.items()
            },
        )
        text = json.dumps(header)
        with atomic_write(path) as partial_file:
            save_file(tensors, partial_file, {HEADER_KEY: text, CHECKSUM_KEY: str(_checksum(text, tensors))})

    @classmethod
    def load(cls, path: str | os.PathLike) -> QuantizedViT:
        """Read what `save` has written, on the CPU: the same bits.

        Files of format version 1 have no checksum, and damage to their numbers is not found.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is truncated, damaged, foreign, inconsistent or of a newer format; names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete quantised model ({error})") from None
        if HEADER_KEY not in metadata:
            raise ValueError(f'{path}: no "{HEADER_KEY}" in its header, so it is not a quantised model')
        text, expected = metadata[HEADER_KEY], metadata.get(CHECKSUM_KEY)
        if expected is not None and expected != str(_checksum(text, tensors)):
            raise ValueError(f"{path}: does not have the checksum that it was saved with, it is damaged")
        try:
            header = json.loads(text)
            if expected is None and header["format_version"] != 1:
                raise ValueError("it has no checksum")
            return cls._from_file(header, tensors)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not a quantised model that is understood ({first_line(error)})") from None

    @classmethod
    def _from_file(cls, header: dict, tensors: dict[str, Tensor]) -> QuantizedViT:
        if header["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format version {header['format_version']} is newer than {FORMAT_VERSION}")
        arguments = header["arguments"] | dict(norm_layer=partial(nn.LayerNorm, eps=header["arguments"]["norm_eps"]))
        del arguments["norm_eps"]
        with torch.device("meta"):
            model = VisionTransformer(**arguments)
        model.pretrained_cfg = header["pretrained_cfg"]
        loaded = cls(model, header["weight_bits"], header["activation_bits"])
        dtype = tensors["class_token"].dtype
        for name, layer in loaded._named_layers():
            integers = tensors[f"{name}.weight"]
            if loaded.weight_bits <= MAX_PACKED_BITS:
                integers = _unpack(integers, layer.weight.shape[1])
            tensors[f"{name}.weight"] = integers.to(dtype)
        loaded.load_state_dict(tensors, assign=True)
        loaded.requires_grad_(False)
        for name, quantizer in loaded.quantizers.items():
            vars(quantizer).update({key: header["places"][name][key] for key in ("low", "high", "scale", "zero_point")})
        loaded._finish()
        return loaded

    def _named_layers(self) -> list[tuple[str, IntegerLinear]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, IntegerLinear)]

    def export(self) -> torch.export.ExportedProgram:
        """The model on dense images (B, C, H, W) float32 as a program to deploy: PT2E's graph of int8 weights.

        `torch.export.save` writes it, with one byte a weight. It needs neither this package nor timm: after
        `import torch.ao.quantization.fx._decomposed`, which names its operators, `torch.export.load(path).module()`
        runs anywhere, and `torch.compile` with `torch._inductor.config.freezing` makes integer matrix products of it.
        """
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators)

        example = torch.zeros(2, self.arguments["in_chans"], *self.arguments["img_size"])
        batch = torch.export.Dim("batch")
        return torch.export.export(_Program(self).eval(), (example,), dynamic_shapes=({0: batch},))


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the part, for a model that the scheme does not cover."""

    def require(part: str, found: object, *known: type) -> None:
        if type(found) not in known:
            names = " or ".join(kind.__name__ for kind in known)
            raise UnsupportedModelError(f"{part} is a {type(found).__name__}, and only {names} can be quantised")

    require("the model", model, VisionTransformer)
    require("patch_embed", model.patch_embed, PatchEmbed)
    require("patch_embed.proj", model.patch_embed.proj, nn.Conv2d)
    for part in ("patch_embed.norm", "norm_pre", "fc_norm"):
        require(part, model.get_submodule(part), nn.Identity)
    for part in ("reg_token", "attn_pool"):
        require(part, getattr(model, part), type(None))
    for part in ("cls_token", "pos_embed"):
        require(part, getattr(model, part), nn.Parameter)
    if model.no_embed_class or model.global_pool != "token":
        raise UnsupportedModelError(
            f"only a model whose class token has a position and is pooled can be quantised, not one of "
            f"no_embed_class={model.no_embed_class} and global_pool={model.global_pool!r}"
        )
    for number, block in enumerate(model.blocks):
        name = f"blocks[{number}]"
        require(name, block, Block)
        require(f"{name}.attn", block.attn, Attention)
        require(f"{name}.attn.gate", block.attn.gate, type(None))
        require(f"{name}.mlp", block.mlp, Mlp)
        require(f"{name}.mlp.act", block.mlp.act, nn.GELU)
        if block.mlp.act.approximate != "none":
            raise UnsupportedModelError(f"{name}.mlp.act approximates GELU by {block.mlp.act.approximate!r}")
        if block.attn.head_dim > MAX_HEAD_DIM:
            raise UnsupportedModelError(f"{name} has a head_dim of {block.attn.head_dim}, more than {MAX_HEAD_DIM}")
        for part in ("ls1", "ls2", "attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm"):
            require(f"{name}.{part}", block.get_submodule(part), nn.Identity)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            require(f"{name}.{part}", block.get_submodule(part), nn.Linear)
    if len(model.blocks) == 0:
        raise UnsupportedModelError("the model has no blocks")
    require("head", model.head, nn.Linear)
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    if not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None and norm.eps == norms[0].eps for norm in norms):
        raise UnsupportedModelError("only LayerNorms with weight and bias, all of the same eps, can be quantised")
    check_bypassed(model)
    for name, module in model.named_modules():
        reason = obstacle(module, PLAIN)
        if reason is not None:
            raise UnsupportedModelError(f"{name}{reason}, and only the weights of plain modules can be quantised")


def _arguments(model: VisionTransformer) -> dict:
    """What makes timm's VisionTransformer build the like of a supported model."""
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


def _pretrained_cfg(model: VisionTransformer) -> dict:
    """Name, preprocessing and class names, as JSON holds them."""
    given = dict(getattr(model, "pretrained_cfg", None) or {})
    known = {key: given[key] for key in ("architecture", "label_names") if given.get(key) is not None}
    return json.loads(json.dumps(resolve_data_config(model=model) | known))


def _batches(
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable, model: QuantizedViT
) -> Iterator[PackedTokens]:
    """Calibration data as batches of normalised patches, where the model is."""
    device = model.class_token.device
    if isinstance(calibration, InvertedDataset):
        yield from _dataset_batches(calibration, model)
        return
    for batch in [calibration] if isinstance(calibration, (Tensor, PackedTokens)) else calibration:
        data = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(data, Tensor):
            data = model.patches(data.to(device))
        if not isinstance(data, PackedTokens):
            raise TypeError(f"a calibration batch must hold images or PackedTokens, not {type(data).__name__}")
        yield data.to(device)


def _dataset_batches(dataset: InvertedDataset, model: QuantizedViT) -> Iterator[PackedTokens]:
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    dataset.check_normalization(mean, std)
    image_size, patch_size = (model.arguments["in_chans"], *model.arguments["img_size"]), model.arguments["patch_size"]
    if dataset.image_size != image_size or dataset.patch_size != tuple(patch_size):
        raise ValueError(
            f"the calibration set has images of {dataset.image_size} in patches of {dataset.patch_size}, the model "
            f"takes {image_size} in {tuple(patch_size)}"
        )
    for start in range(0, len(dataset), CALIBRATION_BATCH):
        samples = [dataset[i] for i in range(start, min(start + CALIBRATION_BATCH, len(dataset)))]
        patches, _ = InvertedDataset.collate(samples)
        yield normalize_patches(patches, mean, std).to(model.class_token.device)


def _normalise(norm: nn.LayerNorm, x: Tensor, scale: float, quantizer: Quantizer) -> Tensor:
    """LayerNorm of x in units of `scale`: statistics see integers, and the weights carry the next place's units."""
    weight, bias = norm.weight / quantizer.scale, norm.bias / quantizer.scale
    return quantizer(F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps / scale**2))


def _dense(layer: IntegerLinear, x: Tensor, source: Quantizer, quantizer: Quantizer) -> Tensor:
    """A layer on integers of `source`, in integers of `quantizer`."""
    bias, multiplier = layer.affine(source.scale)
    product = layer(x)
    return quantizer(torch.addcmul(bias / quantizer.scale, product, multiplier / quantizer.scale, out=product))


def _add(x: Tensor, x_scale: float, y: Tensor, y_scale: float, quantizer: Quantizer) -> Tensor:
    """x + y, each in its units, in integers of `quantizer`; y is overwritten."""
    return quantizer(y.mul_(y_scale / quantizer.scale).add_(x, alpha=x_scale / quantizer.scale))


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all that a file holds: its header's text, and what and where its tensors are; see `save`."""
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = checksum(tensor, value)
    return value


def _pack(integers: Tensor) -> Tensor:
    """int8 (out, in) from -8 to 7 as uint8 (out, ceil(in / 2)): even channels in the low half of a byte."""
    padded = F.pad(integers, (0, integers.shape[1] % 2)) & 15
    return (padded[:, ::2] | padded[:, 1::2] << 4).view(torch.uint8)


def _unpack(packed: Tensor, channels: int) -> Tensor:
    """What `_pack` was given."""
    halves = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :channels].to(torch.int8)
    return (halves ^ 8) - 8  # the sign bit of 4


class _Program(nn.Module):
    """What `QuantizedViT.export` traces: the same scheme, written with PT2E's operators on uint8 and int8 tensors."""

    def __init__(self, quantized: QuantizedViT):
        super().__init__()
        self.arguments, self.bits = quantized.arguments, quantized.weight_bits
        self.quantizers = quantized.quantizers
        for name, layer in quantized._named_layers():
            parts = dict(
                weight=layer.weight.to(torch.int8),
                scale=layer.weight_scale.float(),
                zero_point=torch.zeros(len(layer.weight), dtype=torch.int64),
                bias=layer.bias.float(),
            )
            for part, value in parts.items():
                self.register_buffer(f"{name}.{part}".replace(".", "_"), value.cpu())
        self.norms = nn.ModuleDict(
            {
                name.replace(".", "_"): copy.deepcopy(module).float().cpu()
                for name, module in quantized.named_modules()
                if isinstance(module, nn.LayerNorm)
            }
        )
        self.register_buffer("class_token", quantized.class_token.float().cpu())
        self.register_buffer("pos_embed", quantized.pos_embed.float().cpu())
        self.attention_scale = quantized.blocks[0].attention_scale

    def forward(self, images: Tensor) -> Tensor:
        (height, width), (ph, pw) = self.arguments["img_size"], self.arguments["patch_size"]
        heads, batch = self.arguments["num_heads"], images.shape[0]
        x = images.view(batch, -1, height // ph, ph, width // pw, pw).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = self._quantize("patch_embed", self._linear("patch_embed", self._quantize("input", x)))
        x = self._quantize("tokens", torch.cat((self.class_token.expand(batch, 1, -1), x), 1))
        x = self._quantize("embedded", x + self._quantize("pos_embed", self.pos_embed))
        for number in range(self.arguments["depth"]):
            name = f"blocks.{number}."
            y = self._quantize(name + "norm1", self.norms[f"blocks_{number}_norm1"](x))
            qkv = self._quantize(name + "qkv", self._linear(name + "qkv", y))
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            scores = self._quantize(name + "scores", q @ k.transpose(-2, -1) * self.attention_scale)
            y = self._quantize(name + "attention", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = self._quantize(name + "sum1", x + self._quantize(name + "proj", self._linear(name + "proj", y)))
            y = self._quantize(name + "norm2", self.norms[f"blocks_{number}_norm2"](x))
            y = self._quantize(name + "gelu", F.gelu(self._linear(name + "fc1", y)))
            x = self._quantize(name + "sum2", x + self._quantize(name + "mlp", self._linear(name + "fc2", y)))
        x = self._quantize("norm", self.norms["norm"](x[:, 0]))
        return self._quantize("logits", self._linear("head", x))

    def _quantize(self, place: str, x: Tensor) -> Tensor:
        q = self.quantizers[place]
        how = (q.scale, q.zero_point, 0, q.levels, torch.uint8)
        integers = torch.ops.quantized_decomposed.quantize_per_tensor(x, *how)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *how)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, scale, zero_point, bias = (
            getattr(self, f"{name}.{part}".replace(".", "_")) for part in ("weight", "scale", "zero_point", "bias")
        )
        largest = 2 ** (self.bits - 1) - 1
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            weight, scale, zero_point, 0, -largest, largest, torch.int8
        )
        return F.linear(x, weight, bias)
