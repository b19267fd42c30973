"""smi-fast info: versions, the device, and which kernels are in use."""

from __future__ import annotations

import argparse
import json

import torch

from smi_fast import kernels
from smi_fast.models import MODEL_DIR, MODEL_INSIDE
from smi_fast.runs.machine import device_name, versions

DESCRIPTION = (
    "Show the versions of smi-fast and of what it runs on, the device that the other commands take by default, and "
    "which kernels are in use there: Triton's on a GPU, those in C++ on a CPU, or plain torch, and why."
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    what = "show versions, the device, and why Triton is or is not in use"
    parser = commands.add_parser("info", help=what, description=DESCRIPTION)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accuracy = json.loads((MODEL_DIR / f"{MODEL_INSIDE}.json").read_text())["test_accuracy"]
    lines = versions() | {
        "device": device_name(device),
        "backend": kernels.resolve_backend("auto", device),
        "triton": kernels.triton_status(),
        "cpu": kernels.cpu_status(),
        "model": f"{MODEL_INSIDE} comes with smi-fast, with {accuracy:.2%} accuracy on the CIFAR-10 test split",
    }
    for name, value in lines.items():
        print(f"{name:<12}{value}")
    return 0
