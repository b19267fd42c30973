"""A page of the documentation as a session: its Python and its commands run word for word and in their order.

Only what is named here is changed, so that a page runs in seconds and without a network.
"""

import pickle
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torchvision

from smi_fast.cli import main
from smi_fast.inversion.presets import DEMO
from smi_fast.models import CIFAR10_CLASSES
from smi_fast.studies.reproduce import PRESETS

ROOT = Path(__file__).parent.parent
FEWER_ITERATIONS = {"iterations = 4000": "iterations = 4", "iterations=600": "iterations=6"}
SHORTER = {  # options that are appended to a command
    "info": "",
    "evaluate": "--quiet --device cpu",
    "invert": "--quiet --device cpu --iterations 4",
    "quantize": "--quiet --device cpu",
    "distill": "--quiet --device cpu --rounds 1 --samples 4 --steps 1 --iterations 5",
    "reproduce": "--quiet --device cpu --sections table3",
}
SMALL = replace(PRESETS["demo"], inversion=replace(DEMO, iterations=5), images=4, seeds=1, test_images=10)
NOT_RUN = ("make", "pip")  # test_package.py tests make, and the wheel that pip builds


def work_offline(monkeypatch) -> None:
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


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of each code block of a page that is in one of the languages."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(language, block) for language, block in found if language in languages]


def commands(text: str, stubs: Path) -> list[list[str]]:
    """The words of each command in a block, as a shell reads them."""
    stubs.mkdir(exist_ok=True)
    for name in ("smi-fast", *NOT_RUN):  # any other command is an error
        (stubs / name).write_text('#!/bin/sh\nprintf "%s\\t" "${0##*/}" "$@"\necho\n')
        (stubs / name).chmod(0o755)
    run = subprocess.run(["/bin/sh", "-ec", text], env={"PATH": str(stubs)}, capture_output=True, text=True, check=True)
    return [line.split("\t")[:-1] for line in run.stdout.splitlines()]


def run_python(page: str, names: dict | None = None) -> dict:
    """Run the Python blocks of a page as one session, and return its names."""
    names = {} if names is None else names
    for _, text in blocks(page, "python"):
        for written, fewer in FEWER_ITERATIONS.items():
            text = text.replace(written, fewer)
        exec(text, names)
    return names


def run_commands(page: str, stubs: Path) -> None:
    """Run the commands of a page in the current folder."""
    for _, text in blocks(page, "sh"):
        for command, *arguments in commands(text, stubs):
            if command == "smi-fast":
                assert main([*arguments, *SHORTER[arguments[0]].split()]) == 0, arguments
