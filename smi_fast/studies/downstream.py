"""Tables 3, 4 and 5: quantisation and transfer with inverted images, compared with real images and noise."""

from __future__ import annotations

import json
import statistics
from functools import partial

import torch

from smi_fast.backbones.base import class_names
from smi_fast.models import MODEL_DIR
from smi_fast.studies.experiment import BITS, Experiment, Variant, split
from smi_fast.studies.images import inverted_pool, most_attended, noise, real_images, save_rows, whole_images
from smi_fast.studies.page import Section, spread
from smi_fast.studies.paper import TABLE3, TABLE4, TABLE5
from smi_fast.studies.report import plural
from smi_fast.studies.speed import PAPER_SPEEDUP

COSTS = {  # metadata of inverted images -> heading, format
    "iterations_per_second": ("iterations/s", ".2f"),
    "images_per_hour": ("images/hour", ".0f"),
    "gflop": ("GFLOP/iteration", ".1f"),
    "memory": ("memory, MiB", ".0f"),
    "last_memory": ("last stage, MiB", ".0f"),
}
ACCURACIES = [f"W{weights}/A{activations}, %" for weights, activations in BITS]
COLUMNS = {
    "calibration": "", "sparsity, %": ".1f", **dict(COSTS.values()), **dict.fromkeys(ACCURACIES, ".2f"),
    "paper: iterations/s": ".2f", "paper: W8/A8, %": ".2f", "paper: W4/A8, %": ".2f",
}  # fmt: skip


def table3(run: Experiment) -> Section:
    s, seeds = run.settings, range(run.settings.seeds)
    variants = {
        "PSAQ-ViT, dense": run.psaq_dense, "PSAQ-ViT, sparse": run.psaq_sparse, "dense inversion": run.dense,
        "sparse inversion": run.sparse, "rebirth": run.rebirth,
    }  # fmt: skip
    exact = float_accuracy(run, s.quantised_images)
    blank = [""] * (1 + len(COSTS))
    rows = {"the model in floating point": [*blank, *[exact] * len(BITS)]}
    for name, make in (("real images", real_images), ("Gaussian noise", noise)):
        sets = [make(run, s.images, seed) for seed in seeds]
        rows[name] = [*blank, *run.quantised(name, sets)]
    inverted = {name: [run.inverted(v, seed, s.images) for seed in seeds] for name, v in variants.items()}
    for name, sets in inverted.items():
        costs = [[dataset.metadata[key] for dataset in sets] for key in COSTS]
        rows[name] = [run.sparsity(sets[0]), *costs, *run.quantised(variants[name].name, sets)]
    save_rows(run.out / "table3.png", {name: sets[0] for name, sets in inverted.items()}, class_names(run.model))
    memory = "the device's" if run.device.type == "cuda" else "the whole process's"
    return Section(
        "Table 3: quantisation by calibration source",
        f"Accuracy on {split(s.quantised_images)} after calibration on {s.images} images, over {s.seeds} seeds. W4/A8 "
        "means weights of 4 bits and activations of 8. Real images come from the training split, noise is standard "
        "normal, and sparse images are fed sparse. Iterations/s, images/hour, FLOPs (of matrix products, averaged over "
        f"the iterations) and memory ({memory}, at its peak) are those of an inversion of {s.images} images at once, "
        f"in {s.dtype or 'the default dtype'}; of rebirth, of {s.images // s.rebirth} targets with {s.rebirth} images "
        "each. The paper's figures are those of DeiT-B on ImageNet.",
        COLUMNS,
        [[name, *row, *_papers(name)] for name, row in rows.items()],
        _verdicts3({name: [mean(value) for value in row] for name, row in rows.items()}),
        picture="table3.png",
    )


def _papers(name: str) -> list:
    speed, _, _, w8, w4 = TABLE3.get(name, [None] * 5)
    return ["" if value is None else value for value in (speed, w8, w4)]


def _verdicts3(rows: dict[str, list]) -> list[str]:
    real, noisy, dense, sparse, rebirth = (
        rows[name] for name in ("real images", "Gaussian noise", "dense inversion", "sparse inversion", "rebirth")
    )
    bits = [name.removesuffix(", %") for name in ACCURACIES]

    def minus(ours: list, theirs: list) -> str:
        differences = [a - b for a, b in zip(ours[-len(bits) :], theirs[-len(bits) :], strict=True)]
        return ", ".join(f"{d:+.2f} points at {name}" for name, d in zip(bits, differences, strict=True))

    return [
        f"Sparse minus real images: {minus(sparse, real)}.",
        f"Sparse minus dense: {minus(sparse, dense)}. In the paper: +1.05 at W8/A8, +1.52 at W4/A8.",
        f"Noise minus real images: {minus(noisy, real)}. In the paper, noise loses more than 60 points.",
        f"Sparse makes {sparse[1] / dense[1]:.2f} times as many iterations per second as dense. {PAPER_SPEEDUP} "
        f"Rebirth makes {rebirth[2] / sparse[2]:.2f} times as many images per hour as sparse.",
    ]


def table4(run: Experiment) -> Section:
    s, about, few = run.settings, run.about, run.final_count
    count = min(s.rounds * s.samples, s.real_images)
    how = {"rounds": s.rounds, "steps": s.steps, "batch_size": s.batch_size, "lr": s.student_lr, "samples": s.samples}
    pools = {
        "real images": lambda seed: real_images(run, count, seed),
        f"real images, {few} patches": lambda seed: most_attended(run, real_images(run, count, seed), few),
        "Gaussian noise": lambda seed: whole_images(run, noise(run, count, seed), torch.zeros(count).long()),
        "dense inversion": lambda seed: inverted_pool(run, run.dense, s.rounds),
        "sparse inversion": lambda seed: inverted_pool(run, run.sparse, s.rounds),
        "rebirth": lambda seed: inverted_pool(run, run.rebirth, s.rounds),
    }
    curves = {
        source: [run.transfer(source, partial(pool, seed), seed, **how) for seed in range(s.seeds)]
        for source, pool in pools.items()
    }
    more = f"sparse inversion, {s.more_rounds} rounds"
    curves[more] = [
        run.transfer(
            more, lambda: inverted_pool(run, run.sparse, s.more_rounds), seed, **how | {"rounds": s.more_rounds}
        )
        for seed in range(s.seeds)
    ]
    curves["adaptive, sparse"] = [run.adaptive_transfer(seed, **how) for seed in range(s.adaptive_seeds)]
    whole = how | {"samples": s.real_images}
    ceiling = run.transfer("ceiling", lambda: real_images(run, s.real_images, 0), 0, **whole)[-1]
    teacher = float_accuracy(run, s.test_images)
    rows = [["teacher", teacher, "", TABLE4["teacher"]]]
    rows += [
        [source, [c[-1] for c in seeds], [max(c) for c in seeds], TABLE4.get(source, "")]
        for source, seeds in curves.items()
    ]
    dense, sparse = (mean([c[-1] for c in curves[f"{name} inversion"]]) for name in ("dense", "sparse"))
    card = MODEL_DIR / f"{about['student']}.json"
    probe = json.loads(card.read_text()).get("test_accuracy_of_a_linear_probe") if card.is_file() else None
    labels = f"A linear probe trained on labels reaches {100 * (probe or 0):.2f} %, according to its model card."
    lines = {
        name: [
            [s.samples * n for n in range(1, len(seeds[0]) + 1)],
            *spread([list(v) for v in zip(*seeds, strict=True)]),
        ]
        for name, seeds in curves.items()
    }
    timed = {}
    for name, variant in (("dense inversion", run.dense), (more, run.sparse), ("rebirth", run.rebirth)):
        (images, *accuracies), seconds = lines[name], round_seconds(run, variant)
        timed[name] = [[count / s.samples * seconds / 60 for count in images], *accuracies]
    return Section(
        "Table 4 and Fig. 4: transfer from dense and from sparse images",
        "The model that is inverted teaches a linear probe on the student, whose accuracy is measured on "
        f"{split(s.test_images)}: {s.rounds} rounds of {s.samples} fresh images and {s.steps} steps of {s.batch_size}, "
        f"over {s.seeds} seeds. Each seed draws {count:,} real images and {count:,} of noise (clamped to the range of "
        "pixels: the floor) anew, and takes inverted ones from one pool in an order of its own. Real images with only "
        f"{few} patches keep those with the most of the class token's attention. Rebirth makes {s.rebirth} images of "
        f"each target. {s.more_rounds} rounds of sparse inversion take about as long as {s.rounds} of dense inversion. "
        f"Adaptive images are sparse, compete with the student, and have {plural(s.adaptive_seeds, 'seed')}. The "
        "paper's figures are those of DeiT-B on CIFAR-10.",
        {"images": "", "after the last round, %": ".2f", "best round, %": ".2f", "paper, %": ".2f"},
        rows,
        [
            f"Sparse minus dense after the last round: {sparse - dense:+.2f} points. In the paper, sparse is better by "
            f"{TABLE4['sparse inversion'] - TABLE4['dense inversion']:.2f}.",
            f"From sparse images the student gets {100 * sparse / teacher:.0f} % of the teacher's accuracy in "
            f"{s.rounds} rounds, and {100 * mean([c[-1] for c in curves[more]]) / teacher:.0f} % in {s.more_rounds}.",
            f"If {s.real_images:,} real images are there from the first round, one seed reaches {ceiling:.2f} % (the "
            "ceiling).",
            *([labels] if probe else []),
        ],
        [
            {"x": "images in the pool", "y": "test accuracy, %", "lines": lines},
            {"x": "minutes of inversion", "y": "test accuracy, %", "lines": timed},
        ],
        curves=curves,
    )


def table5(run: Experiment) -> Section:
    s, curves, rows = run.settings, run.section("table4", table4).curves, []
    iterations = s.inversion.iterations
    goals = [max(curve) for curve in curves["dense inversion"]]
    for variant, name in (
        (run.dense, "dense inversion"),
        (run.sparse, f"sparse inversion, {s.more_rounds} rounds"),
    ):
        pairs = zip(curves[name], goals, strict=True)
        rounds = [next((n for n, value in enumerate(curve, 1) if value >= goal), None) for curve, goal in pairs]
        seconds = round_seconds(run, variant)
        rows.append([variant.name, *([n and n * each for n in rounds] for each in (s.samples, iterations, seconds))])
    paper = [f"{samples:,} samples in {rounds} rounds, {name}" for name, (samples, rounds) in TABLE5.items()]
    return Section(
        "Table 5: what it takes to reach the dense run's best accuracy",
        "The costs count up to the first round in which a transfer of Table 4 reaches the best accuracy of the dense "
        f"transfer with the same seed, {statistics.mean(goals):.2f} % on average over {s.seeds} seeds. A round inverts "
        f"{s.samples} images in {iterations} iterations.",
        {"inversion": "", "samples": ".0f", "iterations": ".0f", "seconds of inversion": ".0f"},
        rows,
        [f"The paper, with DeiT-B: {'; '.join(paper)}."],
    )


def round_seconds(run: Experiment, variant: Variant) -> float:
    """Return how long the inversion of a round's images takes on average."""
    s = run.settings
    batches = [run.inverted(variant, number, s.samples) for number in range(s.rounds)]
    return statistics.mean(s.inversion.iterations / batch.metadata["iterations_per_second"] for batch in batches)


def float_accuracy(run: Experiment, count: int | None) -> float:
    """Return the accuracy of the model that is inverted on `count` test images, in %."""
    return run.accuracy("float", lambda: run.model, count)


def mean(value: float | str | list[float]) -> float | str:
    """Return the mean of a list of numbers, and anything else as it is."""
    return statistics.mean(value) if isinstance(value, list) else value
