"""Options become the same settings in every command that inverts."""

import pytest

from smi_fast.cli import main
from smi_fast.models import cifar10_vit

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
        made.append((settings.iterations, settings.lr, settings.tv_l2, settings.l2, str(settings.schedule)))
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.inversion.presets.InversionSettings.inverter", inverter)
    monkeypatch.setattr("smi_fast.cli.arguments.model_of", lambda *args: cifar10_vit(pretrained=False, depth=1))
    lr, data = ("--lr", []) if command == "invert" else ("--inversion-lr", ["--data", "nowhere"])
    arguments = [lr if argument == "--LR" else argument for argument in arguments]
    assert main([command, *arguments, *data, "--out", str(tmp_path / "out")]) == 130
    assert made == [expected]
