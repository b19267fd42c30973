"""smi-fast invert, as a user runs it: what it writes, what it prints, and how it refuses bad input."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import smi_fast
from smi_fast import deep_inversion
from smi_fast.cli import main
from smi_fast.cli.invert import parse_classes
from smi_fast.data.states import load_state
from smi_fast.inversion.until import Until
from smi_fast.models import CIFAR10_CLASSES, cifar10_vit
from smi_fast.runs.inversion import invert, records, shard
from smi_fast.studies import run_pictures
from smi_fast.studies.report import COLUMNS

WRITTEN = ["curve.png", "grid.png", "index.html", "process.png", "process.webp", "report.json"]
FILES = sorted([".lock", "images", "process.state", "run.json", *WRITTEN])
SHORT = ["--iterations", "30", "--images-per-class", "1", "--quiet"]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "smi_fast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The command without arguments but for the folder, the device and silence."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    return run("invert", "--out", out, "--device", "cpu", "--quiet"), out


def test_the_demo_writes_all_its_files(demo):
    process, out = demo
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert process.stderr == ""


def test_the_demos_images_are_their_targets_from_kept_patches_alone(demo):
    _, out = demo
    report = json.loads((out / "report.json").read_text())
    dataset = smi_fast.InvertedDataset.load(out)
    patches, targets = dataset.collate([dataset[i] for i in range(len(dataset))])
    mean, std = (torch.tensor(report[name]).repeat_interleave(16) for name in ("mean", "std"))
    model = cifar10_vit()  # timm's own forward on the tokens of the kept patches
    pixels = ((patches.values - mean) / std).view(len(targets), -1, 48)
    weight = model.patch_embed.proj.weight.flatten(1)
    positions = patches.positions.view(len(targets), -1).long()
    tokens = pixels @ weight.T + model.patch_embed.proj.bias + model.pos_embed[0, 1:][positions]
    prefix = (model.cls_token + model.pos_embed[:, :1]).expand(len(targets), -1, -1)
    logits = model.forward_head(model.norm(model.blocks(torch.cat((prefix, tokens), dim=1))))
    right = (logits.argmax(1) == targets).float().mean().item()
    assert targets.tolist() == [t for t in range(10) for _ in range(2)]
    assert positions.shape[1] == 14
    assert right >= 0.95
    assert report["classified_as_target"] == pytest.approx(right)
    confidence = logits.softmax(1).gather(1, targets[:, None])[:, 0]
    got = torch.tensor(report["images"]["confidence"])
    torch.testing.assert_close(got, confidence.detach(), rtol=1e-3, atol=1e-3)


def test_the_demos_table_counts_tokens_and_operations(demo):
    process, out = demo
    stages = json.loads((out / "report.json").read_text())["stages"]
    assert [stage["patches"] for stage in stages] == [64, 44, 30, 21, 14]
    width, depth, batch = 192, 6, 20
    for stage in stages:
        n = stage["tokens"]
        assert n == stage["patches"] + 1
        products = 12 * width * width * n + 2 * n * n * width  # multiply-adds of one whole block
        whole = depth * products + 48 * width * stage["patches"] + width * 10
        # the last block does keys and values for all tokens, the rest for one
        whole -= 10 * width * width * (n - 1) + 2 * n * (n - 1) * width
        forward_and_inputs = 2 * 2 * whole * batch
        # backward of attention: its two products have two inputs each
        forward_and_inputs += 2 * (depth - 1) * 2 * n * n * width * batch + 2 * 2 * n * width * batch
        assert stage["gflop_per_iteration"] * 1e9 == pytest.approx(forward_and_inputs, rel=0.01)
        assert stage["iterations_per_second"] > 0
        assert stage["peak_memory_bytes"] > 2**20
        layers = depth * 12 * width * width * n + 48 * width * 64 + width * 10 + (2 * depth + 1) * 4 * width * n
        assert stage["gflop_paper"] * 1e9 == 3 * layers * batch
        assert f"{stage['gflop_per_iteration']:.2f}  {stage['gflop_paper']:>7.2f}" in process.stdout
    assert stages[0]["speedup_over_dense"] == 1
    assert stages[-1]["speedup_over_dense"] > 1.5


def test_stopped_patches_are_dark_grey_in_the_pictures_and_black_in_the_data(demo):
    _, out = demo
    dataset = smi_fast.InvertedDataset.load(out)
    for image, grey in zip(dataset.images(), dataset.images(stopped=0.25), strict=True):
        stopped = (image == 0).view(3, 8, 4, 8, 4).all(4).all(2).all(0)
        assert stopped.sum() == 64 - 14
        assert (grey.view(3, 8, 4, 8, 4).permute(1, 3, 0, 2, 4)[stopped] == 0.25).all()
    kept = (
        (image * 255).round().int().view(3, 8, 4, 8, 4).permute(1, 3, 0, 2, 4)[~stopped][0]
    )  # a patch of the last image
    for name in ("grid.png", "process.png"):
        with Image.open(out / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == 64).all(2).mean() > 0.2
        assert (pixels == 0).all(2).mean() < 0.01
    with Image.open(out / "grid.png") as picture:
        colours = set(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))
    assert set(map(tuple, kept.flatten(1).T.tolist())) <= colours


def test_the_demo_says_what_it_did_and_what_its_columns_mean(demo):
    process, out = demo
    text = " ".join(process.stdout.split())
    assert "20 images of 10 classes, made from the weights of cifar10_vit alone" in text
    assert "14 of 64 patches of an image are left, a sparsity of 78%" in text
    for column, meaning in COLUMNS.items():
        assert f"{column} {meaning}" in text
    for name in WRITTEN:
        assert f" {name} " in text
    page = (out / "index.html").read_text()
    report = json.loads((out / "report.json").read_text())
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {link for link in links if not link.startswith("data:")} == set(WRITTEN) - {"index.html"}
    assert len([link for link in links if link.startswith("data:")]) == 20
    for confidence in report["images"]["confidence"]:
        assert f"{confidence:.3f}" in page


def test_the_dataset_says_how_it_was_made(demo):
    _, out = demo
    with safe_open(out / "images" / "00000.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["smi_fast"])["metadata"]
    assert metadata["model"] == "cifar10_vit"
    assert metadata["stopping"] == "8:0.3,15:0.3,30:0.3,45:0.3"
    assert metadata["seed"] == 0
    assert metadata["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])
    assert metadata["versions"]["torch"] == torch.__version__


def test_the_dataset_follows_from_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["invert", *SHORT, "--classes", "ship,3", "--seed", str(seed), "--out", str(tmp_path / name)]) == 0
    a, b, c = (smi_fast.InvertedDataset.load(tmp_path / name) for name in "abc")
    assert torch.equal(a.patches, b.patches)
    assert a.targets.tolist() == [8, 3]
    assert not torch.equal(a.images(), c.images())


def test_batches_start_from_different_noise(tmp_path):
    arguments = ["--classes", "5", "--images-per-class", "3", "--batch-size", "2", "--iterations", "20", "--quiet"]
    assert main(["invert", *arguments, "--stopping", "5:0.5", "--out", str(tmp_path / "o")]) == 0
    dataset = smi_fast.InvertedDataset.load(tmp_path / "o")
    assert dataset.targets.tolist() == [5, 5, 5]
    assert dataset.cu_seqlens.tolist() == [0, 32, 64, 96]
    assert not torch.equal(dataset.patches[:32], dataset.patches[64:])


def test_a_timm_model_is_inverted_from_a_checkpoint(tmp_path, seed):
    torch.save(timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "weights.pth")
    arguments = ["--model", "test_vit", "--checkpoint", tmp_path / "weights.pth", *SHORT]
    arguments = [*map(str, arguments), "--iterations", "3", "--stopping", "dense", "--out", str(tmp_path / "o")]
    assert main(["invert", *arguments]) == 0
    dataset = smi_fast.InvertedDataset.load(tmp_path / "o")
    assert dataset.image_size == (3, 160, 160)
    assert dataset.targets.tolist() == [0, 1, 2, 3]
    assert dataset.metadata["settings"]["lr"] == 0.25


def test_a_model_of_the_hub_is_said_to_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("smi_fast.cli.arguments.load_model", lambda name, **others: cifar10_vit())
    arguments = ["--model", "hf-hub:me/mine", *SHORT, "--iterations", "1", "--classes", "0", "--lr", "0.1"]
    assert main(["invert", *arguments, "--out", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["weights"] == "pretrained"


def test_without_matplotlib_the_curve_is_missing_and_said_to_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["invert", *SHORT, "--iterations", "5", "--classes", "0", "--out", str(tmp_path / "o")]) == 0
    assert 'pip install ".[viz]"' in capsys.readouterr().out
    assert not (tmp_path / "o" / "curve.png").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_goes_on_with_the_same_images(number, code, tmp_path):
    arguments = ["invert", "--iterations", "150", "--classes", "0", "--device", "cpu", "--stopping", "3:0.5", "--quiet"]
    command = [sys.executable, "-m", "smi_fast", *arguments, "--out"]
    begun = [*command, tmp_path / "o", "--checkpoint-every", "1e-9"]
    with subprocess.Popen(begun, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "o" / "checkpoints" / "00000.state").exists():
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert error.splitlines() == [
        "stopping after this iteration; once more to stop at once",
        f"smi-fast: interrupted; to go on: smi-fast invert --resume {tmp_path / 'o'}",
    ]
    assert [file.name for file in (tmp_path / "o" / "checkpoints").iterdir()] == ["00000.state"]
    resumed = ["invert", "--resume", str(tmp_path / "o"), "--checkpoint-every", "5"]
    for command in (resumed, [*arguments, "--out", str(tmp_path / "p")]):
        assert main(command) == 0
    ours, theirs = (smi_fast.InvertedDataset.load(tmp_path / name) for name in "op")
    assert torch.equal(ours.patches, theirs.patches)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "op"]
    assert reports[0]["loss"] == reports[1]["loss"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted([*FILES, "checkpoints"])


def test_the_same_command_changes_nothing_that_is_finished(demo, capsys):
    _, out = demo
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert main(["invert", "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert main(["invert", "--out", str(out), "--device", "cpu", "--iterations", "601", "--lr", "0.2"]) == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings: " in error
    assert "iterations is 600, not 601" in error
    assert "lr is 0.1, not 0.2" in error
    assert error.count("\n") == 1
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_report_is_made_again_from_the_images(demo, tmp_path, capsys):
    _, out = demo
    folder = tmp_path / "copy"
    shutil.copytree(out, folder)
    drawn = set(WRITTEN) - {"curve.png"}
    for name in WRITTEN:
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert all((folder / name).read_bytes() == (out / name).read_bytes() for name in drawn)
    assert "images as their target" in capsys.readouterr().out
    (folder / "images" / "00000.safetensors").unlink()
    assert main(["report", str(folder)]) == 2
    assert "none of the 20 images of its run yet" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no run of smi-fast invert" in capsys.readouterr().err


def test_only_the_command_that_began_a_run_goes_on_with_it(demo, tmp_path, capsys):
    _, out = demo
    for arguments, message in (
        (["distill", "--resume", str(out)], f"--resume: the run in {out} was begun by smi-fast invert"),
        (["invert", "--resume", str(tmp_path)], f"--resume: {tmp_path} holds no run"),
        (["invert", "--resume"], "--resume: expected one argument"),
        (["invert", "--resume", str(out), "--seed", "1"], "seed is 0, not 1"),
        (["invert", "--resume", str(out), "--overwrite"], "give either --resume or --overwrite, not both"),
        (["invert", "--resu", str(out)], "unrecognized arguments: --resu"),
        (["invert", "--over", "--out", str(out)], "unrecognized arguments: --over"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_run_goes_on_with_its_options_and_those_that_are_given_anew(tmp_path, monkeypatch, capsys):
    torch.save(cifar10_vit().state_dict(), tmp_path / "weights.pth")
    begun = ["invert", "--checkpoint", "weights.pth", "--classes", "0", "--iterations", "2", "--quiet", "--out", "o"]
    monkeypatch.chdir(tmp_path)
    assert main([*begun, "--overwrite"]) == 0
    before = (tmp_path / "o" / "images" / "00000.safetensors").read_bytes()
    for more in ([], ["--device", "cpu", "--log=csv"]):
        assert main(["invert", "--resume", str(tmp_path / "o"), *more]) == 0
    monkeypatch.chdir("/")
    assert main(["invert", "--resume", str(tmp_path / "o")]) == 2
    assert f"the run was begun in {tmp_path}, where its options name files" in capsys.readouterr().err
    assert (tmp_path / "o" / "images" / "00000.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "0"], "--iterations: must be at least 1, got 0"),
        (["--images-per-class", "0"], "--images-per-class: must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1, got -1"),
        (["--classes", "3,10"], "10 is no class of the model, which has 10"),
        (["--classes", "unicorn"], "'unicorn' is neither"),
        (["--stopping", "50:1.5"], "must lie in (0, 1), got 1.5"),
        (["--stopping", "50:0.3,20:0.3"], "20 after 50"),
        (["--stopping", "1:0.9,2:0.9"], "leaves no patch"),
        (["--stopping", "700:0.3"], "iteration 700, but there are only 600"),
        (["--stopping", "nonsense"], "cannot read 'nonsense'"),
        (["--verifier-checkpoint", "nowhere.pth"], "--verifier-checkpoint is about the weights of the model that"),
        (["--model", "deit_tiny_patch16_225"], "no model 'deit_tiny_patch16_225'"),
        (["--model", "resnet18", "--checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--device", "toaster"], "'toaster' cannot be used"),
        (["--lr", "-1"], "lr must be positive and finite, got -1"),
        (["--lr", "inf"], "--lr: must be a finite number, got inf"),
        (["--tv-l2", "nan"], "--tv-l2: must be a finite number, got nan"),
        (["--seed", str(2**64)], f"--seed: must lie in 0 to 2^64 - 1, got {2**64}"),
        (["--seed", "1.5"], "--seed: must be an integer, got '1.5'"),
        (["--iterations", "9" * 20], "--iterations: must be at most 2147483647, got 9999"),
        (["--images-per-class", "999999999"], "--images-per-class: 9999999990 images take "),
        (["--classes", "0-99999999999"], "99999999999 is no class of the model, which has 10"),
        (["--classes", "²"], "'²' is neither a class number"),
        (["--device", "meta"], "'meta' cannot be used: only cpu and cuda are supported"),
        (["--device", "mps"], "'mps' cannot be used: only cpu and cuda are supported"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--checkpoint-every", "0"], "--checkpoint-every: must be more than 0 and finite, got 0"),
        (["--checkpoint-every", "often"], "--checkpoint-every: must be a number of minutes, got 'often'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, refused):
    refused(["invert", *arguments], message)


def test_triton_without_a_gpu_is_refused_with_the_reason(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = run("invert", "--backend", "triton", "--device", "cpu", "--out", tmp_path / "o", env=environment)
    assert process.returncode == 2
    assert "needs tensors on a CUDA device, not on 'cpu'" in process.stderr
    assert not (tmp_path / "o").exists()


def test_no_network_is_one_sentence_within_seconds(tmp_path, capsys, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port that refuses every connection
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    started = time.monotonic()
    assert main(["invert", "--model", "test_vit", "--pretrained", "--out", str(tmp_path / "o")]) == 2
    assert time.monotonic() - started < 10  # the client's own attempts take 23 s a file
    error = capsys.readouterr().err
    assert "smi-fast: error: the pretrained weights of test_vit cannot be downloaded: http://127.0.0.1:9" in error
    assert "--checkpoint reads weights from a file" in error
    assert "HF_HOME" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert not constants.HF_HUB_OFFLINE


def test_weights_that_are_nan_are_refused(tmp_path, capsys):
    weights = cifar10_vit().state_dict()
    weights["norm.bias"][7] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    assert main(["invert", *SHORT, "--checkpoint", str(tmp_path / "nan.pth"), "--out", str(tmp_path / "o")]) == 2
    assert "weight norm.bias holds 1 value" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_neighbouring_seeds_have_no_image_in_common(tmp_path):
    arguments = ["--classes", "5", "--images-per-class", "3", "--batch-size", "1", "--iterations", "1", "--quiet"]
    for run_seed in "01":
        assert main(["invert", *arguments, "--seed", run_seed, "--out", str(tmp_path / run_seed)]) == 0
    images = torch.cat([smi_fast.InvertedDataset.load(tmp_path / run_seed).images() for run_seed in "01"]).flatten(1)
    assert (torch.cdist(images, images) + 100 * torch.eye(6)).min() > 5  # of independent noise, about 17


def test_an_infinite_loss_is_one_warning_and_null_in_the_report(tmp_path, capsys):
    arguments = ["--classes", "0", "--iterations", "2", "--stopping", "dense", "--tv-l2", "1e38"]
    assert main(["invert", *SHORT, *arguments, "--out", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().err == "smi-fast: warning: the loss is inf from iteration 0 on\n"
    record = json.loads((tmp_path / "o" / "report.json").read_text(), parse_constant=pytest.fail)
    assert record["loss"] == [None, None]


def test_nan_attention_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smi_fast.deep_inversion, "loss", lambda self, outputs, _: outputs.logits.sum() * math.nan)
    assert main(["invert", "--out", str(tmp_path / "out"), *SHORT]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("smi-fast: error: at iteration 2 no patch can be selected")
    assert "nan from iteration 0" in error


def test_ctrl_c_before_the_first_iteration_says_that_nothing_was_written(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.cli.arguments.model_of", interrupt)
    assert main(["invert", *SHORT, "--out", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err == "smi-fast: interrupted; nothing was written\n"
    assert not (tmp_path / "o").exists()


def test_ctrl_c_while_pictures_are_drawn_loses_no_image(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    arguments = ["invert", *SHORT, "--iterations", "2", "--classes", "0", "--out", str(tmp_path / "o")]
    with monkeypatch.context() as patch:
        patch.setattr("smi_fast.studies.run_pictures.save_curve", interrupt)
        assert main(arguments) == 130
    assert f"to go on: smi-fast invert --resume {tmp_path / 'o'}" in capsys.readouterr().err
    monkeypatch.setattr(smi_fast.Inverter, "run", interrupt)  # which is not needed any more
    assert main(arguments) == 0
    assert set(FILES) - {path.name for path in (tmp_path / "o").iterdir()} == set()


def test_classes_are_read_as_numbers_ranges_and_names():
    names = list(CIFAR10_CLASSES)
    assert parse_classes("3,0-2,ship,3", names) == [3, 0, 1, 2, 8]
    assert parse_classes("all", names * 2) == list(range(20))
    assert parse_classes("first ten", names * 2) == list(range(10))
    assert parse_classes("first ten", names[:4]) == list(range(4))
    assert parse_classes("English Springer,GARBAGE_TRUCK,0", ["tench", "english_springer", "garbage truck"]) == [
        1,
        2,
        0,
    ]
    with pytest.raises(ValueError, match="did you mean automobile"):
        parse_classes("automobil", names)
    for text in ("", "5-3", "-1", "1.5", "0-10"):
        with pytest.raises(ValueError, match="--classes"):
            parse_classes(text, names)


def test_released_images_are_shown_and_verified_as_images_of_their_classes(tmp_path, monkeypatch):
    """A row of the picture for each class, and an accuracy over images, of which the second batch has fewer."""
    labels = []
    monkeypatch.setattr(run_pictures, "save_classes", lambda images, names, path: labels.extend(names))
    short = ["--iterations", "4", "--images-per-class", "1", "--batch-size", "2", "--stopping", "rebirth=2", "--quiet"]
    given = ["--classes", "0-2", "--verifier", "cifar10_vit", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["invert", *short, *given]) == 0
    assert labels == [name for name in CIFAR10_CLASSES[:3] for _ in range(2)]
    dataset, model = smi_fast.InvertedDataset.load(tmp_path), cifar10_vit()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        right = model((dataset.images() - mean) / std).argmax(1) == dataset.targets
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verified_at_end"] == pytest.approx(right.float().mean().item())


def test_pictures_of_a_stream_show_the_same_images_as_long_as_all_of_them_are_there(seed, tmp_path):
    class SureOfClass0(Until):
        def count(self, confident, logits, targets):
            return [int(target == 0) for target in targets.tolist()]

    options = {"stopping": "dense", "iterations": 40, "until": SureOfClass0(checks=1, every=8), "progress": False}
    inverter = smi_fast.Inverter(cifar10_vit(False, depth=1), objective=deep_inversion(norm="image"), **options)
    invert(inverter, [1, 0, 2], tmp_path, batch_size=3, seed=seed)
    (batch,), snapshots = records([shard(tmp_path, 0)]), load_state(tmp_path / "process.state")
    assert batch["iterations"] == [40, 8, 40]
    assert [len(frame["cu_seqlens"]) - 1 for frame in snapshots["frames"]] == [3] * len(snapshots["frames"])
    assert [frame["iteration"] for frame in snapshots["frames"] if frame["is_end"]] == [2]
