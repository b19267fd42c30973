"""The three applications from end to end, on a few random images."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast import Ensemble
from smi_fast.models import CIFAR10_CLASSES

FOLDER = Path(__file__).parents[2] / "examples" / "applications"
ROWS = {
    "federated": {
        "best client", "FedAvg", "ensemble", "FedAvg, then noise", "FedAvg, then dense inversion",
        "FedAvg, then sparse inversion", "all images in one place",
    },
    "continual": {
        "before the new classes", "none", "LwF", "real replay", "dense replay", "sparse replay", "all classes at once",
    },
    "unlearning": {
        "teacher", "teacher, masked", "retraining", "retraining on 4 images", "real transfer of 4 images", "noise",
        "dense inversion", "dense inversion, all logits", "sparse inversion", "sparse inversion, all logits",
    },
}  # fmt: skip
OPTIONS = {"federated": ["--clients=2", "--steps=2"], "continual": [], "unlearning": ["--steps=2", "--forget=dog"]}


@pytest.fixture
def application(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", ROWS)
def test_the_table_holds_all_baselines(name, application, seed, tmp_path, monkeypatch):
    random = np.random.default_rng(seed)
    for number, label in enumerate(2 * CIFAR10_CLASSES):
        for split in ("train", "test"):
            (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / label / f"{number}.png")
    small = ["--train-images=20", "--test-images=20", "--epochs=1", "--inverted=4", "--iterations=6"]
    monkeypatch.setattr(sys, "argv", [name, f"--data={tmp_path}", f"--out={tmp_path}", *small, *OPTIONS[name]])
    application(name).main()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(found["rows"]) == ROWS[name]
    assert all(len(row) == len(found["columns"]) for seeds in found["rows"].values() for row in seeds)
    assert (tmp_path / f"{name}.md").read_text().count("\n") == 2 + len(ROWS[name])
    if name == "unlearning":  # what is masked is never answered
        assert found["rows"]["teacher, masked"][0][1] == 0


def test_images_are_divided_among_clients_and_none_is_lost(application, seed):
    data = application("workbench").Data(torch.arange(200.0).view(200, 1), torch.arange(200) % 10)
    parts = application("federated").divide(data, 3, 0.5, seed)
    assert torch.equal(torch.cat([part.images for part in parts]).sort(0).values, data.images)
    shares = torch.stack([part.labels.bincount(minlength=10) for part in parts]) / 20
    assert shares.std(0).mean() > 0.1  # uneven


def test_fedavg_weighs_clients_by_their_images(application, seed):
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    mean = application("federated").averaged(models, [1, 3])
    torch.testing.assert_close(mean.weight, models[0].weight / 4 + models[1].weight * 3 / 4)


def test_a_model_that_answers_as_before_pays_nothing_for_its_memory(application, seed):
    """The loss of the old model itself is the cross-entropy of the new images and, with replay, of the replayed."""
    import argparse

    continual, models = application("continual"), importlib.import_module("smi_fast.models")
    old, args = models.cifar10_vit(), argparse.Namespace(temperature=2.0, memory=1.0)
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    keep = torch.rand(6, 64).argsort(1)[:, :8]
    fast = continual.in_bfloat16(old)
    plain = continual.cross_entropy(fast, images, keep, labels)
    torch.testing.assert_close(continual.remembering(old, args, 0)(fast, images, keep, labels), plain)
    once = (images[:1], keep[:1], labels[:1])  # of which every replayed batch consists
    replayed = continual.remembering(old, args, 0, once)(fast, images, keep, labels)
    again = continual.cross_entropy(fast, *once)
    torch.testing.assert_close(replayed, plain + again, rtol=0.02, atol=0.02)


def test_noise_is_what_an_ensemble_takes(application, seed):
    models = importlib.import_module("smi_fast.models")
    found = application("federated").noise(Ensemble([models.cifar10_vit()]), 4, seed).images()
    assert found.shape == (4, 3, 32, 32)
    assert 0 <= found.min() < 0.1
    assert 0.9 < found.max() <= 1
