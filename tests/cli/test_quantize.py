"""smi-fast quantize writes a model that computes what its report says, calibrated on the source that was asked for."""

import json
import shutil
import signal
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import smi_fast
from smi_fast.cli import main
from smi_fast.cli.quantize import inverted_images
from smi_fast.models import cifar10_vit
from smi_fast.runs.run import Run

pytest.importorskip("matplotlib")


def result(out) -> tuple[dict, dict]:
    """The tensors of the quantised model of a run, and its report without the seconds."""
    record = json.loads((out / "report.json").read_text())
    del record["seconds"]
    for model in ("float", "quantized"):
        record["test"][model].pop("seconds")
    return load_file(out / "quantized.safetensors"), record


def assert_equal(ours: tuple[dict, dict], theirs: tuple[dict, dict]) -> None:
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in ours[0].items():
        assert torch.equal(tensor, theirs[0][name]), name


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


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    """A command with four calibration images and three batches of test images, and the folder of its whole run."""
    command = ["quantize", "--images", "4", "--data", str(data), "--batch-size", "8", "--quiet"]
    out = tmp_path_factory.mktemp("quantized") / "whole"
    assert main([*command, "--out", str(out)]) == 0
    return command, out


def test_a_run_that_stops_after_every_batch_repeats_none_and_ends_with_the_same_bits(command, tmp_path, monkeypatch):
    """Every process ends at its first pause, of which there are two in the calibration and three for each model."""
    monkeypatch.setattr("smi_fast.quantization.calibration.CALIBRATION_BATCH", 2)
    pause, whole, out, codes = Run.pause, tmp_path / "whole", tmp_path / "out", []
    assert main([*command[0], "--out", str(whole)]) == 0

    def stop(run, name, save):
        run.signals.asked = signal.SIGTERM
        pause(run, name, save)

    monkeypatch.setattr(Run, "pause", stop)
    while not codes or codes[-1]:
        codes.append(main([*command[0], "--out", str(out)]))
        assert len(codes) < 10
    assert codes == [143] * 8 + [0]
    assert_equal(result(out), result(whole))


def test_ctrl_c_and_sigterm_end_a_run_that_others_may_not_enter_and_resume_goes_on(command, stopped, tmp_path):
    command, whole = command
    out = tmp_path / "out"
    resume = ["quantize", "--resume", str(out)]
    for arguments, number, code in (
        ([*command, "--out", str(out), "--batch-size", "1"], signal.SIGINT, 130),
        (resume, signal.SIGTERM, 143),
    ):
        found, error = stopped(arguments, out, number)
        assert found == code, error
        assert error.endswith(f"smi-fast: interrupted; to go on: smi-fast quantize --resume {out}\n")
        assert not (out / "report.json").exists()
    assert main(resume) == 0
    assert_equal(result(out), result(whole))


def test_a_finished_run_tells_its_results_again_and_measures_nothing(command, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(command[1], tmp_path / "out")
    files = {file: file.read_bytes() for file in out.rglob("*.*") if file.suffix != ".png"}
    monkeypatch.setattr("smi_fast.runs.evaluation.accuracy", None)
    monkeypatch.setattr("smi_fast.cli.quantize.quantize", None)
    assert main(["quantize", "--resume", str(out)]) == 0
    test = json.loads((out / "report.json").read_text())["test"]
    text = capsys.readouterr().out
    for model in ("float", "quantized"):
        assert f"{test[model]['accuracy']:.2%}" in text
    assert {file: file.read_bytes() for file in files} == files


def test_a_damaged_part_is_made_again_with_the_same_bits(command, seed, tmp_path, capsys):
    out = shutil.copytree(command[1], tmp_path / "out")
    for name in ("quantized.safetensors", "checkpoints/float.state", "checkpoints/quantized.safetensors.state"):
        flipped = bytearray((out / name).read_bytes())
        flipped[torch.randint(len(flipped), ()).item()] ^= 1 << torch.randint(8, ()).item()
        for damaged in (flipped, flipped[: len(flipped) // 2])[: 2 if "float" in name else 1]:
            (out / name).write_bytes(damaged)
            assert main(["quantize", "--resume", str(out)]) == 0
            [warning] = capsys.readouterr().err.splitlines()
            assert warning.startswith(f"smi-fast: warning: {out / name}")
            assert_equal(result(out), result(command[1]))


def test_a_run_of_other_settings_is_refused_by_their_names_and_stays(command, inverted, tmp_path, capsys):
    command, _ = command
    out, mine = tmp_path / "out", shutil.copytree(inverted, tmp_path / "mine")
    fixed = [*command, "--out", str(out), "--calibration", str(mine)]
    assert main(fixed) == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    capsys.readouterr()
    for other, message in (
        (["--weight-bits", "4"], "weight_bits is 8, not 4"),
        (["--limit", "3"], "other settings: test_images is 20, not 3"),
        (["--calibration", "noise"], "calibration is inverted, not noise"),
    ):
        assert main([*fixed, *other]) == 2
        assert message in capsys.readouterr().err
    dataset = smi_fast.InvertedDataset.load(mine / "images" / "00000.safetensors")
    others = dataset.images() / 2
    dataset = smi_fast.InvertedDataset.from_images(others, None, dataset.targets, (4, 4), dataset.metadata)
    dataset.save(mine / "images" / "00000.safetensors", overwrite=True)
    assert main(fixed) == 2
    assert ": calibration_checksum is" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in before} == before
    assert main([*fixed, "--overwrite"]) == 0


def test_a_run_goes_on_wherever_its_images_lie(data, inverted, tmp_path, capsys, monkeypatch):
    """What decides is what they hold."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inverted, "mine")
    shutil.copytree(data, "cifar")
    fixed = ["quantize", "--images", "4", "--out", "out", "--quiet"]
    assert main([*fixed, "--calibration", str(inverted), "--data", str(data)]) == 0
    monkeypatch.setattr("smi_fast.runs.evaluation.accuracy", None)
    assert main([*fixed, "--calibration", "./mine", "--data", "cifar/", "--limit", "20"]) == 0
    (tmp_path / "cifar" / "test" / "ship" / "1.png").rename(tmp_path / "cifar" / "test" / "ship" / "2.png")
    capsys.readouterr()
    assert main([*fixed, "--calibration", "mine", "--data", "cifar"]) == 2
    assert "other settings: test_files is" in capsys.readouterr().err


def test_the_same_command_goes_on_after_a_bad_test_image(data, tmp_path, capsys):
    mine, bad = shutil.copytree(data, tmp_path / "data"), tmp_path / "data" / "test" / "ship" / "1.png"
    whole = bad.read_bytes()
    bad.write_bytes(bytes(len(whole)))  # of another size it would be another data set
    command = ["quantize", "--images", "2", "--data", str(mine), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 2
    assert f"{bad}: cannot be read as an image" in capsys.readouterr().err
    bad.write_bytes(whole)
    assert main(command) == 0


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
        (["--model", "test_resnet", "--checkpoint", "RESNET"], "the model is a ResNet, which cannot be quantised"),
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
