"""reproduce(): the comparisons of the paper on a model and data that are at hand, written as one page.

Numbers of tables and figures are those of Hu et al., Sparse Model Inversion, ICML 2024. The page says of each what was
measured and over how much; the figures of each seed are in the section's JSON file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise, product
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from smi_fast.backbones.base import frozen
from smi_fast.backbones.pruning import kept_count
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.data.sparse import InvertedDataset
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.presets import DEMO, PAPER
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.models import MODEL_DIR
from smi_fast.studies import pictures as visualization
from smi_fast.studies.experiment import ABLATION, BITS, Experiment, Settings, Variant, kept, name_of, split
from smi_fast.studies.page import Section, spread, write_page

PAPER_SPEEDUP = "The paper's, of its models on its GPUs: up to 3.79 times faster (abstract)."

PRESETS = {
    "paper": Settings(  # 100,000 images a transfer, of which the dense ones take 60 GB on the disk
        **asdict(PAPER), images=32, seeds=3, test_images=None, rounds=1000, samples=100, steps=1,
        batch_size=32, real_images=5000, ablation_seeds=3, ablation_test_images=None, ablation_steps=200,
        fractions=(0.1, 0.2, 0.4, 0.5), removal_images=10_000, speed_batches=(32, 64, 128), speed_iterations=50,
        speed_models=("deit_tiny_patch16_224", "deit_base_patch16_224"),
    ),
    "demo": Settings(
        **asdict(DEMO), images=32, seeds=3, test_images=2500, rounds=4, samples=32, steps=200,
        batch_size=64, real_images=2000, ablation_seeds=2, ablation_test_images=2000, ablation_steps=200,
        fractions=(0.15, 0.5), removal_images=2000, speed_batches=(8, 32), speed_iterations=6,
        speed_models=("deit_tiny_patch16_224",),
    ),
}  # fmt: skip


def reproduce(
    model: nn.Module,
    data: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    student: nn.Module | None = None,
    student_note: str = "",
    settings: Settings | str = "demo",
    sections: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Run the paper's comparisons and write `out/page.md` and its pictures.

    A section is saved as soon as it is finished, and the page with it; inverted images are saved batch by batch. Called
    again with the same arguments, it goes on where it was interrupted.

    Args:
        model: a timm model that `quantize` takes; also the teacher.
        data, root: labelled images, as for `load_data`. Real ones that calibrate or teach are of the split "train", all
            accuracies of the split "test".
        out: a folder, which is made.
        student: of the transfers, by linear probing, with the model's classes and patches; it stays as it is. None:
            transfers are left out.
        student_note: for the page, a sentence about what the student has learnt so far.
        settings: "paper", "demo", or your own.
        sections: which of `SECTIONS`; None: all.
        progress: show progress bars.

    Returns:
        The page.

    Raises:
        ValueError: an unknown preset or section; `out` holds something else, or results of other arguments; and as
            `load_data`, `quantize` and `distill`.
        KeyboardInterrupt: on Ctrl-C; what was finished is in `out`.
    """
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise ValueError(f"the preset must be one of {', '.join(PRESETS)}, got {settings!r}")
        settings = PRESETS[settings]
    names = list(SECTIONS if sections is None else sections)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise ValueError(f"there is no section {unknown[0]!r}: they are {', '.join(SECTIONS)}")
    if student is None:
        names = [name for name in names if name not in NEED_STUDENT]
    run = Experiment(model, student, data, root, Path(out), settings, progress)
    run.begin()
    for name in tqdm(names, "reproducing", disable=not progress, unit="section", dynamic_ncols=True):
        run.section(name, SECTIONS[name])
        write(run, student_note)
    return write(run, student_note)


def write(run: Experiment, student_note: str) -> Path:
    """The page of the sections that are finished."""
    sections = {name: section for name in SECTIONS if (section := run.finished(name)) is not None}
    about, minutes = run.about, sum(section.seconds for section in sections.values()) / 60
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    learner = f"with the student {about['student']}. {student_note}" if run.student else "without a student."
    introduction = (
        f"The comparisons of Hu et al. (ICML 2024) with {about['model']} on {about['data']}, {learner} "
        f"{about['device']}; {versions}; {minutes:.0f} minutes in all. Mean ± standard deviation over the seeds, whose "
        "figures are in `sections/`; settings are in `about.json`."
    )
    page = run.out / "page.md"
    write_page(page, "Sparse Model Inversion, reproduced", introduction, sections)
    return page


def table2(run: Experiment) -> Section:
    s = run.settings
    sets = [run.inverted(run.dense, number, s.images) for number in range(s.seeds)]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (run.mean, run.std))
    inverted = [((d.images() - mean) / std, d.targets) for d in sets]
    counts = (kept_count(run.num_patches, 0.3), final_count(run))
    rows = []
    for source, batches in (("real test images", run.test(s.removal_images)), ("dense inverted images", inverted)):
        whole, *parts = removal_losses(run.fast, batches, counts)
        rows.append([source, "nothing", run.num_patches, *whole])
        rows += [[source, what, n, *part] for (n, what), part in zip(product(counts, REMOVALS), parts, strict=True)]
    return Section(
        "Table 2: loss after removing background or foreground patches",
        "Cross-entropy and accuracy on what is left of an image when the patches with the least (background) or the "
        "most (foreground) of the class token's attention, or random ones, are removed: of "
        f"{split(s.removal_images)} and of {s.seeds * s.images} dense inverted images.",
        {"images": "", "removed": "", "patches left": "d", "loss": ".3f", "accuracy, %": ".2f"},
        rows,
    )


REMOVALS = {  # from patches by rising attention those that are left
    "background": lambda order, count: order[:, -count:],
    "foreground": lambda order, count: order[:, :count],
    "random patches": lambda order, count: order.gather(1, torch.rand(order.shape).argsort(1).to(order)[:, :count]),
}


@torch.no_grad()
def removal_losses(
    fast: AcceleratedViT, batches: Iterable[tuple[Tensor, Tensor]], counts: Sequence[int]
) -> list[list[float]]:
    """[mean cross-entropy, accuracy in %] of whole images, then for each count of patches left after each removal."""
    device, total, images = fast.device, 0, 0
    with frozen(fast), torch.random.fork_rng():
        torch.manual_seed(0)
        for x, y in batches:
            x = x.to(device)
            logits, attention = fast(x, return_attention=True)
            order = attention.argsort(1)
            parts = [fast(x, keep=remove(order, count)) for count, remove in product(counts, REMOVALS.values())]
            logits = torch.stack((logits, *parts)).double().cpu()  # [1 + parts, B, classes]
            loss = -logits.log_softmax(2)[:, torch.arange(len(y)), y]
            total = total + torch.stack((loss, 100.0 * (logits.argmax(2) == y)), 2).sum(1)
            images += len(y)
    return (total / images).tolist()


def table3(run: Experiment) -> Section:
    s, seeds = run.settings, range(run.settings.seeds)
    inverted = {v.name: [run.inverted(v, seed, s.images) for seed in seeds] for v in (run.dense, run.sparse)}
    sets = {
        "real images": [run.real(s.images, seed) for seed in seeds],
        "Gaussian noise": [run.noise(s.images, seed) for seed in seeds],
        **{f"{name} inversion": batches for name, batches in inverted.items()},
    }
    costs = ("iterations_per_second", "gflop", "memory", "last_memory")
    rows = {source: [source, *[""] * (1 + len(costs))] for source in sets}
    for name, batches in inverted.items():
        measured = [[d.metadata[key] for d in batches] for key in costs]
        rows[f"{name} inversion"] = [f"{name} inversion", run.sparsity(kept(batches[0])), *measured]
    for source, row in rows.items():
        row += [[run.quantised(d, bits, s.test_images) for d in sets[source]] for bits in BITS]
    real, _, _, sparse = ([statistics.mean(values) for values in row[-2:]] for row in rows.values())
    *_, slow, fast = (row[2] for row in rows.values())
    save_pictures(run.out / "table3.png", {name: batches[0] for name, batches in inverted.items()})
    memory = "the device's" if run.device.type == "cuda" else "the whole process's"
    return Section(
        "Table 3: quantisation by calibration source",
        f"Accuracy on {split(s.test_images)} after calibration on {s.images} images, over {s.seeds} seeds. Real images "
        f"are of the training split, noise is normal; sparse images are fed sparse. Iterations/s, "
        f"FLOPs (matrix products, the mean of iterations) and memory ({memory}, at its peak) are of an inversion of "
        f"{s.images} images at once.",
        {
            "calibration": "", "sparsity, %": ".1f", "iterations/s": ".1f", "GFLOP/iteration": ".1f",
            "memory, MiB": ".0f", "last stage, MiB": ".0f", "W8/A8, %": ".2f", "W4/A8, %": ".2f",
        },
        list(rows.values()),
        [
            f"The float model: {run.accuracy(run.model, s.test_images):.2f} %.",
            f"Sparse minus real: {sparse[0] - real[0]:+.2f} points at W8/A8, {sparse[1] - real[1]:+.2f} at W4/A8.",
            f"Sparse is {statistics.mean(fast) / statistics.mean(slow):.2f} times as fast as dense. {PAPER_SPEEDUP}",
        ],
        picture="table3.png",
    )  # fmt: skip


def table4(run: Experiment) -> Section:
    s = run.settings
    count = min(s.rounds * s.samples, s.real_images)
    pools: dict[str, Callable[[int], InvertedDataset]] = {
        "real images": lambda seed: run.real(count, seed),
        f"real images, {final_count(run)} patches": lambda seed: run.attended(run.real(count, seed), final_count(run)),
        "Gaussian noise": lambda seed: run.whole(run.noise(count, seed), torch.zeros(count, dtype=torch.int64)),
        "dense inversion": lambda seed: run.pool(run.dense),
        "sparse inversion": lambda seed: run.pool(run.sparse),
    }
    how = {"rounds": s.rounds, "steps": s.steps}
    curves = {
        source: [run.transfer(pool(seed), seed, samples=s.samples, **how) for seed in range(s.seeds)]
        for source, pool in pools.items()
    }
    ceiling = run.transfer(run.real(s.real_images, 0), 0, **how)[-1]
    rows = [[source, [c[-1] for c in seeds], [max(c) for c in seeds]] for source, seeds in curves.items()]
    *_, dense, sparse = (statistics.mean(last) for _, last, _ in rows)
    card = MODEL_DIR / f"{name_of(run.student)}.json"
    probe = json.loads(card.read_text()).get("test_accuracy_of_a_linear_probe") if card.is_file() else None
    x = [s.samples * (number + 1) for number in range(s.rounds)]
    lines = {name: [x, *spread([list(v) for v in zip(*seeds, strict=True)])] for name, seeds in curves.items()}
    return Section(
        "Table 4: transfer from dense and from sparse images",
        f"Accuracy on {split(s.test_images)} of a linear probe on {name_of(run.student)} that {name_of(run.model)} "
        f"teaches: {s.rounds} rounds of {s.samples} fresh images and {s.steps} steps of {s.batch_size}, over {s.seeds} "
        f"seeds. A seed draws {count:,} real images and {count:,} of noise (clamped to the range of pixels: the floor) "
        "anew, inverted ones in its own order from one pool. Where a real image is left with "
        f"{final_count(run)} patches, they have the most of the class token's attention.",
        {"images": "", "after the last round, %": ".2f", "best round, %": ".2f"},
        rows,
        [
            f"The teacher: {run.accuracy(run.model, s.test_images):.2f} %.",
            f"From {s.real_images:,} real images (the ceiling), there from the first round, one seed: {ceiling:.2f} %.",
            *(
                [f"A linear probe taught by labels, as the student's model card has it: {100 * probe:.2f} %."]
                if probe
                else []
            ),
            f"Sparse minus dense after the last round: {sparse - dense:+.2f} points.",
        ],
        [{"x": "images in the pool", "y": "test accuracy, %", "lines": lines}],
        curves=curves,
    )


def table5(run: Experiment) -> Section:
    s, curves, rows = run.settings, run.section("table4", table4).curves, []
    goals = [max(curve) for curve in curves["dense inversion"]]
    for variant in (run.dense, run.sparse):
        pairs = zip(curves[f"{variant.name} inversion"], goals, strict=True)
        rounds = [next((n for n, value in enumerate(curve, 1) if value >= goal), None) for curve, goal in pairs]
        batches = [run.inverted(variant, number, s.samples) for number in range(s.rounds)]
        seconds = statistics.mean(s.iterations / batch.metadata["iterations_per_second"] for batch in batches)
        rows.append([variant.name, *([n and n * each for n in rounds] for each in (s.samples, s.iterations, seconds))])
    return Section(
        "Table 5: what it takes to reach the dense run's best accuracy",
        "Of the transfers of Table 4, the first round of a seed that reaches the best of its dense rounds, "
        f"{statistics.mean(goals):.2f} % in the mean of {s.seeds} seeds. A round inverts {s.samples} images in "
        f"{s.iterations} iterations.",
        {"inversion": "", "samples": ".0f", "iterations": ".0f", "seconds of inversion": ".0f"},
        rows,
    )


def table6(run: Experiment) -> Section:
    stops = list(run.sparse.stopping.stops)
    share = 1 - (final_count(run) + 0.5) / run.num_patches  # half a patch, against rounding
    variants = {
        f"one stage, at {at}": Variant(f"at-{at}", StoppingSchedule({at: share})) for at in stops[:: len(stops) - 1]
    }
    return Section(
        "Table 6: one stage against several",
        f"As many patches kept, the others stopped at once or as published. {ablation_text(run.settings)}",
        ABLATION,
        ablation(run, variants | {f"at {', '.join(map(str, stops))}": run.sparse}),
    )


def table7(run: Experiment) -> Section:
    variants = {"most attention": run.sparse}
    for strategy in ("random", "lowest attention"):
        variants[strategy] = Variant(strategy.replace(" ", "-"), run.sparse.stopping, strategy)
    rows = ablation(run, variants)
    sets = {name: run.inverted(variant, 0, run.settings.images) for name, variant in variants.items()}
    save_pictures(run.out / "table7.png", sets)
    return Section(
        "Table 7: which patches are kept",
        "The published schedule; the patches that go on are those with the most of the class token's attention, random "
        f"ones, or those with the least. {ablation_text(run.settings)}",
        ABLATION,
        rows,
        picture="table7.png",
    )


def table8(run: Experiment) -> Section:
    s, rows, schedules = run.settings, [], (StoppingSchedule.dense(), run.sparse.stopping)
    models = {name_of(run.model): run.fast}
    for name in s.speed_models:
        models[f"{name}, random weights"] = accelerate(timm.create_model(name).eval().to(run.device))
    for (name, fast), size in product(models.items(), s.speed_batches):
        seconds = [inversion_seconds(fast, schedule, s.iterations, size, s.speed_iterations) for schedule in schedules]
        rows.append([name, size, *(s.iterations / t for t in seconds), seconds[0] / seconds[1]])
    return Section(
        "Table 8: speed by batch size and model",
        f"Of an inversion of {s.iterations} iterations, by the median of {s.speed_iterations} timed ones in each "
        "of its stages, dense and sparse in turn.",
        {"model": "", "batch": "d", "dense, iterations/s": ".2f", "sparse, iterations/s": ".2f", "times faster": ".2f"},
        rows,
        [PAPER_SPEEDUP],
    )


def figure8(run: Experiment) -> Section:
    stops = run.sparse.stopping.stops
    variants = {"none (dense)": run.dense, "0.3 each (sparse)": run.sparse}
    for fraction in run.settings.fractions:
        schedule = StoppingSchedule(dict.fromkeys(stops, fraction))
        variants[f"{fraction:g} each"] = Variant(f"fraction-{fraction:g}", schedule)
    rows = sorted(ablation(run, variants), key=lambda row: row[2])
    columns = dict(zip(ABLATION, zip(*rows, strict=True), strict=True))
    lines = {
        name: [columns["sparsity, %"], *spread(columns[name])]
        for name in ("iterations/s", "W8/A8, %", "W4/A8, %", "transfer, %")
        if isinstance(columns[name][0], list)
    }
    speed = {"": lines.pop("iterations/s")}
    return Section(
        "Fig. 8: sparsity against accuracy and speed",
        f"At each of the published iterations, {', '.join(map(str, stops))}, another fraction of the patches is "
        f"stopped; 0.3 is the published one. {ablation_text(run.settings)}",
        ABLATION,
        rows,
        panels=[
            {"x": "sparsity, %", "y": "test accuracy, %", "lines": lines},
            {"x": "sparsity, %", "y": "iterations/s", "lines": speed},
        ],
    )


SECTIONS: dict[str, Callable[[Experiment], Section]] = {
    "table3": table3, "table4": table4, "table5": table5, "table6": table6, "table7": table7, "figure8": figure8,
    "table8": table8, "table2": table2,
}  # fmt: skip
NEED_STUDENT = ("table4", "table5")


def ablation(run: Experiment, variants: dict[str, Variant]) -> list[list]:
    return [[name, *run.judge(variant)] for name, variant in variants.items()]


def ablation_text(s: Settings) -> str:
    return (
        f"A row is of {s.ablation_seeds} seeds with {s.images} images each: quantisation calibrated on them, measured "
        f"on {split(s.ablation_test_images)}, and a transfer of {s.ablation_steps} steps from them alone, measured on "
        f"{split(s.test_images)}."
    )


def inversion_seconds(
    fast: AcceleratedViT, stopping: StoppingSchedule, iterations: int, batch_size: int, timed: int
) -> float:
    """Seconds that the iterations of an inversion take, told from the median of a few timed in each stage."""
    stops = {timed * number: fraction for number, fraction in enumerate(stopping.stops.values(), 1)}
    count = timed * (len(stops) + 1)
    short = Inverter(fast, stopping=StoppingSchedule(stops), iterations=count, progress=False)
    moments, targets = [0.0], torch.zeros(batch_size, dtype=torch.int64)
    if short.run(targets, lambda step: moments.append(step.seconds())).interrupted:
        raise KeyboardInterrupt
    durations = [after - before for before, after in pairwise(moments)]
    lengths = [end - start for start, end in pairwise([0, *stopping.stops, iterations])]
    return sum(n * statistics.median(durations[k * timed : (k + 1) * timed]) for k, n in enumerate(lengths))


def final_count(run: Experiment) -> int:
    """Patches that are left of an image by the published schedule."""
    return list(run.sparse.stopping.patches(run.num_patches).values())[-1]


def save_pictures(path: Path, sets: dict[str, InvertedDataset]) -> None:
    """A row of images of each set."""
    columns = min(10, *map(len, sets.values()))
    images = torch.cat([dataset.images(range(columns)) for dataset in sets.values()])
    visualization.save_grid(images, path, columns, list(sets))
