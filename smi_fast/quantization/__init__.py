"""Quantisation of trained ViTs, calibrated on inverted images."""

from smi_fast.quantization.vit import QuantizedViT, check_supported, quantize

__all__ = ["QuantizedViT", "check_supported", "quantize"]
