"""The wheel holds the package and nothing else, and `smi_fast.kernels` is found in a wheel and in a checkout."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from package_index import UNREACHABLE

import smi_fast

ROOT = Path(__file__).parents[1]
MB = 10**6
IMPORT_KERNELS = """
import importlib, pkgutil, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import smi_fast.kernels
for module in pkgutil.iter_modules(smi_fast.kernels.__path__, "smi_fast.kernels."):
    importlib.import_module(module.name)
for name in sorted(sys.modules):
    if name.startswith("smi_fast.kernels"):
        print(sys.modules[name].__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that a build meets no leftovers of an earlier one and leaves none."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("smi_fast", "kernels", "tests", "bench", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel's path. Built with the setuptools that is installed where it can, else with one that pip fetches."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    for isolation in (["--no-build-isolation"], []):
        build = subprocess.run([*command, *isolation, str(source)], capture_output=True, text=True)
        if build.returncode == 0:
            [path] = folder.glob("*.whl")
            return path
    output = build.stdout + build.stderr
    if UNREACHABLE.search(output):
        pytest.skip("the package index, which has the setuptools to build with, is unreachable")
    pytest.fail(output)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def imported(unpacked):
    """The files of the kernels, and the module of the command line, that a process imports from the wheel."""
    code = f"{IMPORT_KERNELS}\nimport smi_fast.cli; assert callable(smi_fast.cli.main); print(smi_fast.cli.__file__)"
    return [Path(line) for line in run_python(code, unpacked.parent, PYTHONPATH=str(unpacked)).splitlines()]


def files(folder, pattern="*"):
    """The files below a folder, as POSIX paths relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file()}


def run_python(code, cwd, **env):
    env |= {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def dist_info(unpacked):
    [folder] = unpacked.glob("*.dist-info")
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(source, unpacked):
    modules = {f"smi_fast/{name}" for name in files(source / "smi_fast", "*.py")}
    kernels = {f"smi_fast/kernels/{name}" for name in files(source / "kernels", "*.py")}
    assert {"smi_fast/kernels/__init__.py"} <= kernels
    assert {"smi_fast/__init__.py", "smi_fast/models/__init__.py"} <= modules
    assert files(unpacked, "*.py") == modules | kernels
    assert (unpacked / "smi_fast" / "py.typed").is_file()
    assert {path.name for path in unpacked.iterdir()} == {"smi_fast", dist_info(unpacked).name}


def test_the_wheel_carries_the_licence_and_the_version(unpacked):
    [licence] = dist_info(unpacked).rglob("LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()
    metadata = (dist_info(unpacked) / "METADATA").read_text()
    assert f"\nVersion: {smi_fast.__version__}\n" in metadata
    assert "\nName: smi-fast\n" in metadata


def test_the_console_script_runs_the_main_of_cli(unpacked, imported):
    entry_points = configparser.ConfigParser()
    entry_points.read(dist_info(unpacked) / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"smi-fast": "smi_fast.cli:main"}
    assert imported[-1].is_relative_to(unpacked)


def test_the_wheel_is_small_and_holds_the_weights(wheel):
    assert wheel.stat().st_size <= 14 * MB
    with zipfile.ZipFile(wheel) as archive:
        for name in ("cifar10_vit", "cifar10_student"):
            assert 1 * MB < archive.getinfo(f"smi_fast/models/{name}.safetensors").file_size <= 6 * MB


def test_kernels_are_imported_from_an_unpacked_wheel(source, unpacked, imported):
    assert set(imported[:-1]) == {
        unpacked / "smi_fast" / "kernels" / name for name in files(source / "kernels", "*.py")
    }


def test_kernels_are_imported_from_the_root_of_a_checkout():
    imported = {Path(line).resolve() for line in run_python(IMPORT_KERNELS, ROOT).splitlines()}
    assert imported == {(ROOT / "kernels" / name).resolve() for name in files(ROOT / "kernels", "*.py")}


def test_all_places_that_name_the_version_or_pythons_agree():
    assert f"\nversion: {smi_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    project, workflow = (ROOT / "pyproject.toml").read_text(), (ROOT / ".github/workflows/ci.yml").read_text()
    [matrix] = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r"[\d.]+", matrix) == re.findall(r"Python :: (3\.\d+)", project)
    [ruff] = re.findall(r"^ruff==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text()


@pytest.mark.parametrize("target", ["demo", "gpu-check"])
def test_make_writes_to_a_folder_whose_name_has_spaces(target, tmp_path):
    make = shutil.which("make") or pytest.skip("no make")
    for name in ("smi-fast", "python"):  # in the place of the real ones, it prints its arguments
        (tmp_path / name).write_text('#!/bin/sh\nprintf "argument: %s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    command = [make, "--no-print-directory", target, f"BIN={tmp_path}", "OUT=out dir/it's", "ARGS=--seed 3"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    arguments = re.findall(r"^argument: (.*)$", output, flags=re.MULTILINE)
    assert arguments[arguments.index("--out") + 1] == "out dir/it's"
    assert arguments[-2:] == ["--seed", "3"]
