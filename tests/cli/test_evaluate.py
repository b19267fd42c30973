"""smi-fast evaluate prints the accuracy that a computation by hand gives."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from smi_fast.cli import main
from smi_fast.models import CIFAR10_CLASSES, cifar10_vit


def test_the_model_inside(data, accuracy_by_hand, capsys):
    assert main(["evaluate", "--data", str(data), "--quiet"]) == 0
    assert f"{accuracy_by_hand(cifar10_vit()):.2%} of 20 images" in capsys.readouterr().out


def test_any_timm_classifier(data, tmp_path, capsys, seed):
    model = timm.create_model("test_resnet", num_classes=10).eval()
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    arguments = ["--model", "test_resnet", "--checkpoint", str(tmp_path / "resnet.safetensors")]
    assert main(["evaluate", *arguments, "--data", str(data), "--quiet"]) == 0
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    files = [(label, f) for label, c in enumerate(sorted(CIFAR10_CLASSES)) for f in (data / "test" / c).iterdir()]
    with torch.no_grad():
        right = [int(model(transform(Image.open(file))[None]).argmax()) == label for label, file in files]
    assert f"{sum(right) / 20:.2%} of 20 images" in capsys.readouterr().out


def test_limit_takes_evenly_spaced_images(data, capsys):
    assert main(["evaluate", "--data", str(data), "--limit", "7", "--batch-size", "3", "--quiet"]) == 0
    assert " of 7 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere is neither a folder nor"),
        (["--data", "EMPTY"], "holds no folders of classes"),
        (["--quantized", "INVERTED", "--data", "EMPTY"], "is not a quantised model"),
        (["--data", "DATA", "--quantized", "Q", "--checkpoint", "nowhere"], "--quantized holds the whole"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(arguments, message, data, inverted, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "INVERTED": inverted / "images" / "00000.safetensors", "DATA": data}
    refused(["evaluate", *(str(places.get(argument, argument)) for argument in arguments)], message)
