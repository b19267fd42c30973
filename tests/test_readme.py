"""What the README shows runs, word for word and in its order, and what it names is there."""

import pickle
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from backbones.test_coverage import NAMES, UNSUPPORTED

import smi_fast
from smi_fast.cli import main
from smi_fast.inversion.presets import DEMO
from smi_fast.models import CIFAR10_CLASSES
from smi_fast.studies.reproduce import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
WRITES_TO = {"data", "results"}

# These changes make the README run in seconds and without a network. Everything else runs as it is written.
FEWER_ITERATIONS = ("iterations = 4000", "iterations = 4")
SHORTER = {  # options that are appended to a command
    "info": "",
    "evaluate": "--quiet --device cpu",
    "invert": "--quiet --device cpu --iterations 4",
    "quantize": "--quiet --device cpu",
    "distill": "--quiet --device cpu --rounds 1 --samples 4 --steps 1 --iterations 5",
    "reproduce": "--quiet --device cpu --sections table3",
}
SMALL = replace(PRESETS["demo"], inversion=replace(DEMO, iterations=5), images=4, seeds=1, test_images=10)
NOT_RUN = ("make", "cmake")  # test_package.py tests make, test_cmake.py tests cmake


@pytest.fixture
def offline(monkeypatch):
    """Replace downloads: timm's models get random weights, and CIFAR-10 random images in its own form on the disk."""
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **other: create_model(name, **other))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", write_cifar10)
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(torchvision.datasets.CIFAR10, attribute)]
        monkeypatch.setattr(torchvision.datasets.CIFAR10, attribute, [(name, None) for name in names])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", torchvision.datasets.CIFAR10.meta | {"md5": None})
    monkeypatch.setitem(PRESETS, "demo", SMALL)


def write_cifar10(url: str, root: str, **other) -> None:
    """Write two random images of each class into each of the archive's files."""
    folder, labels = Path(root) / torchvision.datasets.CIFAR10.base_folder, 2 * list(range(10))
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        pixels = torch.randint(256, (len(labels), 3 * 32 * 32), dtype=torch.uint8).numpy()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))


def commands(text: str, stubs: Path) -> list[list[str]]:
    """The words of each command in a block, as a shell reads them."""
    stubs.mkdir(exist_ok=True)
    for name in ("smi-fast", *NOT_RUN):  # any other command in the README is an error
        (stubs / name).write_text('#!/bin/sh\nprintf "%s\\t" "${0##*/}" "$@"\necho\n')
        (stubs / name).chmod(0o755)
    run = subprocess.run(["/bin/sh", "-ec", text], env={"PATH": str(stubs)}, capture_output=True, text=True, check=True)
    return [line.split("\t")[:-1] for line in run.stdout.splitlines()]


def run_readme(stubs: Path) -> dict:
    """Run all blocks in the current folder, as one session of Python and one of a shell. Returns Python's names."""
    names = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(text.replace(*FEWER_ITERATIONS), names)
            continue
        for command, *arguments in commands(text, stubs):
            if command == "smi-fast":
                assert main([*arguments, *SHORTER[arguments[0]].split()]) == 0, arguments
    return names


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def copy_of_the_checkout(folder: Path) -> None:
    for name in ("README.md", "pyproject.toml", "docs", "examples", "kernels", "smi_fast"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)


@pytest.mark.parametrize("place", ["clean folder", "checkout"])
def test_all_blocks_run_in_order_and_again(place, offline, tmp_path, monkeypatch, seed):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if place == "checkout":
        copy_of_the_checkout(Path.cwd())
    before = files(Path.cwd())
    assert FEWER_ITERATIONS[0] in README
    for _ in range(2 if place == "clean folder" else 1):
        names = run_readme(tmp_path / "stubs")
        assert names["logits"].shape == (2, 1000)
        assert names["result"].images.shape == (2, 3, 224, 224)
        assert names["result"].keep.shape == names["keep"].shape == (2, 66)  # three of the four stoppings
        assert torch.isfinite(names["result"].losses).all()
        assert len(names["dataset"]) == 2
        assert names["scores"].shape == (4, 10)
        assert names["kept"].cu_seqlens.tolist() == [0, 47, 71, 118]
        assert (names["kept"].values[0] == names["tokens"][0]).all()
        assert names["last"].shape == (3, 3, 64)
        assert len(smi_fast.InvertedDataset.load("results/demo")) == 20
    assert {path.parts[0] for path in files(Path.cwd()) - before} == WRITES_TO
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(f"/{folder}/" in ignored for folder in WRITES_TO)


def test_make_has_the_targets_that_it_names():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_the_supported_models_are_those_of_the_coverage_test():
    assert f"all {len(NAMES)} names" in README
    assert all(name in README for name in UNSUPPORTED)


def test_linked_files_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) >= 4
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
