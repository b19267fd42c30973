"""Options become the same settings in every command that inverts."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm

from smi_fast import InvertedDataset
from smi_fast.cli import main
from smi_fast.inversion.objectives import deep_inversion, deep_inversion_cnn
from smi_fast.inversion.presets import CIFAR10_CNN, DEMO, IMAGENET_CNN, PSAQ
from smi_fast.inversion.schedule import RebirthSchedule, WarmupCosine
from smi_fast.inversion.until import Until
from smi_fast.models import cifar10_resnet20, cifar10_vit

EARLY = replace(DEMO, objective=deep_inversion(1e-3, norm="image"), until=Until(0.8, 2, 7))
REBIRTH = replace(DEMO, stopping=RebirthSchedule(4), lr_schedule=WarmupCosine())
WEIGHTED = replace(
    CIFAR10_CNN, objective=deep_inversion_cnn(3.0, 1.0, tv_l1=0.5, tv_l2=2.5e-5, l2=0.0, l2_norm="batch")
)
SHORT = replace(IMAGENET_CNN, iterations=30, pooling={0: 2, 20: 1}, lr_schedule=WarmupCosine(1))


def timm_resnet(pretrained):
    return timm.create_model("resnet18", pretrained=pretrained)


PUBLISHED, SCALED = "50:0.3,100:0.3,200:0.3,300:0.3", "8:0.3,15:0.3,30:0.3,45:0.3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "deit_base_patch16_224"], (4000, 0.25, 1e-4, 0.0, PUBLISHED)),
        ([], (600, 0.1, 1e-3, 0.0, SCALED)),
        (["--iterations", "400", "--tv-l2", "0.5"], (400, 0.1, 0.5, 0.0, "5:0.3,10:0.3,20:0.3,30:0.3")),
        (["--l2", "0.25", "--stopping", "50:mass=0.9"], (600, 0.1, 1e-3, 0.25, "50:mass=0.9")),
        (["--LR", "2", "--stopping", "dense"], (600, 2.0, 1e-3, 0.0, "dense")),
    ],
    ids=["another model", "the model inside", "iterations", "mass", "dense"],
)
@pytest.mark.parametrize("command", ["invert", "distill"])
def test_settings_are_the_models_or_those_given(command, arguments, expected, monkeypatch, tmp_path):
    made = []

    def inverter(settings, model, **options):
        made.append(
            (settings.iterations, settings.lr, settings.objective.tv_l2, settings.objective.l2, str(settings.schedule))
        )
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.inversion.presets.InversionSettings.inverter", inverter)
    monkeypatch.setattr("smi_fast.cli.arguments.model_of", lambda *args: cifar10_vit(pretrained=False, depth=1))
    lr, data = ("--lr", []) if command == "invert" else ("--inversion-lr", ["--data", "nowhere"])
    arguments = [lr if argument == "--LR" else argument for argument in arguments]
    assert main([command, *arguments, *data, "--out", str(tmp_path / "out")]) == 130
    assert made == [expected]


@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        (cifar10_vit, ["--objective", "psaq"], PSAQ),
        (cifar10_vit, ["--norm", "image", "--until", "0.8", "--checks", "2", "--check-every", "7"], EARLY),
        (cifar10_vit, ["--stopping", "rebirth=4", "--lr-schedule", "cosine"], REBIRTH),
        (cifar10_vit, ["--published"], replace(DEMO, published=True)),
        (cifar10_vit, ["--jitter", "3", "--flip", "0.25"], replace(DEMO, jitter=3, flip=0.25)),
        (cifar10_vit, ["--jitter", "1.0", "--flip", "0"], replace(DEMO, jitter=1.0, flip=0.0)),
        (cifar10_resnet20, [], CIFAR10_CNN),
        (cifar10_resnet20, ["--batch-norm", "3", "--tv-l1", "0.5"], WEIGHTED),
        (timm_resnet, ["--iterations", "30"], SHORT),
    ],
    ids=["psaq", "until", "rebirth", "published", "pixels", "share", "small CNN", "weights", "CNN"],
)
def test_a_method_has_its_own_settings(model, arguments, expected, monkeypatch, tmp_path):
    made = []

    def inverter(settings, model, **options):
        made.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.inversion.presets.InversionSettings.inverter", inverter)
    monkeypatch.setattr("smi_fast.cli.arguments.model_of", lambda *args: model(pretrained=False))
    assert main(["invert", *arguments, "--out", str(tmp_path / "out")]) == 130
    assert made == [replace(expected, stopping=expected.schedule)]
    assert type(made[0].jitter) is type(expected.jitter)  # an integer is a number of pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "psaq", "--l2", "1"], "the objective psaq has no setting l2"),
        (["--check-every", "3"], "--check-every is a setting of the end that --until asks for"),
        (["--objective", "psaq", "--jitter", "3"], "--jitter: the method psaq draws its views itself"),
        (["--jitter", "33"], "jitter must lie in 0 to 32 pixels, got 33"),
        (["--flip", "1.5"], "flip must lie in [0, 1], got 1.5"),
        (["--image-size", "30"], "images of 30x30 pixels are not divided by patches of 4x4"),
        (["--image-size", "32x32x3"], "--image-size: must be such as 224 or 192x256, got '32x32x3'"),
        (["--image-size", "0"], "--image-size: must be at least 1, got 0"),
        (["--until", "1.5"], "must lie in (0, 1), got 1.5"),
        (["--stopping", "rebirth=65"], "64 patches cannot be released in 65 parts"),
        (["--stopping", "rebirth=1"], "at least 2 parts"),
        (["--batch-norm", "1"], "the objective deep_inversion has no setting batch_norm"),
        (["--objective", "deep_inversion_cnn"], "'batch_norm'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(arguments, message, capsys, tmp_path):
    assert main(["invert", *arguments, "--quiet", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("model", ["cifar10_vit", "cifar10_resnet20"])
def test_images_have_the_size_that_is_asked_for(model, tmp_path):
    size = ["--image-size", "16x40", "--model", model, "--verifier", "cifar10_vit"]
    short = ["--iterations", "1", "--stopping", "dense", "--classes", "0", "--images-per-class", "1", "--quiet"]
    assert main(["invert", *size, *short, "--out", str(tmp_path / "o")]) == 0
    assert InvertedDataset.load(tmp_path / "o").image_size == (3, 16, 40)


def test_a_data_set_is_downloaded_before_the_work(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("smi_fast.cli.arguments.download_data", lambda *given: asked.append(given))
    monkeypatch.chdir(tmp_path)
    for root, data in (([], "cifar10"), (["--root", "there"], "CIFAR-100")):
        assert main(["evaluate", "--data", data, "--download", *root]) == 2
        assert "cannot be read from" in capsys.readouterr().err
    assert asked == [("cifar10", Path("data")), ("CIFAR-100", Path("there"))]
    assert main(["quantize", "--download"]) == 2
    assert "--download: --data says which data set to download" in capsys.readouterr().err


def test_a_data_set_by_name_without_its_folder_is_refused_in_the_words_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = ["--out", str(tmp_path / "out")]
    for command in (["evaluate"], ["quantize", *out], ["distill", *out], ["reproduce", *out]):
        assert main([*command, "--data", "cifar10"]) == 2
        error = capsys.readouterr().err
        assert "--data cifar10 needs --root FOLDER" in error
        assert "--download" in error
    assert main(["evaluate", "--data", "imagenet"]) == 2
    assert "--download" not in capsys.readouterr().err  # ImageNet cannot be downloaded
    (tmp_path / "cifar10").mkdir()  # a folder of images
    assert main(["evaluate", "--data", "cifar10"]) == 2
    assert "--root" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["quantize", "reproduce"])
def test_of_several_processes_the_first_says_that_a_command_is_for_one_and_the_others_end_after_it(
    command, tmp_path, capsys, monkeypatch
):
    out, slept = tmp_path / "out", []
    arguments = [command, "--data", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"smi-fast: error: {command} is for one process, but 3 were started\n"
    assert not slept
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert slept[0] >= 10
    assert capsys.readouterr() == ("", "")
    assert not out.exists()
