"""The recipe of the student inside the package, on random images."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast.data.states import load_state
from smi_fast.models import CIFAR10_CLASSES

ROOT = Path(__file__).parents[2]


def test_the_recipe_resumes_bit_for_bit_and_ignores_labels(seed, tmp_path, monkeypatch):
    """Three runs on random images: one as it is, one that goes on after an interruption, one with classes permuted."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    recipe = importlib.import_module("pretrain_student")
    images = np.random.default_rng(seed).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    for number, name in enumerate(name for name in CIFAR10_CLASSES for _ in range(7)):
        for split in ("train", "test") if number % 7 == 0 else ("train",):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(tmp_path / split / name / f"{number}.png")
    options = ["--words=8", "--components=4", "--epochs=2", "--batch-size=35", "--device=cpu"]

    def run(name):
        monkeypatch.setattr(sys, "argv", ["recipe", "--data", str(tmp_path), "--out", str(tmp_path / name), *options])
        recipe.main()

    def weights(name):
        return load_state(tmp_path / name / "checkpoint.state")["model"]

    run("whole")
    crop_flip, calls = recipe.crop_flip, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return crop_flip(*args)

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "crop_flip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert any(not torch.equal(value, weights("whole")[name]) for name, value in weights("stopped").items())
    run("stopped")
    read_split = recipe.read_split
    monkeypatch.setattr(recipe, "read_split", lambda folder: (read_split(folder)[0], read_split(folder)[1].flip(0)))
    run("other labels")
    for name, value in weights("whole").items():
        assert torch.equal(value, weights("stopped")[name])
        assert torch.equal(value, weights("other labels")[name])
