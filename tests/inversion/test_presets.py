"""Presets are the published settings, and an inverter takes every one of them."""

import json
from dataclasses import MISSING, fields, replace

import pytest
import torch

from smi_fast.inversion.objectives import deep_inversion
from smi_fast.inversion.presets import (
    CIFAR10_CNN,
    CNN_DEMO,
    DEMO,
    IMAGENET_CNN,
    PAPER,
    PSAQ,
    InversionSettings,
    psaq_views,
    settings_of,
)
from smi_fast.inversion.schedule import StoppingSchedule, WarmupCosine
from smi_fast.inversion.until import Until
from smi_fast.models import cifar10_resnet20, cifar10_vit


@pytest.fixture
def vit():
    return cifar10_vit(pretrained=False, depth=1)


def test_the_paper_has_the_published_settings(vit):
    objective = PAPER.objective
    assert (PAPER.iterations, PAPER.lr, PAPER.betas) == (4000, 0.25, (0.5, 0.99))
    assert (objective.tv_l2, objective.l2, objective.norm, PAPER.jitter, PAPER.flip) == (1e-4, 0.0, "batch", 1 / 8, 0.5)
    assert PAPER.schedule == StoppingSchedule({50: 0.3, 100: 0.3, 200: 0.3, 300: 0.3})
    assert settings_of("deit_base_patch16_224", vit) == PAPER


def test_the_demo_is_for_the_model_inside_with_a_shorter_schedule(vit):
    assert settings_of("cifar10_vit", vit) == DEMO
    assert DEMO.schedule == StoppingSchedule({8: 0.3, 15: 0.3, 30: 0.3, 45: 0.3})
    assert replace(DEMO, iterations=4000).schedule == PAPER.schedule


def test_cnns_have_the_published_settings_of_their_images():
    """The published command for ImageNet, and the paper's settings for CIFAR-10 (App. A of Yin et al., CVPR 2020)."""
    imagenet, cifar = IMAGENET_CNN.objective, CIFAR10_CNN.objective
    assert (imagenet.batch_norm, imagenet.first_batch_norm, imagenet.tv_l2, imagenet.l2) == (0.01, 10, 1e-4, 1e-5)
    assert (IMAGENET_CNN.lr, IMAGENET_CNN.betas, IMAGENET_CNN.jitter, IMAGENET_CNN.flip) == (0.25, (0.5, 0.9), 30, 0.5)
    assert (IMAGENET_CNN.iterations, IMAGENET_CNN.pooling, IMAGENET_CNN.clamp) == (3000, {0: 2, 2000: 1}, True)
    assert (cifar.batch_norm, cifar.first_batch_norm, cifar.tv_l2, cifar.l2) == (10, 1, 2.5e-5, 0)
    assert (CIFAR10_CNN.lr, CIFAR10_CNN.betas, CIFAR10_CNN.jitter, CIFAR10_CNN.flip) == (0.05, (0.9, 0.999), 2, 0)
    assert (CIFAR10_CNN.iterations, CIFAR10_CNN.lr_schedule, CIFAR10_CNN.clamp) == (2000, None, False)
    model = cifar10_resnet20(pretrained=False)
    assert settings_of("another", model) == CIFAR10_CNN
    assert settings_of("cifar10_resnet20", model) == CNN_DEMO


def test_psaq_has_the_published_settings_and_views(seed, vit):
    assert (PSAQ.iterations, PSAQ.lr, PSAQ.betas, PSAQ.lr_schedule) == (1000, 0.2, (0.5, 0.9), WarmupCosine(100, 500))
    assert settings_of("deit_tiny_patch16_224", vit, "psaq") == PSAQ
    views = psaq_views(1000, torch.Generator().manual_seed(seed))
    assert torch.equal(views[:, 0], views[:, 1])
    assert (views[:500, 0].min(), views[:500, 0].max()) == (-15, 15)
    assert (views[500:, 0].min(), views[500:, 0].max()) == (-30, 30)
    assert views[:, 2].unique().tolist() == [0, 1]


def test_schedules_are_scaled_with_the_iterations():
    assert IMAGENET_CNN.replaced({"iterations": 30}).pooling == {0: 2, 20: 1}
    assert IMAGENET_CNN.replaced({"iterations": 30, "pooling": {}}).pooling == {}
    assert IMAGENET_CNN.replaced({"iterations": 30}).lr_schedule == WarmupCosine(1)
    assert PSAQ.replaced({"iterations": 200}).lr_schedule == WarmupCosine(20, 100)
    assert PSAQ.replaced({"iterations": 200, "lr_schedule": None}).lr_schedule is None
    assert IMAGENET_CNN.replaced({"tv_l2": 0.5}).objective == replace(IMAGENET_CNN.objective, tv_l2=0.5)
    with pytest.raises(ValueError, match="deep_inversion_cnn has no setting points"):
        IMAGENET_CNN.replaced({"points": 3})


def test_an_inverter_has_every_setting(vit):
    settings = InversionSettings(
        deep_inversion(0.25, 0.75, "image"), 7, 0.5, (0.1, 0.2), WarmupCosine(2), 3, 0.0, psaq_views, {2: 1}, False,
        {3: 0.4}, Until(0.5, 1, 2), True,
    )  # fmt: skip
    for field in fields(settings):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        assert getattr(settings, field.name) != default, field.name
    inverter = settings.inverter(vit, progress=False)
    for field in fields(settings):
        if field.name not in ("stopping", "pooling"):
            assert getattr(inverter, field.name) == getattr(settings, field.name), field.name
    assert inverter.stopping == StoppingSchedule({3: 0.4})
    assert IMAGENET_CNN.inverter(cifar10_resnet20(False)).pooling == IMAGENET_CNN.pooling
    assert (inverter.prior.tv_l2, inverter.prior.l2, inverter.prior.norm) == (0.25, 0.75, "image")
    assert not inverter.progress


@pytest.mark.parametrize("settings", [DEMO, PAPER, IMAGENET_CNN, CIFAR10_CNN, CNN_DEMO, PSAQ])
@pytest.mark.parametrize("stopping", ["paper", "dense", StoppingSchedule({3: 0.4})])
def test_a_record_is_json_that_names_every_setting(stopping, settings):
    settings = replace(settings, stopping=stopping, until=Until(0.5))
    record = json.loads(json.dumps(settings.record()))
    assert record == settings.record()
    assert record.keys() == {field.name for field in fields(settings)}
    assert record["stopping"] == str(settings.schedule)
    assert record["objective"]["name"] == type(settings.objective).__name__
