"""Two small ViTs, a small labelled data set, and comparisons small enough to run in seconds."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from smi_fast.inversion.objectives import deep_inversion
from smi_fast.inversion.presets import InversionSettings
from smi_fast.studies.experiment import Experiment, Settings

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def make_vit(name: str, **other) -> VisionTransformer:
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3) | other
    model = VisionTransformer(**size).eval()
    model.pretrained_cfg = {
        "architecture": name, "input_size": (3, 16, 16), "mean": MEAN, "std": STD, "interpolation": "bicubic",
        "crop_pct": 1.0, "num_classes": 3,
    }  # fmt: skip
    return model


@pytest.fixture(scope="session")
def vit():
    """A function that makes a ViT of 4x4 patches and 3 classes with random weights."""
    return make_vit


@pytest.fixture(scope="session")
def tiny():
    return Settings(
        InversionSettings(deep_inversion(tv_l2=1e-3), iterations=10, lr=0.1),
        images=4,
        seeds=2,
        test_images=None,
        dtype=None,
        rounds=2,
        more_rounds=3,
        samples=4,
        steps=3,
        batch_size=4,
        student_lr=0.1,
        real_images=6,
        rebirth=2,
        competition=0.2,
        adaptive_seeds=1,
        quantised_images=7,
        ablation_seeds=2,
        ablation_steps=2,
        fractions=(0.5,),
        region_images=3,
        removal_images=8,
        cost_models=(("resnet10t", 32), ("vit_tiny_patch16_224", 224)),
        cost_batch=1,
        speed_models=(),
        speed_batches=(2,),
        speed_iterations=2,
        feature_images=9,
        cue_images=8,
        cue_blocks=1,
    )


@pytest.fixture(scope="session")
def models():
    """A teacher and a student."""
    torch.manual_seed(int(np.random.SeedSequence().entropy % 2**31))
    return make_vit("teacher"), make_vit("student")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with four random images of each of three classes in a training and a test split."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng()
    for split, label, number in ((s, c, n) for s in ("train", "test") for c in "abc" for n in range(4)):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture
def run(models, data, tiny, tmp_path):
    """An experiment that has begun in the folder `out`."""
    experiment = Experiment(*models, data, None, tmp_path / "out", tiny, progress=False)
    with experiment.begin():
        yield experiment
