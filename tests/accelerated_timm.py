"""A pytest plugin for timm's own tests: `timm.create_model` accelerates what it makes, and every test leaves a record.

It reads from the environment NAMES (the models that tests with a `model_name` run with), DEPTH (how many blocks these
have; their own number if it is not set) and RECORD (the file that it writes: for each test one JSON object with its
name, its outcome, the error, and how many models of ours were made and how many of their attentions ran).
"""

import json
import os
from functools import wraps

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

import smi_fast
from smi_fast import kernels
from smi_fast.backbones.support import MODELS

NAMES = os.environ["NAMES"].split()
ALL_NAMES = set(timm.list_models())
DEPTH = {"depth": int(os.environ["DEPTH"])} if "DEPTH" in os.environ else {}
ran = {"models": 0, "attentions": 0}
torch.set_num_threads(1)


def counting(function, what):
    @wraps(function)
    def counted(*args, **kwargs):
        ran[what] += 1
        return function(*args, **kwargs)

    return counted


def accelerated(create_model):
    def accelerate(model):
        return counting(smi_fast.accelerate, "models")(model) if type(model) in MODELS else model

    @wraps(create_model)
    def create(model_name, *args, **kwargs):
        model = create_model(model_name, *args, **((DEPTH if model_name in NAMES else {}) | kwargs))
        if isinstance(model, FeatureGetterNet):
            model.model = accelerate(model.model)
        return accelerate(model)

    return create


def named(list_models):
    """List each of NAMES once, with one of its tags where tags are asked for."""

    @wraps(list_models)
    def listed(*args, **kwargs):
        return list(
            {name.split(".")[0]: name for name in list_models(*args, **kwargs) if name.split(".")[0] in NAMES}.values()
        )

    return listed


timm.create_model = accelerated(timm.create_model)
timm.list_models = named(timm.list_models)
kernels.attention = counting(kernels.attention, "attentions")
kernels.class_attention = counting(kernels.class_attention, "attentions")


def is_chosen(item):
    """Choose tests of NAMES and, in other files than that of all models, tests without a model in their parameters."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {value.split(".")[0] for value in values if isinstance(value, str)} & ALL_NAMES
    return names <= set(NAMES) and (names or item.path.name != "test_models.py")


def pytest_collection_modifyitems(items):
    items[:] = filter(is_chosen, items)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    result = yield
    report = result.get_result()
    if report.when != "call" and not report.failed:
        return
    error = call.excinfo and f"{call.excinfo.type.__module__}.{call.excinfo.type.__name__}: {call.excinfo.value}"
    record = {"test": item.nodeid, "outcome": report.outcome, "error": error, "seconds": report.duration, **ran}
    with open(os.environ["RECORD"], "a") as file:
        print(json.dumps(record), file=file)
    ran.update(dict.fromkeys(ran, 0))
