"""Table 1: what dense inversion costs, for a CNN and for a ViT."""

from __future__ import annotations

import statistics

import timm

from smi_fast.backbones.vit import AcceleratedViT
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.meter import iteration_flops
from smi_fast.inversion.objectives import deep_inversion, deep_inversion_cnn
from smi_fast.studies.experiment import Experiment
from smi_fast.studies.page import Section
from smi_fast.studies.paper import TABLE1
from smi_fast.studies.speed import iteration_seconds

PAPER_NAMES = {"resnet18": "ResNet-18", "deit_base_patch16_224": "DeiT-B/16"}
WARM_UP = 2  # iterations that are not timed
PAPER_BATCH = 128  # of the ViT's GFLOP; the CNN's are those of one image


def table1(run: Experiment) -> Section:
    s, rows = run.settings, []
    for name, size in s.cost_models:
        speed, gflop = run.once(f"cost-{name}-{size}", lambda name=name, size=size: dense_cost(run, name, size))
        paper = TABLE1.get((size, PAPER_NAMES.get(name)), ("", ""))
        rows.append([f"{size} x {size}", name, speed, gflop, *paper])
    cnn, vit = rows[-2][2], rows[-1][2]
    return Section(
        "Table 1: what dense inversion costs",
        f"Random weights, {s.cost_batch} images at once, the median of {s.speed_iterations} iterations, in "
        f"{s.dtype or 'the default dtype'}. CNNs are inverted through the statistics of their BatchNorm layers. GFLOP "
        "are those of an iteration by the paper's count (three times the multiply-adds of linear and convolution "
        f"layers), of one image for a CNN and of {PAPER_BATCH} images for a ViT, as the paper's seem to be.",
        {
            "resolution": "", "model": "", "iterations/s": ".2f", "GFLOP": ".2f", "paper: iterations/s": ".2f",
            "paper: GFLOP": ".2f",
        },
        rows,
        [f"{rows[-1][1]} takes {cnn / vit:.1f} times as long as {rows[-2][1]} here, and 5.7 times in the paper."],
    )  # fmt: skip


def dense_cost(run: Experiment, name: str, size: int) -> list[float]:
    """Return the iterations per second of a dense inversion, and its GFLOP as the paper counts them."""
    model = timm.create_model(name).eval().to(run.device)
    is_vit = hasattr(model, "patch_embed")
    inverter = Inverter(
        model, iterations=run.settings.speed_iterations + WARM_UP, stopping="dense", image_size=(size, size),
        dtype=run.dtype, objective=deep_inversion() if is_vit else deep_inversion_cnn(), progress=False,
    )  # fmt: skip
    seconds = statistics.median(iteration_seconds(inverter, run.settings.cost_batch, run.job.signals.check)[WARM_UP:])
    of = PAPER_BATCH if isinstance(inverter.backbone, AcceleratedViT) else 1
    return [1 / seconds, iteration_flops(inverter, inverter.stages[0], of, "paper") / 1e9]
