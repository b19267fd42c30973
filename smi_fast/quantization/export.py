"""The quantised model as a program to deploy: a graph of PyTorch's PT2E operators on int8 weights."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.quantization.layers import IntegerLinear
from smi_fast.quantization.observers import Quantizer, Scaled


def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """Export a `QuantizedViT`. Its method `export` describes the program."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators)

    example = torch.zeros(2, model.num_channels, *model.grid.image_size)
    return torch.export.export(_Program(model), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


class _Program(nn.Module):
    """A copy of a QuantizedViT that takes whole images, in float32 on the CPU, with PT2E's operators."""

    def __init__(self, model: nn.Module):
        super().__init__()
        places = {id(place): _Quantizer(place) for place in model.quantizers.values()}
        layers = {id(layer): _Linear(layer, model.weight_bits) for layer in model.layers()}
        # For a module in its memo, deepcopy uses the memo's entry instead of a copy.
        self.model = copy.deepcopy(model, places | layers).float().cpu()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model.evaluate(self.model.grid.tiles(images).flatten(3).flatten(1, 2))


class _Quantizer(nn.Module):
    """A place that rounds to uint8 and returns real numbers."""

    unit = 1.0

    def __init__(self, place: Quantizer):
        super().__init__()
        self.settings = (place.rounding.scale, -place.rounding.lowest, 0, place.levels, torch.uint8)

    def divide(self, parameter: Tensor) -> Tensor:
        return parameter

    def forward(self, x: Scaled) -> Scaled:
        integers = torch.ops.quantized_decomposed.quantize_per_tensor(x.to(1.0).values, *self.settings)
        return Scaled(torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *self.settings))


class _Linear(nn.Module):
    """A Linear on real numbers, with int8 weights (out, in)."""

    def __init__(self, layer: IntegerLinear, bits: int):
        super().__init__()
        self.largest = 2 ** (bits - 1) - 1
        self.register_buffer("weight", layer.weight.to(torch.int8))
        self.register_buffer("scale", layer.weight_scale.float())
        self.register_buffer("zero_point", torch.zeros(len(layer.weight), dtype=torch.int64))
        self.register_buffer("bias", layer.bias.float())

    def forward(self, x: Scaled) -> Scaled:
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.weight, self.scale, self.zero_point, 0, -self.largest, self.largest, torch.int8
        )
        return Scaled(F.linear(x.values, weight, self.bias))
