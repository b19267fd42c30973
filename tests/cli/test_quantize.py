"""smi-fast quantize writes a model that computes what its report says, calibrated on the source that was asked for."""

import json
import shutil
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file

import smi_fast
from smi_fast.cli import main
from smi_fast.cli.quantize import inverted_images
from smi_fast.models import cifar10_vit

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("source", ["inverted", "noise", "real"])
def test_the_model_has_the_reported_accuracy(source, data, inverted, accuracy_by_hand, tmp_path, capsys):
    out = tmp_path / "out"
    calibration = str(inverted) if source == "inverted" else source
    arguments = ["--calibration", calibration, "--images", "10", "--weight-bits", "4", "--data", str(data)]
    assert main(["quantize", *arguments, "--out", str(out), "--quiet"]) == 0
    assert "W4/A8" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert (out / "ranges.png").read_bytes().startswith(b"\x89PNG")
    assert record["sparsity"] == (0.5 if source == "inverted" else 0.0)
    assert record["test"]["float"]["accuracy"] == accuracy_by_hand(cifar10_vit())
    assert record["bytes"]["quantized.safetensors"] < record["bytes"]["float32"] / 6
    assert record["bytes"]["quantized.safetensors"] == (out / "quantized.safetensors").stat().st_size
    assert main(["evaluate", "--quantized", str(out / "quantized.safetensors"), "--data", str(data), "--quiet"]) == 0
    assert f"{record['test']['quantized']['accuracy']:.2%} of 20 images" in capsys.readouterr().out


def test_the_exported_program_computes_the_models_logits(tmp_path, seed):
    assert main(["quantize", "--images", "2", "--export", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    images = torch.randn(2, 3, 32, 32)
    program = torch.export.load(tmp_path / "out" / "quantized.pt2").module()
    expected = smi_fast.QuantizedViT.load(tmp_path / "out" / "quantized.safetensors")(images)
    torch.testing.assert_close(program(images), expected, atol=0.05, rtol=0.05)
    sizes = json.loads((tmp_path / "out" / "report.json").read_text())["bytes"]
    assert sizes["quantized.pt2"] == (tmp_path / "out" / "quantized.pt2").stat().st_size


def test_kept_patches_alone_calibrate(inverted, tmp_path):
    arguments = ["--calibration", str(inverted), "--images", "20", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["quantize", *arguments]) == 0
    ranges = json.loads((tmp_path / "out" / "report.json").read_text())["ranges"]
    model, dataset = cifar10_vit(), smi_fast.InvertedDataset.load(inverted)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None] for key in ("mean", "std"))
    pixels = (dataset.patches.unflatten(1, (3, -1)) - mean) / std
    assert ranges["input"] == pytest.approx([pixels.min().item(), pixels.max().item()], rel=1e-5)


def test_calibration_images_are_of_all_classes_in_whatever_order_they_are_stored(tmp_path):
    """As `smi-fast invert --stopping rebirth=2` stores them: all classes, and then all of them again."""
    images = torch.arange(20)[:, None, None, None].expand(20, 3, 32, 32) / 20.0
    record = {name: cifar10_vit().pretrained_cfg[name] for name in ("mean", "std")}
    dataset = smi_fast.InvertedDataset.from_images(images, None, torch.arange(20) % 10, (4, 4), record)
    dataset.save(tmp_path / "images.safetensors")
    args = Namespace(calibration=tmp_path / "images.safetensors", images=10)
    tokens = inverted_images(args, smi_fast.accelerate(cifar10_vit(False)))
    mean, std = (torch.tensor(record[name])[:, None] for name in ("mean", "std"))
    pixels = tokens.values.view(10, 64, 3, 16) * std + mean
    assert sorted(pixels[:, 0, 0, 0].mul(20).round().int().remainder(10).tolist()) == list(range(10))


def test_the_retry_after_a_bad_test_image_is_welcome(data, refused, tmp_path):
    mine, bad = shutil.copytree(data, tmp_path / "data"), tmp_path / "data" / "test" / "ship" / "1.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:500])
    command = ["quantize", "--images", "2", "--data", str(mine)]
    refused(command, f"{bad}: cannot be read as an image")
    bad.write_bytes(whole)
    assert main([*command, "--out", str(tmp_path / "out"), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight-bits", "9"], "weight_bits must be an integer from 2 to 8, got 9"),
        (["--calibration", "nowhere"], "nowhere is neither noise, real, nor"),
        (["--calibration", "real"], "needs --data"),
        (["--images", "0"], "--images: must be at least 1, got 0"),
        (["--calibration", "INVERTED", "--images", "21"], "holds 20 images, not 21"),
        (["--calibration", "INVERTED", "--images", "2", "--model", "test_vit", "--checkpoint", "VIT"], "model of mean"),
        (["--calibration", "OTHER", "--images", "1"], "in patches of 4x4, the model takes 32x32"),
        (["--model", "test_resnet", "--checkpoint", "RESNET"], "the model is a ResNet, and only"),
        (["--images", "2147483647"], "--images: 2147483647 images take"),
        (["--calibration", "real", "--data", "DATA"], "DATA holds 20 images, not 32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(arguments, message, data, inverted, refused, tmp_path):
    for name in ("test_resnet", "test_vit"):
        save_file(timm.create_model(name, num_classes=10).state_dict(), tmp_path / f"{name}.safetensors")
    other = smi_fast.InvertedDataset.from_images(torch.rand(1, 3, 16, 16), None, torch.zeros(1).long(), (4, 4))
    other.save(tmp_path / "other.safetensors")
    places = {
        "RESNET": tmp_path / "test_resnet.safetensors", "VIT": tmp_path / "test_vit.safetensors",
        "OTHER": tmp_path / "other.safetensors", "INVERTED": inverted, "DATA": data,
    }  # fmt: skip
    refused(["quantize", *(str(places.get(argument, argument)) for argument in arguments)],
            message.replace("DATA", str(data)) if "DATA" in arguments else message)  # fmt: skip
