"""smi-fast quantize, distill and evaluate, as a user runs them, on small data."""

import json
import resource
import shutil

import pytest
import timm
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


def test_evaluate_takes_any_classifier_of_timms(data, tmp_path, capsys, seed):
    model = timm.create_model("test_resnet", num_classes=10).eval()
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    arguments = ["--model", "test_resnet", "--checkpoint", str(tmp_path / "resnet.safetensors")]
    assert main(["evaluate", *arguments, "--data", str(data), "--quiet"]) == 0
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    files = [(label, f) for label, c in enumerate(sorted(CIFAR10_CLASSES)) for f in (data / "test" / c).iterdir()]
    with torch.no_grad():
        right = [int(model(transform(Image.open(file))[None]).argmax()) == label for label, file in files]
    assert f"{sum(right) / 20:.2%} of 20 images" in capsys.readouterr().out


def test_a_bad_test_image_leaves_nothing_behind_and_the_retry_is_welcome(data, tmp_path, capsys):
    mine, bad = shutil.copytree(data, tmp_path / "data"), tmp_path / "data" / "test" / "ship" / "1.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:500])
    command = ["quantize", "--images", "2", "--data", str(mine), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 2
    assert f"{bad}: cannot be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    bad.write_bytes(whole)
    assert main(command) == 0


@pytest.fixture
def small_disk():
    """No file can grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["quantize", "distill"])
def test_a_full_disk_is_one_sentence_that_names_the_file(command, data, inverted, tmp_path, capsys, small_disk):
    how = ["--images", "2"] if command == "quantize" else ["--dataset", str(inverted), "--rounds", "1", "--steps", "1"]
    out = tmp_path / "out"
    assert main([command, *how, "--data", str(data), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"smi-fast: error: {out}/")
    assert ".safetensors cannot be written: " in error
    assert error.count("\n") == 1
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "deit_base_patch16_224"], (4000, 0.25, 1e-4, "50:0.3,100:0.3,200:0.3,300:0.3")),
        ([], (600, 0.1, 1e-3, "8:0.3,15:0.3,30:0.3,45:0.3")),
        (["--iterations", "400", "--tv-l2", "0.5"], (400, 0.1, 0.5, "5:0.3,10:0.3,20:0.3,30:0.3")),
    ],
    ids=["another model", "the model inside", "given"],
)
def test_distill_inverts_with_the_settings_of_invert(arguments, expected, monkeypatch, tmp_path):
    """The published settings of the paper, those of the model inside for it, and given ones in their place."""
    made = []

    def stop(model, *, stopping, objective, iterations, lr, **options):
        made.append((iterations, lr, objective.tv_l2, str(stopping)))
        raise KeyboardInterrupt

    for module in (smi_fast.cli, smi_fast.downstream):
        monkeypatch.setattr(module, "Inverter", stop)
        monkeypatch.setattr(module, "model_of", lambda *args: cifar10_vit(pretrained=False, depth=1))
    out = ["--out", str(tmp_path / "out")]
    assert main(["invert", *arguments, *out]) == 130
    assert main(["distill", *arguments, "--data", "nowhere", *out]) == 130
    assert made == [expected, expected]


def test_an_interrupted_distillation_says_what_is_kept(data, inverted, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(smi_fast.visualization, "save_accuracy", interrupt)
    how = ["--dataset", str(inverted), "--rounds", "1", "--steps", "1", "--data", str(data)]
    assert main(["distill", *how, "--out", str(tmp_path / "out"), "--quiet"]) == 130
    assert "after it wrote student.safetensors, report.json" in capsys.readouterr().err


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
        (["quantize", "--images", "0"], "--images: must be at least 1, got 0"),
        (["quantize", "--calibration", "INVERTED", "--images", "21"], "holds 20 images, not 21"),
        (["evaluate", "--data", "nowhere"], "nowhere is neither a folder nor"),
        (["evaluate", "--data", "EMPTY"], "holds no folders of classes"),
        (["evaluate", "--quantized", "INVERTED/inverted.safetensors", "--data", "EMPTY"], "is not a quantised model"),
        (["distill", "--data", "DATA", "--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (["distill", "--data", "DATA", "--student", "cifar10_vit", "--dataset", "EMPTY"], "no .safetensors"),
        (["distill", "--data", "DATA", "--lr", "inf"], "--lr: must be a finite number, got inf"),
        (["distill", "--data", "DATA", "--dataset", "INVERTED", "--tv-l2", "1"], "--tv-l2 is of an inversion"),
        (["distill", "--data", "DATA", "--student", "deit_tiny_patch16_224"], "--student-pretrained downloads timm's"),
        (
            ["distill", "--data", "DATA", "--student", "test_resnet", "--student-checkpoint", "RESNET"],
            "resnet.ResNet, not",
        ),
        (["distill", "--data", "DATA", "--samples", "2147483647"], "--samples: 2147483647 images take"),
        (["quantize", "--model", "test_resnet", "--checkpoint", "RESNET"], "the model is a ResNet, and only"),
        (["quantize", "--images", "2147483647"], "--images: 2147483647 images take"),
        (["quantize", "--calibration", "real", "--data", "DATA"], "DATA holds 20 images, not 32"),
        (["evaluate", "--data", "DATA", "--quantized", "Q", "--checkpoint", "nowhere"], "--quantized holds the whole"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments, message, data, inverted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "resnet.safetensors")
    message = message.replace("DATA", str(data))
    places = {
        "RESNET": str(tmp_path / "resnet.safetensors"),
        "INVERTED": str(inverted),
        "EMPTY": str(tmp_path / "empty"),
        "DATA": str(data),
    }
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
