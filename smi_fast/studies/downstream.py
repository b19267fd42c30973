"""Tables 3, 4 and 5: quantisation and transfer with inverted images, compared with real images and noise."""

from __future__ import annotations

import json
import statistics
from functools import partial

import torch

from smi_fast.models import MODEL_DIR
from smi_fast.studies.experiment import Experiment, split
from smi_fast.studies.images import inverted_pool, most_attended, noise, real_images, save_rows, whole_images
from smi_fast.studies.page import Section, spread
from smi_fast.studies.speed import PAPER_SPEEDUP

COLUMNS = {
    "calibration": "", "sparsity, %": ".1f", "iterations/s": ".1f", "GFLOP/iteration": ".1f", "memory, MiB": ".0f",
    "last stage, MiB": ".0f", "W8/A8, %": ".2f", "W4/A8, %": ".2f",
}  # fmt: skip
COSTS = ("iterations_per_second", "gflop", "memory", "last_memory")  # metadata, in the order of the columns


def table3(run: Experiment) -> Section:
    s, seeds = run.settings, range(run.settings.seeds)
    inverted = {v.name: [run.inverted(v, seed, s.images) for seed in seeds] for v in (run.dense, run.sparse)}
    rows = []
    for name, make in (("real images", real_images), ("Gaussian noise", noise)):
        sets = [make(run, s.images, seed) for seed in seeds]
        rows.append([name, *[""] * (1 + len(COSTS)), *run.quantised(name, sets, s.test_images)])
    for name, sets in inverted.items():
        costs = [[dataset.metadata[key] for dataset in sets] for key in COSTS]
        rows.append([f"{name} inversion", run.sparsity(sets[0]), *costs, *run.quantised(name, sets, s.test_images)])
    save_rows(run.out / "table3.png", {name: sets[0] for name, sets in inverted.items()})
    real, _, dense, sparse = ([statistics.mean(v) if isinstance(v, list) else v for v in row] for row in rows)
    memory = "the device's" if run.device.type == "cuda" else "the whole process's"
    return Section(
        "Table 3: quantisation by calibration source",
        f"Accuracy on {split(s.test_images)} after calibration on {s.images} images, over {s.seeds} seeds. Real images "
        "come from the training split, noise is standard normal, and sparse images are fed sparse. Iterations/s, FLOPs "
        f"(of matrix products, averaged over the iterations) and memory ({memory}, at its peak) are those of an "
        f"inversion of {s.images} images at once.",
        COLUMNS,
        rows,
        [
            f"The float model reaches {float_accuracy(run):.2f} %.",
            f"Sparse minus real: {sparse[-2] - real[-2]:+.2f} points at W8/A8, {sparse[-1] - real[-1]:+.2f} at W4/A8.",
            f"Sparse is {sparse[2] / dense[2]:.2f} times as fast as dense. {PAPER_SPEEDUP}",
        ],
        picture="table3.png",
    )


def table4(run: Experiment) -> Section:
    s, about, few = run.settings, run.about, run.final_count
    count = min(s.rounds * s.samples, s.real_images)
    how = {"rounds": s.rounds, "steps": s.steps, "batch_size": s.batch_size}
    pools = {
        "real images": lambda seed: real_images(run, count, seed),
        f"real images, {few} patches": lambda seed: most_attended(run, real_images(run, count, seed), few),
        "Gaussian noise": lambda seed: whole_images(run, noise(run, count, seed), torch.zeros(count).long()),
        "dense inversion": lambda seed: inverted_pool(run, run.dense),
        "sparse inversion": lambda seed: inverted_pool(run, run.sparse),
    }
    curves = {
        source: [run.transfer(source, partial(pool, seed), seed, samples=s.samples, **how) for seed in range(s.seeds)]
        for source, pool in pools.items()
    }
    ceiling = run.transfer("ceiling", lambda: real_images(run, s.real_images, 0), 0, **how)[-1]
    rows = [[source, [c[-1] for c in seeds], [max(c) for c in seeds]] for source, seeds in curves.items()]
    *_, dense, sparse = (statistics.mean(last) for _, last, _ in rows)
    card = MODEL_DIR / f"{about['student']}.json"
    probe = json.loads(card.read_text()).get("test_accuracy_of_a_linear_probe") if card.is_file() else None
    labels = f"A linear probe trained on labels reaches {100 * (probe or 0):.2f} %, according to its model card."
    x = [s.samples * (number + 1) for number in range(s.rounds)]
    lines = {name: [x, *spread([list(v) for v in zip(*seeds, strict=True)])] for name, seeds in curves.items()}
    return Section(
        "Table 4: transfer from dense and from sparse images",
        f"Accuracy on {split(s.test_images)} of a linear probe on {about['student']} that {about['model']} teaches: "
        f"{s.rounds} rounds of {s.samples} fresh images and {s.steps} steps of {s.batch_size}, over {s.seeds} seeds. "
        f"Each seed draws {count:,} real images and {count:,} of noise (clamped to the range of pixels: the floor) "
        "anew, and takes inverted ones from one pool in an order of its own. Real images with only "
        f"{few} patches keep those with the most of the class token's attention.",
        {"images": "", "after the last round, %": ".2f", "best round, %": ".2f"},
        rows,
        [
            f"The teacher reaches {float_accuracy(run):.2f} %.",
            f"If {s.real_images:,} real images are there from the first round, one seed reaches {ceiling:.2f} % (the "
            "ceiling).",
            *([labels] if probe else []),
            f"Sparse minus dense after the last round: {sparse - dense:+.2f} points.",
        ],
        [{"x": "images in the pool", "y": "test accuracy, %", "lines": lines}],
        curves=curves,
    )


def table5(run: Experiment) -> Section:
    s, curves, rows = run.settings, run.section("table4", table4).curves, []
    iterations = s.inversion.iterations
    goals = [max(curve) for curve in curves["dense inversion"]]
    for variant in (run.dense, run.sparse):
        pairs = zip(curves[f"{variant.name} inversion"], goals, strict=True)
        rounds = [next((n for n, value in enumerate(curve, 1) if value >= goal), None) for curve, goal in pairs]
        batches = [run.inverted(variant, number, s.samples) for number in range(s.rounds)]
        seconds = statistics.mean(iterations / batch.metadata["iterations_per_second"] for batch in batches)
        rows.append([variant.name, *([n and n * each for n in rounds] for each in (s.samples, iterations, seconds))])
    return Section(
        "Table 5: what it takes to reach the dense run's best accuracy",
        "The costs count up to the first round in which a transfer of Table 4 reaches the best accuracy of the dense "
        f"transfer with the same seed, {statistics.mean(goals):.2f} % on average over {s.seeds} seeds. A round inverts "
        f"{s.samples} images in {iterations} iterations.",
        {"inversion": "", "samples": ".0f", "iterations": ".0f", "seconds of inversion": ".0f"},
        rows,
    )


def float_accuracy(run: Experiment) -> float:
    """Return the test accuracy of the model that is inverted, in %."""
    return run.accuracy("float", lambda: run.model, run.settings.test_images)
