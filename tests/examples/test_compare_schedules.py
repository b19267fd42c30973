"""The comparison of schedules, on random images and few iterations."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from smi_fast.models import CIFAR10_CLASSES

ROOT = Path(__file__).parents[2]


def test_every_arm_makes_as_many_images_and_a_stopped_run_goes_on(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    study = importlib.import_module("compare_schedules")
    arms = {arm: replace(settings, iterations=14) for arm, settings in study.ARMS.items()}
    monkeypatch.setattr(study, "ARMS", arms)
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    for name, image in zip(CIFAR10_CLASSES, pixels, strict=True):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "data" / "test" / name / "0.png")
    options = ["--images=14", "--batch-size=7", "--steps=2", "--student-seeds=2", "--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["study", *options, "--out", str(tmp_path)])
    study.main()
    found = {arm: json.loads((tmp_path / f"{arm}.json").read_text()) for arm in arms}
    assert {r["images"] for arm, r in found.items() if arm != "rebirth=4"} == {14}
    assert found["rebirth=4"]["images"] == 16  # of four targets
    assert {arm: r["patches"] for arm, r in found.items() if "rebirth" in arm} == {
        "rebirth=2": 32, "rebirth=4": 16, "rebirth=7": 64 / 7,
    }  # fmt: skip
    assert all(len(r["student_accuracy"]) == 2 for r in found.values())
    first = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    study.main()
    assert (tmp_path / "table.md").read_text() == first
    assert first.count("\n") == 2 + len(arms)
