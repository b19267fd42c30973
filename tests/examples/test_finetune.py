"""The recipe of a fine-tuned teacher, on random images and weights."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from smi_fast import Inverter, load_data
from smi_fast.data.states import load_state
from smi_fast.models.loading import load_model

ROOT = Path(__file__).parents[2]
NAME = "test_vit"  # timm's, 160 pixels, patches of 16
CLASSES = ("apple", "pear", "plum")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("finetune")


@pytest.fixture
def run(recipe, seed, tmp_path, monkeypatch):
    """The recipe on 24 images, of which a class can be told by its colour, with the weights of a headless backbone."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        for number in range(8):
            pixels = random.integers(0, 96, (40, 36, 3), dtype=np.uint8)
            pixels[..., label] += 128
            for split in ("train", "test") if number < 2 else ("train",):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    backbone = timm.create_model(NAME, num_classes=0, img_size=64)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    options = [
        f"--data={tmp_path}", f"--model={NAME}", f"--checkpoint={tmp_path / 'backbone.safetensors'}", "--device=cpu",
        "--image-size=32", "--epochs=1.5", "--batch-size=6", "--warmup=2", "--shift=4", "--save-every=2",
        "--dtype=float32",
    ]  # fmt: skip

    def run(out, *more):
        monkeypatch.setattr(sys, "argv", ["recipe", *options, f"--out={tmp_path / out}", *more])
        recipe.main()
        return json.loads((tmp_path / out / "figures.json").read_text())

    return run


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(recipe, run, tmp_path, monkeypatch):
    run("whole")
    step, calls = recipe.train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert load_state(tmp_path / "stopped" / "checkpoint.state")["step"] == 2
    figures = run("stopped")
    assert (figures["step"], figures["steps"]) == (6, 6)  # 1.5 epochs of 4 steps
    whole, stopped = (load_state(tmp_path / name / "checkpoint.state")["model"] for name in ("whole", "stopped"))
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name
    with pytest.raises(SystemExit, match="another --lr"):
        run("stopped", "--lr=1")
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(SystemExit, match="another --checkpoint"):
        run("stopped")


def test_without_epochs_the_teacher_is_the_backbone_with_a_head(run, tmp_path):
    figures = run("linear", "--epochs=0")
    assert figures["step"] == 0
    assert figures["test_accuracy"] == figures["probe_accuracy"] == 1
    found = load_model(NAME, checkpoint=tmp_path / "linear" / "model.safetensors").state_dict()
    before = load_file(tmp_path / "backbone.safetensors")
    for name, value in before.items():
        if name != "pos_embed":  # which is resampled
            assert torch.equal(found[name], value.half().float()), name


def test_the_file_says_what_the_model_is_and_can_be_inverted(run, tmp_path):
    figures = run("out", "--epochs=3", "--lr=1e-3")
    assert figures["probe_accuracy"] == 1  # the classes are colours
    model = load_model(NAME, checkpoint=tmp_path / "out" / "model.safetensors")
    assert model.pretrained_cfg["label_names"] == CLASSES
    assert model.pretrained_cfg["mean"] == pytest.approx(timm.get_pretrained_cfg(NAME).mean)
    images, labels = zip(*load_data(tmp_path, split="test", model=model), strict=True)
    with torch.no_grad():
        right = (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean().item()
    assert figures["test_accuracy"] == pytest.approx(right)
    assert right == 1
    result = Inverter(model, iterations=2, stopping={1: 0.5}, progress=False).run([0, 2], seed=0)
    assert result.images.shape == (2, 3, 32, 32)


def test_frozen_blocks_keep_the_weights_of_the_checkpoint(recipe, run, tmp_path):
    run("out", "--freeze=1")
    before = recipe.read_weights(tmp_path / "backbone.safetensors")
    before["pos_embed"] = recipe.checkpoint_filter_fn(before, timm.create_model(NAME, img_size=32))["pos_embed"]
    after = load_state(tmp_path / "out" / "checkpoint.state")["model"]
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if name.startswith(("blocks.", "norm.")) and "blocks.0." not in name}


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path):
    save_file({"stem.weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="does not fit the model"):
        run("out", f"--checkpoint={tmp_path / 'other.safetensors'}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model=test_vitt", r"test_vitt cannot learn images of 32x32 pixels of .*: Unknown model \(test_vitt\)"),
        ("--model=resnet18", "resnet18 cannot learn images .* unexpected keyword argument"),
        ("--image-size=50", "images of 50x50 pixels are not divided by patches of 16x16"),
        ("--checkpoint=/nowhere.safetensors", "the checkpoint /nowhere.safetensors does not exist"),
        ("--data=/nowhere", "/nowhere/train"),
    ],
)
def test_what_does_not_fit_ends_with_one_line(run, option, message):
    with pytest.raises(SystemExit, match=message):
        run("out", option)
