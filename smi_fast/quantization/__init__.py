"""Quantisation of trained ViTs, calibrated on inverted images."""

from smi_fast.quantization.calibration import quantize
from smi_fast.quantization.support import check_bits, check_supported
from smi_fast.quantization.vit import QuantizedViT

__all__ = ["QuantizedViT", "check_bits", "check_supported", "quantize"]
