"""QuantizedViT: timm's VisionTransformer on integers, by uniform min-max quantisation.

The scheme is that of Sparse Model Inversion (Hu et al., ICML 2024, Sec. 4.3.1, Eq. 5),
x -> s (clip(round(x / s) + z) - z): weights are symmetric per output channel, activations asymmetric per tensor, and a
range runs from the smallest to the largest value that calibration shows. Activations are quantised where PSAQ-ViT (Li
et al., ECCV 2022) quantises them; softmax stays float.

The model is written once, and its places (`Quantizer`) and its layers (`IntegerLinear`) decide what it computes. While
the places observe, it is the float model. Afterwards it works on integers that are held in floating point, with the
zero point subtracted, so that matrix products are exact. In the copy that `export` makes, places and layers are the
operators of PyTorch's PT2E quantisation.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.grid import PatchGrid
from smi_fast.packed import Keep, PackedTokens, pack_keep
from smi_fast.quantization.checkpoint import load_model, model_arguments, model_config, save_model
from smi_fast.quantization.export import export_program
from smi_fast.quantization.layers import IntegerLinear, add, layer_norm
from smi_fast.quantization.observers import Quantizer, Scaled
from smi_fast.quantization.support import check_bits, check_supported

CACHED_VALUES = 3 * 2**19  # values of the widest activation at a time on a CPU, so that its caches hold them


class QuantizedBlock(nn.Module):
    """timm's Block.

    Modifications: a place of quantisation follows each step, a LayerScale is a part of the layer before it, and the
    output can be that of the class tokens only.
    """

    def __init__(self, block: Block, bits: int):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.heads, self.head_dim, self.attention_scale = attn.num_heads, attn.head_dim, attn.scale
        self.norm1, self.norm1_out = copy.deepcopy(block.norm1), Quantizer(bits)
        self.qkv, self.qkv_out = IntegerLinear(attn.qkv), Quantizer(bits)
        self.scores, self.attention = Quantizer(bits), Quantizer(bits)
        self.proj, self.proj_out, self.sum1 = IntegerLinear(attn.proj, block.ls1), Quantizer(bits), Quantizer(bits)
        self.norm2, self.norm2_out = copy.deepcopy(block.norm2), Quantizer(bits)
        self.fc1, self.gelu = IntegerLinear(mlp.fc1), Quantizer(bits)
        self.fc2, self.mlp, self.sum2 = IntegerLinear(mlp.fc2, block.ls2), Quantizer(bits), Quantizer(bits)

    def layers(self) -> list[tuple[IntegerLinear, Quantizer]]:
        """Each layer with integer weights, and the place that its inputs come from."""
        sources = (self.norm1_out, self.attention, self.norm2_out, self.gelu)
        return list(zip((self.qkv, self.proj, self.fc1, self.fc2), sources, strict=True))

    def forward(self, x: Scaled, ragged: PackedTokens | None, first_only: bool) -> Scaled:
        """Compute the block's output.

        Args:
            x: tokens (B, N, C), or (T, C) where the sequences differ in length.
            ragged: how (T, C) is packed; None for (B, N, C).
            first_only: compute only the output of each sequence's first token, from the keys and values of all tokens.

        Returns:
            The output in the shape of x, or (B, 1, C) with `first_only`.
        """
        y = self._attend(layer_norm(self.norm1, x, self.norm1_out), ragged, first_only)
        x = first_tokens(x, ragged) if first_only else x
        x = add(x, self.proj_out(self.proj(y)), self.sum1)
        y = layer_norm(self.norm2, x, self.norm2_out)
        y = self.gelu(Scaled(F.gelu(self.fc1(y).to(1.0).values)))
        return add(x, self.mlp(self.fc2(y)), self.sum2)

    def _attend(self, x: Scaled, ragged: PackedTokens | None, first_only: bool) -> Scaled:
        """Compute the attention within each sequence, before its projection. The arguments are those of `forward`."""
        width = self.heads * self.head_dim
        if first_only:
            (q,), _ = self._project(first_tokens(x, ragged), None, slice(width))
            (k, v), mask = self._project(x, ragged, slice(width, 3 * width))
        else:
            (q, k, v), mask = self._project(x, ragged)
        unit = self.qkv_out.unit
        scores = self.scores(Scaled(q @ k.transpose(-2, -1), unit * unit * self.attention_scale))
        scores = scores.to(1.0).values  # [B, H, N, N]
        if mask is not None:
            scores.masked_fill_(~mask[:, None, None], -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # [B, N, C]
        return self.attention(Scaled(y if ragged is None or first_only else ragged.unpad(y), unit))

    def _project(self, x: Scaled, ragged: PackedTokens | None, *channels: slice) -> tuple[Tensor, Tensor | None]:
        """Compute queries, keys and values (3, B, H, N, D), or only those in `channels`, and a mask (B, N) that is
        False where they are padding. The mask is None for x (B, N, C)."""
        y, mask = self.qkv_out(self.qkv(x, *channels)).values, None
        if ragged is not None:
            y, mask = ragged.pad(y)
        return y.unflatten(-1, (-1, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).contiguous(), mask


class QuantizedViT(nn.Module):
    """A quantised VisionTransformer, made by `quantize` or `load`. It computes with integers held in floating point.

    The constructor takes a model and bits as `quantize` does and raises the same errors for them. The new model
    computes the float model's numbers and observes its activations until `freeze` is called.
    """

    def __init__(self, model: VisionTransformer, weight_bits: int = 8, activation_bits: int = 8):
        super().__init__()
        check_supported(model)
        check_bits(weight_bits=weight_bits, activation_bits=activation_bits)
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.arguments = model_arguments(model)
        self.pretrained_cfg = model_config(model)  # timm's resolve_data_config reads it
        self.num_classes, self.num_channels = model.num_classes, model.patch_embed.proj.in_channels
        self.grid = PatchGrid.of(model.patch_embed.img_size, model.patch_embed.patch_size)
        self.input = Quantizer(activation_bits)
        self.patch_embed, self.patch_embed_out = IntegerLinear(model.patch_embed.proj), Quantizer(activation_bits)
        self.register_buffer("class_token", model.cls_token.detach()[0].clone())  # [1, C]
        self.tokens = Quantizer(activation_bits)
        self.register_buffer("pos_embed", model.pos_embed.detach()[0].clone())  # [1 + N, C]
        self.pos_embed_out, self.embedded = Quantizer(activation_bits), Quantizer(activation_bits)
        self.blocks = nn.ModuleList(QuantizedBlock(block, activation_bits) for block in model.blocks)
        self.norm, self.norm_out = copy.deepcopy(model.norm), Quantizer(activation_bits)
        self.head, self.logits = IntegerLinear(model.head), Quantizer(activation_bits)
        if self.class_token.dtype not in (torch.float32, torch.float64):
            self.float()  # sums of integers do not fit into half precision
        self.eval().requires_grad_(False)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The places of quantisation by name, in the order in which the model has them: "input", "patch_embed", ...,
        "blocks.0.norm1", "blocks.0.qkv", ..., "norm", "logits"."""
        modules = self.named_modules()
        return {name.removesuffix("_out"): module for name, module in modules if isinstance(module, Quantizer)}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value that calibration has shown at each place. The range includes zero."""
        return {name: (quantizer.low, quantizer.high) for name, quantizer in self.quantizers.items()}

    @property
    def calibrated(self) -> bool:
        """Whether calibration has ended, so that the model computes with integers."""
        return self.logits.rounding is not None

    def layers(self) -> list[tuple[IntegerLinear, Quantizer]]:
        """Each layer with integer weights, and the place that its inputs come from."""
        inside = [pair for block in self.blocks for pair in block.layers()]
        return [(self.patch_embed, self.input), *inside, (self.head, self.norm_out)]

    def extra_repr(self) -> str:
        return f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"

    def forward(self, images: Tensor, keep: Keep | None = None) -> Tensor:
        """Compute the logits (B, num_classes) of each image from its kept patches.

        Args:
            images: (B, C, H, W), floating point, normalised as the model wants it.
            keep: the patches to keep: indices (B, K), a boolean mask (B, N) or a list of B index tensors. None keeps
                all patches.

        Raises:
            ValueError: images or `keep` do not fit the model or each other. The message names the value.
        """
        return self.forward_patches(self.patches(images, keep))

    def patches(self, images: Tensor, keep: Keep | None = None) -> PackedTokens:
        """Cut out the kept patches, as `forward_patches` takes them. Arguments and errors are those of `forward`."""
        expected = (self.num_channels, *self.grid.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}, expected (B, {', '.join(map(str, expected))}) of a "
                "floating point dtype"
            )
        kept = pack_keep(keep, len(images), self.grid.num_patches, images.device)
        patches, _ = kernels.gather_patches(images, kept.positions, kept.cu_seqlens, patch_size=self.grid.patch_size)
        return replace(kept, values=patches)

    @torch.no_grad()
    def forward_patches(self, patches: PackedTokens) -> Tensor:
        """Compute the logits (B, num_classes) of images that are given as patches only.

        No gradient flows. Until calibration ends, these are the float model's logits, and every place observes.

        Args:
            patches: values (T, C * ph * pw), normalised pixels in (C, ph, pw) order, at their positions in the grid,
                such as a batch of an `InvertedDataset`.

        Raises:
            ValueError: the patches do not have as many values as the model's.
        """
        size = self.patch_embed.weight.shape[1]
        if patches.values.shape[1] != size:
            raise ValueError(f"patches have {patches.values.shape[1]} values each, the model's have {size}")
        images = CACHED_VALUES // (self.blocks[0].fc1.weight.shape[0] * (1 + patches.max_seqlen))
        split = patches.values.is_cpu and patches.batch_size  # no images are one group of none
        groups = patches.groups(max(1, images)) if split else [patches]
        dtype, first_only = self.class_token.dtype, self.calibrated  # places observe all tokens
        return torch.cat([self.evaluate(group.values.to(dtype, copy=True), group, first_only) for group in groups])

    def evaluate(self, pixels: Tensor, patches: PackedTokens | None = None, first_only: bool = False) -> Tensor:
        """Run the model: from pixels in its dtype, which are overwritten, to logits (B, num_classes).

        Args:
            pixels: (T, C * ph * pw) as packed in `patches`, or (B, N, C * ph * pw) for whole images.
            patches: where in the grid the patches lie. None for whole images.
            first_only: compute the last block only for the class tokens, because the head reads no others.
        """
        x = self.patch_embed_out(self.patch_embed(self.input(Scaled(pixels)))).to(self.tokens.unit).values
        class_token, unit = self.tokens.divide(self.class_token), self.pos_embed_out.unit
        # All positions are quantised together, whatever patches are kept.
        pos_embed = self.pos_embed_out(Scaled(self.pos_embed_out.divide(self.pos_embed), unit)).values
        if patches is None:
            batch_size, ragged = pixels.shape[0], None
            x = torch.cat((class_token.expand(batch_size, -1, -1), x), dim=1)  # [B, 1 + N, C]
            pos_embed = pos_embed.repeat(batch_size, 1, 1)
        else:
            tokens = replace(patches, values=x).prepend(class_token)
            x, ragged = tokens.batch_or_values(), None if tokens.is_uniform else tokens
            pos_embed = pos_embed[tokens.positions.long() + 1].view_as(x)  # the class token's position is -1
        x = add(self.tokens(Scaled(x, self.tokens.unit)), Scaled(pos_embed, unit), self.embedded)
        for block in self.blocks:
            x = block(x, ragged, first_only and block is self.blocks[-1])
        x = layer_norm(self.norm, first_tokens(x, ragged), self.norm_out)
        return self.logits(self.head(x)).to(1.0).values[:, 0]

    def freeze(self) -> None:
        """End calibration: round the weights, and let the places round from now on."""
        for place in self.quantizers.values():
            place.freeze()
        for layer, _ in self.layers():
            layer.freeze(self.weight_bits)
        self.split_products()

    def split_products(self) -> None:
        """Split the layers' sums of integers where the dtype might not hold them exactly."""
        for layer, source in self.layers():
            layer.split(source.rounding)

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write one `.safetensors` file, in the format that `checkpoint.py` describes: complete, or not at all.

        Raises:
            ValueError: `path` does not end in .safetensors, or the model is not calibrated.
            FileExistsError: `path` exists and `overwrite` is false.
            FileNotFoundError: the folder of `path` does not exist.
        """
        self._check_calibrated()
        save_model(self, path, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike) -> QuantizedViT:
        """Read a file that `save` has written, on the CPU. The model computes the same bits.

        Files of format version 1 have no checksum, so that damage to their numbers goes unnoticed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file, which is named, is truncated, damaged, foreign, inconsistent or of a newer format.
        """
        return load_model(cls, path)

    def export(self) -> torch.export.ExportedProgram:
        """Export the model on whole images (B, C, H, W) float32 as a program to deploy: a PT2E graph with int8 weights.

        `torch.export.save` writes it, with one byte per weight. It needs neither this package nor timm. After
        `import torch.ao.quantization.fx._decomposed`, which registers its operators, `torch.export.load(path).module()`
        runs anywhere. `torch.compile` with `torch._inductor.config.freezing` turns it into integer matrix products.

        Raises:
            ValueError: the model is not calibrated.
        """
        self._check_calibrated()
        return export_program(self)

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise ValueError("the model is not calibrated: `quantize` makes a model that is")


def first_tokens(x: Scaled, ragged: PackedTokens | None) -> Scaled:
    """Select the first token of each sequence, (B, 1, C), from tokens (B, N, C), or from (T, C) packed as `ragged`."""
    values = x.values[:, :1] if x.values.ndim == 3 else x.values[ragged.cu_seqlens[:-1].long()][:, None]
    return replace(x, values=values)
