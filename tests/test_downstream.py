"""smi-fast quantize, distill and evaluate, as a user runs them, on small data."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import smi_fast
from smi_fast.cli import main
from smi_fast.models import CIFAR10_CLASSES, cifar10_vit

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of two random images a class."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in CIFAR10_CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    """What smi-fast invert writes."""
    out = tmp_path_factory.mktemp("inverted") / "run"
    assert main(["invert", "--iterations", "6", "--stopping", "2:0.5", "--out", str(out), "--quiet"]) == 0
    return out


def accuracy_on(model, data, split="test"):
    """By hand: torchvision's folders in the order of the alphabet, which is that of the labels."""
    right = count = 0
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for label, name in enumerate(sorted(CIFAR10_CLASSES)):
        for file in sorted((data / split / name).iterdir()):
            pixels = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(32, 32, 3)
            with torch.no_grad():
                logits = model((pixels.permute(2, 0, 1)[None] / 255 - mean) / std)
            right, count = right + int(logits.argmax() == label), count + 1
    return right / count


def test_evaluate_prints_the_accuracy_of_the_model(data, capsys):
    assert main(["evaluate", "--data", str(data), "--quiet"]) == 0
    assert f"{accuracy_on(cifar10_vit(), data):.2%} of 20 images" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["inverted", "noise", "real"])
def test_quantize_writes_a_model_that_evaluate_reads_with_its_accuracy(source, data, inverted, tmp_path, capsys):
    out = tmp_path / "out"
    calibration = str(inverted) if source == "inverted" else source
    arguments = ["--calibration", calibration, "--images", "10", "--weight-bits", "4", "--data", str(data)]
    assert main(["quantize", *arguments, "--out", str(out), "--quiet"]) == 0
    assert "W4/A8" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert (out / "ranges.png").read_bytes().startswith(b"\x89PNG")
    assert record["sparsity"] == (0.5 if source == "inverted" else 0.0)
    assert record["test"]["float"]["accuracy"] == accuracy_on(cifar10_vit(), data)
    assert record["bytes"]["quantized.safetensors"] < record["bytes"]["float32"] / 6
    assert record["bytes"]["quantized.safetensors"] == (out / "quantized.safetensors").stat().st_size
    assert main(["evaluate", "--quantized", str(out / "quantized.safetensors"), "--data", str(data), "--quiet"]) == 0
    assert f"{record['test']['quantized']['accuracy']:.2%} of 20 images" in capsys.readouterr().out


def test_quantize_calibrates_on_the_kept_patches_alone(inverted, tmp_path):
    arguments = ["--calibration", str(inverted), "--images", "20", "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["quantize", *arguments]) == 0
    ranges = json.loads((tmp_path / "out" / "report.json").read_text())["ranges"]
    model, dataset = cifar10_vit(), smi_fast.InvertedDataset.load(inverted)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None] for key in ("mean", "std"))
    pixels = (dataset.patches.unflatten(1, (3, -1)) - mean) / std
    assert ranges["input"] == pytest.approx([pixels.min().item(), pixels.max().item()], rel=1e-5)


@pytest.mark.parametrize("stored", [False, True], ids=["fresh", "stored"])
def test_distill_trains_the_students_head_and_keeps_every_round(stored, data, inverted, tmp_path, capsys):
    out = tmp_path / "out"
    weights = tmp_path / "student.safetensors"
    student = cifar10_vit(pretrained=False)
    save_file(student.state_dict(), weights)
    images = ["--dataset", str(inverted), "--samples", "10"] if stored else ["--iterations", "4", "--samples", "10"]
    arguments = ["--student", "cifar10_vit", "--student-checkpoint", str(weights), "--rounds", "2", "--steps", "3"]
    assert main(["distill", *arguments, *images, "--data", str(data), "--out", str(out), "--quiet"]) == 0
    assert "accuracy" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert [r["samples"] for r in record["rounds"]] == [10, 20]
    assert [r["iterations"] for r in record["rounds"]] == ([0, 0] if stored else [4, 8])
    trained, before = load_file(out / "student.safetensors"), student.state_dict()
    changed = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    student.load_state_dict(trained)
    assert record["rounds"][-1]["accuracy"] == accuracy_on(student, data)
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "--weight-bits", "9"], "weight_bits must be an integer from 2 to 8, got 9"),
        (["quantize", "--calibration", "nowhere"], "nowhere is neither noise, real, nor"),
        (["quantize", "--calibration", "real"], "needs --data"),
        (["quantize", "--images", "0"], "--images must be at least 1, got 0"),
        (["quantize", "--calibration", "INVERTED", "--images", "21"], "holds 20 images, not 21"),
        (["evaluate", "--data", "nowhere"], "nowhere is neither a folder nor"),
        (["evaluate", "--data", "EMPTY"], "holds no folders of classes"),
        (["evaluate", "--quantized", "INVERTED/inverted.safetensors", "--data", "EMPTY"], "is not a quantised model"),
        (["distill", "--data", "DATA", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["distill", "--data", "DATA", "--student", "cifar10_vit", "--dataset", "EMPTY"], "no .safetensors"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments, message, data, inverted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"INVERTED": str(inverted), "EMPTY": str(tmp_path / "empty"), "DATA": str(data)}
    for word, path in places.items():
        arguments = [argument.replace(word, path) for argument in arguments]
    if arguments[0] != "evaluate":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("smi-fast: error: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_nothing_in_a_folder_is_overwritten_unasked(data, tmp_path, capsys):
    (tmp_path / "report.json").write_text("mine")
    for command in (["quantize"], ["distill", "--data", str(data)]):
        assert main([*command, "--out", str(tmp_path), "--quiet"]) == 2
        assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == "mine"


def test_a_damaged_dataset_is_found_before_anything_is_written(data, inverted, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray((inverted / "inverted.safetensors").read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    arguments = [
        "--dataset",
        str(damaged),
        "--data",
        str(data),
        "--student",
        "cifar10_vit",
        "--out",
        str(tmp_path / "o"),
    ]
    weights = tmp_path / "w.safetensors"
    save_file(cifar10_vit(pretrained=False).state_dict(), weights)
    assert main(["distill", *arguments, "--student-checkpoint", str(weights), "--quiet"]) == 2
    assert "damaged.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
