"""A quantised model's arithmetic on real numbers."""

import torch
from torch import nn

from smi_fast.quantization import QuantizedViT
from smi_fast.quantization.observers import Quantizer, Scaled


def on_real_numbers(quantized: QuantizedViT, observing: QuantizedViT) -> QuantizedViT:
    """Let a model that still observes compute real numbers, which Eq. 5 rounds at the places and in the weights."""

    def rounded(place: Quantizer):
        scale = (place.high - place.low) / place.levels or 1.0
        zero_point = round(-place.low / scale)

        def hook(_: nn.Module, __: tuple, output: Scaled) -> Scaled:
            assert output.scale == 1
            integers = torch.clip(torch.round(output.values / scale) + zero_point, 0, place.levels)
            return Scaled(scale * (integers - zero_point))

        return hook

    for name, place in observing.quantizers.items():
        place.register_forward_hook(rounded(quantized.quantizers[name]))
    largest = 2 ** (quantized.weight_bits - 1) - 1
    for layer in observing.layers():
        scale = layer.weight.abs().amax(1, keepdim=True) / largest
        layer.weight = scale * torch.clip(torch.round(layer.weight / scale), -largest, largest)
    return observing
