"""Presets are the published settings, and an inverter takes every one of them."""

import json
from dataclasses import fields, replace

import pytest

from smi_fast.inversion.presets import DEMO, PAPER, InversionSettings, settings_of
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.models import cifar10_vit


def test_the_paper_has_the_published_settings():
    assert (PAPER.iterations, PAPER.lr, PAPER.betas) == (4000, 0.25, (0.5, 0.99))
    assert (PAPER.tv_l2, PAPER.l2, PAPER.norm, PAPER.jitter, PAPER.flip) == (1e-4, 0.0, "batch", 1 / 8, 0.5)
    assert PAPER.schedule == StoppingSchedule({50: 0.3, 100: 0.3, 200: 0.3, 300: 0.3})
    assert settings_of("deit_base_patch16_224") == PAPER


def test_the_demo_is_for_the_model_inside_with_a_shorter_schedule():
    assert settings_of("cifar10_vit") == DEMO
    assert DEMO.schedule == StoppingSchedule({8: 0.3, 15: 0.3, 30: 0.3, 45: 0.3})
    assert replace(DEMO, iterations=4000).schedule == PAPER.schedule


def test_an_inverter_has_every_setting():
    settings = InversionSettings(7, 0.5, (0.1, 0.2), 0.25, 0.75, "image", 0.0, 1.0, {3: 0.4}, True)
    assert not any(getattr(settings, field.name) == field.default for field in fields(settings))
    inverter = settings.inverter(cifar10_vit(pretrained=False, depth=1), progress=False)
    for name in ("iterations", "lr", "betas", "jitter", "flip", "published"):
        assert getattr(inverter, name) == getattr(settings, name), name
    assert inverter.stopping == StoppingSchedule({3: 0.4})
    assert (inverter.prior.tv_l2, inverter.prior.l2, inverter.prior.norm) == (0.25, 0.75, "image")
    assert not inverter.progress


@pytest.mark.parametrize("stopping", ["paper", "dense", StoppingSchedule({3: 0.4})])
def test_a_record_is_json_that_names_every_setting(stopping):
    settings = replace(DEMO, stopping=stopping)
    record = json.loads(json.dumps(settings.record()))
    assert record == settings.record()
    assert record.keys() == {field.name for field in fields(settings)}
    assert record["stopping"] == str(settings.schedule)
