"""The study of data-free distillation on CIFAR-10, on random images and weights."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast import load_data
from smi_fast.models import CIFAR10_CLASSES, cifar10_resnet20
from smi_fast.models.loading import load_model

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
ARMS = ("noise", "deep_inversion", "adaptive", "adaptive_exact", "real")


def test_arms_have_equal_budgets_and_a_stopped_run_goes_on(seed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    study, teacher = importlib.import_module("distill_cifar10"), cifar10_resnet20(False)
    monkeypatch.setattr(study, "load_model", lambda name: teacher)
    data, pixels = tmp_path / "data", np.random.default_rng(seed).integers(0, 256, (2, 20, 32, 32, 3), dtype=np.uint8)
    for split, images in zip(("train", "test"), pixels, strict=True):
        for number, image in enumerate(images):
            folder = data / split / CIFAR10_CLASSES[number % 10]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    options = ["--rounds=2", "--samples=6", "--iterations=2", "--steps=2", "--batch-size=4", f"--arms={','.join(ARMS)}"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["study", "--data", str(data), "--out", str(tmp_path), *options, *more])
        study.main()
        return json.loads((tmp_path / "distillation.json").read_text())["arms"]

    def figures(arms):
        return {
            arm: [{name: value for name, value in r.items() if not name.endswith("seconds")} for r in found["rounds"]]
            for arm, found in arms.items()
        }

    whole = figures(run())
    assert {arm: (r[-1]["samples"], r[-1]["steps"]) for arm, r in whole.items()} == dict.fromkeys(ARMS, (12, 4))
    assert {arm: r[-1]["iterations"] for arm, r in whole.items() if r[-1]["iterations"]} == dict.fromkeys(ARMS[1:4], 4)
    losses = [tuple(r["loss"] for r in rounds) for rounds in whole.values()]
    assert len(set(losses)) == len(ARMS)
    for name in ("adaptive.json", "distillation.json", "table.md", "accuracy.png"):
        (tmp_path / name).unlink()
    noise = (tmp_path / "noise.safetensors").stat().st_mtime_ns
    assert figures(run()) == whole
    assert (tmp_path / "noise.safetensors").stat().st_mtime_ns == noise
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(ARMS)

    student = load_model("cifar10_resnet8", checkpoint=tmp_path / "adaptive.safetensors")
    images, labels = zip(*load_data(data, split="test", model=teacher), strict=True)
    with torch.no_grad():
        right = (student(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean().item()
    assert whole["adaptive"][-1]["accuracy"] == pytest.approx(right)
    with pytest.raises(SystemExit, match="other settings"):
        run("--lr=0.3")
