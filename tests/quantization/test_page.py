"""docs/quantization.md: its examples run, and what it says of models is what happens."""

import re

import torch
from backbones.test_coverage import NAMES
from page_cases import ROOT, run_python

import smi_fast

PAGE = "docs/quantization.md"


def test_the_examples_quantise_save_and_export(seed, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = run_python(PAGE)
    [saved] = tmp_path.rglob("*.safetensors")
    images = torch.randn(2, 3, 32, 32)
    expected = smi_fast.QuantizedViT.load(saved)(images)
    assert names["scores"].shape == (4, 10)
    step = names["quantized"].quantizers["logits"].unit
    # In float32 another order of sums may round to a neighbour, which later places see.
    torch.testing.assert_close(names["program"](images), expected, rtol=0, atol=10 * step)


def test_the_names_that_it_counts_are_those_of_the_coverage_test():
    [count] = re.findall(r"all (\d+) names", (ROOT / PAGE).read_text())
    assert int(count) == len(NAMES)
