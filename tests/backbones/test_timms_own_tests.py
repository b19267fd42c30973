"""timm's own tests of its models, those of the version that is installed, pass with accelerated models."""

import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from package_index import fetch_source

import smi_fast

ROOT = Path(smi_fast.__file__).parents[1]
# The smallest of each kind: class token, distillation, registers, LayerScale, average and attention pooling, pre-norm,
# parallel and differential blocks.
NAMES = """
    deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 test_vit test_vit2 test_vit3 test_vit4
    vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_little_patch16_reg1_gap_256
    vit_pwee_patch16_reg1_gap_256 vit_small_patch16_224 vit_small_patch32_224 vit_tiny_patch16_224
    vit_wee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224
"""
FILES = ("test_models", "test_utils", "test_task", "test_model_input", "test_checkpoint_loading")
DEPTH = os.environ.get("SMI_FAST_TIMM_DEPTH", "3")  # an empty one stands for the whole models, which take minutes
RUN_OURS = {  # timm's tests that call our forward pass; the other ones trace, script or only build
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_fx",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
}


@pytest.fixture(scope="module")
def records(request, tmp_path_factory) -> list[dict]:
    """What came of each of timm's tests that made an accelerated model, as `accelerated_timm` records it."""
    folder = tmp_path_factory.mktemp("timm")
    with tarfile.open(fetch_source("timm", version("timm"), request.config.cache.mkdir("sources"))) as archive:
        [top] = {name.split("/")[0] for name in archive.getnames()}
        tests = [member for member in archive.getmembers() if member.name.startswith(f"{top}/tests/")]
        archive.extractall(folder, members=tests, filter="data")  # without the sources, which would be imported
    files = [folder / top / "tests" / f"{name}.py" for name in FILES]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "GITHUB_ACTIONS"},  # there timm tests less
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "NAMES": NAMES,
        "RECORD": str(folder / "record"),
        "HF_HUB_OFFLINE": "1",
        **({"DEPTH": DEPTH} if DEPTH else {}),
    }
    command = [sys.executable, "-m", "pytest", "-p", "accelerated_timm", "-p", "no:cacheprovider", "-q", "-W", "ignore"]
    command += ["-k", "not pretrained and not test_model_inference"]  # these download weights
    command += [str(file) for file in files if file.exists()]
    run = subprocess.run(command, cwd=folder / top, env=environment, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: a test failed, which is recorded
    tests = [json.loads(line) for line in (folder / "record").read_text().splitlines()]
    return [test for test in tests if test["models"]]


def is_bit_for_bit(test: dict) -> bool:
    """Whether the test compares the bits of a graph, which is timm's, with our forward, as timm did until 1.0.30."""
    old = tuple(map(int, version("timm").split("."))) <= (1, 0, 30)
    return old and "::test_model_forward_fx[" in test["test"] and " = torch.all\n" in test["error"]


def test_timms_own_tests_pass_or_are_refused_by_a_sentence(records):
    passed = [test for test in records if test["outcome"] == "passed"]
    failed = [test for test in records if test["outcome"] == "failed" and not is_bit_for_bit(test)]
    print(f"{len(passed)} passed, {len(failed)} refused")
    refusal = f"{smi_fast.UnsupportedModelError.__module__}.{smi_fast.UnsupportedModelError.__qualname__}: "
    assert [test for test in failed if not test["error"].startswith(refusal)] == []
    assert len(passed) >= 120
    assert len(failed) <= 0.1 * len(records)


def test_our_forward_pass_ran_in_timms_tests(records):
    ran = {(test["test"].split("::")[1].split("[")[0], test["attentions"] > 0) for test in records}
    assert {(name, True) for name in RUN_OURS} <= ran
    assert not {(name, False) for name in RUN_OURS} & ran
