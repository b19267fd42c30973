"""Does the compute dtype hurt an inversion? Final loss and confidence by dtype and seed, on the model inside.

python bench/compute_dtype.py [--seeds 3] [--images 20] [--json FILE]

The confidence is that of the float32 model in both cases. A dtype passes where its means over the seeds lie within the
spread of float32 over the seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from report import as_text

from smi_fast import accelerate
from smi_fast.inversion.meter import confidences
from smi_fast.inversion.presets import DEMO
from smi_fast.models import MODEL_INSIDE
from smi_fast.models.loading import load_model

FINAL = 20  # iterations, of the last, over which the loss is averaged: views differ from one to the next


def outcome(model: torch.nn.Module, dtype: torch.dtype, seed: int, images: int) -> dict[str, float]:
    """The mean loss of the last iterations, and the mean confidence of the float32 model."""
    inverter = DEMO.inverter(model, dtype=dtype, progress=False)
    result = inverter.run(torch.arange(images) % model.num_classes, seed=seed)
    exact = accelerate(model, dtype=torch.float32)
    confidence, _ = confidences(exact, result.images, result.keep, result.targets, inverter.mean, inverter.std)
    return {"loss": result.losses[-FINAL:].mean().item(), "confidence": confidence.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(MODEL_INSIDE).to(device)
    results = {
        str(dtype).removeprefix("torch."): [
            outcome(model, dtype, seed, arguments.images) for seed in range(arguments.seeds)
        ]
        for dtype in (torch.float32, torch.bfloat16)
    }
    rows = [("", "mean", "least", "most", "within float32's spread")]
    for measure in ("loss", "confidence"):
        exact = [result[measure] for result in results["float32"]]
        for dtype, outcomes in results.items():
            values = [result[measure] for result in outcomes]
            within = "-" if dtype == "float32" else str(min(exact) <= mean(values) <= max(exact))
            numbers = (f"{value:.4f}" for value in (mean(values), min(values), max(values)))
            rows.append((f"{measure}, {dtype}", *numbers, within))
    print(as_text(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
