"""The exported program: int8 weights, PyTorch's own operators, and the numbers of the quantised model."""

import pytest
import torch

from smi_fast.quantization import quantize


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_program_holds_int8_weights_and_gives_the_same_numbers(model, images, tmp_path, weight_bits):
    """float32 sums in another order may round an activation to its neighbour, and no more."""
    quantized = quantize(model, images, weight_bits, 8)
    torch.export.save(quantized.export(), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    dtypes = [value.dtype for name, value in program.state_dict.items() if name.endswith("weight") and value.ndim == 2]
    assert dtypes == [torch.int8] * 10
    operators = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert operators <= {"aten", "quantized_decomposed", "<built-in function getitem>"}
    step = quantized.quantizers["logits"].unit
    for fresh in torch.randn(13, 3, 32, 32).split((9, 1, 3)):
        logits, expected = program.module()(fresh), quantized(fresh).float()
        torch.testing.assert_close(logits, expected, rtol=0, atol=3 * step)
        assert (logits - expected).abs().mean() < 0.3 * step


def test_export_leaves_the_model_as_it_is(model, images):
    quantized = quantize(model, images)
    logits = quantized(images)
    quantized.export()
    assert torch.equal(quantized(images), logits)
