"""QuantizedViT: timm's VisionTransformer on integers, by uniform min-max quantisation.

The scheme is that of Sparse Model Inversion (Hu et al., ICML 2024, Sec. 4.3.1, Eq. 5),
x -> s (clip(round(x / s) + z) - z): weights are symmetric per output channel, activations asymmetric per tensor, and a
range runs from the smallest to the largest value that calibration shows. Activations are quantised where PSAQ-ViT (Li
et al., ECCV 2022) quantises them; softmax stays float. Parts that a plain ViT does not have follow the same rule: a
place of quantisation lies behind every layer, norm, attention, product of channels, pooling and sum.

The model is written once, and its places (`Quantizer`) and its layers (`IntegerLinear`) decide what it computes. While
the places observe, it is the float model. Afterwards it works on integers that are held in floating point, with the
zero point subtracted, so that matrix products are exact. In the copy that `export` makes, places and layers are the
operators of PyTorch's PT2E quantisation.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.grid import PatchGrid
from smi_fast.packed import Keep, PackedTokens, check_patches, pack_keep
from smi_fast.quantization.blocks import first_tokens
from smi_fast.quantization.checkpoint import load_model, save_model
from smi_fast.quantization.export import export_program
from smi_fast.quantization.layers import IntegerLinear, add
from smi_fast.quantization.observers import Quantizer, Scaled
from smi_fast.quantization.support import check_bits, check_supported
from smi_fast.quantization.translation import block, config, head, linear, norm, pool, position_embedding, prefix_tokens

CACHED_VALUES = 3 * 2**19  # values of the widest activation at a time on a CPU, so that its caches hold them


class QuantizedViT(nn.Module):
    """A quantised VisionTransformer, made by `quantize` or `load`. It computes with integers held in floating point.

    The constructor takes a model and bits as `quantize` does and raises the same errors for them. The new model
    computes the float model's numbers and observes its activations until `freeze` is called.
    """

    settings = (
        "weight_bits",
        "activation_bits",
        "pretrained_cfg",
        "num_classes",
        "num_channels",
        "image_size",
        "patch_size",
        "dynamic",
        "reads",
    )

    def __init__(self, model: nn.Module, weight_bits: int = 8, activation_bits: int = 8):
        super().__init__()
        check_supported(model)
        check_bits(weight_bits=weight_bits, activation_bits=activation_bits)
        embed, bits = model.patch_embed, activation_bits
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.pretrained_cfg = config(model)  # timm's resolve_data_config reads it
        self.num_channels = embed.proj.in_channels
        self.image_size, self.patch_size, self.dynamic = (
            [*embed.img_size],
            [*embed.patch_size],
            not embed.strict_img_size,
        )
        # How many of an image's first tokens the head reads, or None for all.
        self.reads = None if model.global_pool != "token" else 2 if hasattr(model, "head_dist") else 1
        if embed.proj.weight.dtype not in (torch.float32, torch.float64):
            model = copy.deepcopy(model).float()  # sums of integers do not fit into half precision
        self.input = Quantizer(bits)
        self.patch_embed, self.patch_embed_out = linear(model.patch_embed.proj), Quantizer(bits)
        self.patch_norm = norm(model.patch_embed.norm, bits)
        self.register_buffer("prefix_tokens", prefix_tokens(model))  # [P, C]
        self.tokens = Quantizer(bits)
        self.register_buffer("pos_embed", position_embedding(model))  # [P + N, C]
        self.pos_embed_out, self.embedded = Quantizer(bits), Quantizer(bits)
        self.norm_pre = norm(model.norm_pre, bits)
        self.blocks = nn.ModuleList(block(each, bits) for each in model.blocks)
        self.norm, self.pool, self.fc_norm = norm(model.norm, bits), pool(model, bits), norm(model.fc_norm, bits)
        self.head, self.logits = head(model, bits)
        widths = [len(layer.weight) for layer in self.head.modules() if isinstance(layer, IntegerLinear)]
        self.num_classes = widths[-1] if widths else 0
        self.eval().requires_grad_(False)

    @property
    def grid(self) -> PatchGrid:
        """The patch grid of the images that the model was made for."""
        return PatchGrid.of(self.image_size, self.patch_size)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The places of quantisation by name, in the order in which the model has them: "input", "patch_embed", ...,
        "blocks.0.attn.norm", "blocks.0.attn.qkv", ..., "norm", "logits"."""
        places = [(name, module) for name, module in self.named_modules() if isinstance(module, Quantizer)]
        return {name.removesuffix(".out").removesuffix("_out"): place for name, place in places}

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value that calibration has shown at each place. The range includes zero."""
        return {name: (quantizer.low, quantizer.high) for name, quantizer in self.quantizers.items()}

    @property
    def calibrated(self) -> bool:
        """Whether calibration has ended, so that the model computes with integers."""
        return self.input.rounding is not None

    def layers(self) -> list[IntegerLinear]:
        """The layers with integer weights."""
        return [module for module in self.modules() if isinstance(module, IntegerLinear)]

    def extra_repr(self) -> str:
        return f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"

    def forward(self, images: Tensor, keep: Keep | None = None) -> Tensor:
        """Compute the logits of each image from its kept patches: (B, num_classes), or what timm's model returns if it
        has no head or no pooling.

        Args:
            images: (B, C, H, W), floating point, normalised as the model wants it, of the model's size. If timm's model
                takes images of other sizes, this one does too.
            keep: the patches to keep: indices (B, K), a boolean mask (B, N) or a list of B index tensors. None keeps
                all patches.

        Raises:
            ValueError: images or `keep` do not fit the model or each other. The message names the value.
        """
        grid = self.grid
        if self.dynamic and images.ndim == 4:
            grid = PatchGrid.of(images.shape[2:], self.patch_size)
        return self._forward(self._cut(images, keep, grid), grid)

    def patches(self, images: Tensor, keep: Keep | None = None) -> PackedTokens:
        """Cut out the kept patches, as `forward_patches` takes them. Arguments and errors are those of `forward`, but
        all images have the size that the model was made for."""
        return self._cut(images, keep, self.grid)

    def _cut(self, images: Tensor, keep: Keep | None, grid: PatchGrid) -> PackedTokens:
        expected = (self.num_channels, *grid.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}, expected (B, {', '.join(map(str, expected))}) of a "
                "floating point dtype"
            )
        kept = pack_keep(keep, len(images), grid.num_patches, images.device)
        patches, _ = kernels.gather_patches(images, kept.positions, kept.cu_seqlens, patch_size=grid.patch_size)
        return replace(kept, values=patches)

    def forward_patches(self, patches: PackedTokens) -> Tensor:
        """Compute the logits of images of the model's size that are given as patches only, as `forward` does.

        No gradient flows. Until calibration ends, these are the float model's logits, and every place observes.

        Args:
            patches: values (T, C * ph * pw), normalised pixels in (C, ph, pw) order, at their positions in the grid,
                such as a batch of an `InvertedDataset`.

        Raises:
            ValueError: the patches do not have as many values as the model's, or they do not fit its grid.
        """
        check_patches(patches, patches.positions, self.grid.num_patches)
        return self._forward(patches, self.grid)

    @torch.no_grad()
    def _forward(self, patches: PackedTokens, grid: PatchGrid) -> Tensor:
        if patches.values.shape[1] != self.patch_embed.inputs:
            raise ValueError(
                f"patches have {patches.values.shape[1]} values each, the model's have {self.patch_embed.inputs}"
            )
        widest = max(len(layer.weight) for layer in self.blocks.modules() if isinstance(layer, IntegerLinear))
        images = CACHED_VALUES // (widest * (len(self.prefix_tokens) + patches.max_seqlen))
        split = patches.values.is_cpu and patches.batch_size  # no images are one group of none
        groups = patches.groups(max(1, images)) if split else [patches]
        dtype, first_only = self.pos_embed.dtype, self.calibrated  # places observe all tokens
        return torch.cat(
            [self.evaluate(group.values.to(dtype, copy=True), group, grid, first_only) for group in groups]
        )

    def evaluate(
        self,
        pixels: Tensor,
        patches: PackedTokens | None = None,
        grid: PatchGrid | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Run the model: from pixels in its dtype, which are overwritten, to logits.

        Args:
            pixels: (T, C * ph * pw) as packed in `patches`, or (B, N, C * ph * pw) for whole images.
            patches: where in the grid the patches lie. None for whole images.
            grid: the grid; None for the model's own.
            first_only: compute the last block only for the tokens that the head reads, if these are the first ones.
        """
        x, ragged = self._embed(pixels, patches, grid or self.grid)
        for each in self.blocks:
            x = each(x, ragged, self.reads if first_only and each is self.blocks[-1] else None)
        x = self.norm(first_tokens(x, ragged, self.reads))
        return self.logits(self.head(self.fc_norm(self.pool(x, ragged)))).to(1.0).values

    def _embed(
        self, pixels: Tensor, patches: PackedTokens | None, grid: PatchGrid
    ) -> tuple[Scaled, PackedTokens | None]:
        """Return the tokens with their positions embedded, and how they are packed if sequences differ in length."""
        x = self.patch_norm(self.patch_embed_out(self.patch_embed(self.input(Scaled(pixels)))))
        x, prefix, unit = x.to(self.tokens.unit).values, self.tokens.divide(self.prefix_tokens), self.pos_embed_out.unit
        # All positions are quantised together, whatever patches are kept.
        pos_embed = self.pos_embed_out(Scaled(self.pos_embed_out.divide(self._positions(grid)), unit)).values
        if patches is None:
            x, ragged = torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1), None  # [B, P + N, C]
            pos_embed = pos_embed.repeat(x.shape[0], 1, 1)
        else:
            tokens = replace(patches, values=x).prepend(prefix)
            x, ragged = tokens.batch_or_values(), None if tokens.is_uniform else tokens
            pos_embed = pos_embed[tokens.positions.long() + len(prefix)].view_as(x)  # prefix tokens begin at -P
        x = self.tokens(Scaled(x, self.tokens.unit))
        return self.norm_pre(add(x, Scaled(pos_embed, unit), self.embedded)), ragged

    def _positions(self, grid: PatchGrid) -> Tensor:
        """Return the position embedding (P + N, C) of a grid, which timm resamples if it is not the model's own."""
        if grid == self.grid:
            return self.pos_embed
        return resample_abs_pos_embed(
            self.pos_embed[None], grid.size, self.grid.size, num_prefix_tokens=len(self.prefix_tokens)
        )[0]

    def freeze(self) -> None:
        """End calibration: round the weights, and let the places round from now on."""
        for place in self.quantizers.values():
            place.freeze()
        for layer in self.layers():
            layer.freeze(self.weight_bits)
        self.split_products()

    def split_products(self) -> None:
        """Split the layers' sums of integers where the dtype might not hold them exactly."""
        for layer in self.layers():
            layer.split(self.input.levels)

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
