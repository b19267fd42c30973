"""Tables 6 and 7, Fig. 8, and an ablation of ours: how results change with other schedules, fractions and patches."""

from __future__ import annotations

from smi_fast.backbones.base import class_names
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.studies.experiment import Experiment, Settings, Variant, kept, split
from smi_fast.studies.images import save_rows
from smi_fast.studies.page import Section, spread
from smi_fast.studies.paper import ITERATIONS, TABLE7

COLUMNS = {
    "inversion": "", "patches kept": ".0f", "sparsity, %": ".1f", "iterations/s": ".2f", "confidence": ".3f",
    "transfer, %": ".2f",
}  # fmt: skip


def table7(run: Experiment) -> Section:
    iterations, table = run.settings.inversion.iterations, []
    for stops, paper in TABLE7.items():
        schedule = scaled(stops, iterations)
        name = ", ".join(f"{at}: {100 * fraction:.0f} %" for at, fraction in schedule.stops.items())
        variant = run.sparse if schedule == run.sparse.stopping else Variant(f"stops-{schedule}", schedule)
        table += [[*row, paper] for row in rows(run, {name: variant})]
    return Section(
        "Tables 6 and 7: when patches stop",
        "Nine schedules that all stop about 77 % of the patches, in one stage, in two or in four, from early to late. "
        f"The iterations are the paper's, scaled from {ITERATIONS} to {iterations}. {_text(run.settings)} The paper's "
        "figures are those of a DeiT-T that learns CIFAR-10.",
        COLUMNS | {"paper, %": ".2f"},
        table,
        ["In the paper, later schedules and more stages are a little better, all within 1.32 points."],
    )


def scaled(stops: tuple[tuple[int, float], ...], iterations: int) -> StoppingSchedule:
    """Scale a schedule of the paper's to a number of iterations. Stoppings are rounded up and kept one apart."""
    scaled, previous = [], 0
    for at, fraction in stops:
        previous = max(previous + 1, -(-at * iterations // ITERATIONS))
        scaled.append((previous, fraction))
    return StoppingSchedule(scaled)


def which_patches(run: Experiment) -> Section:
    variants = {
        "most attention": run.sparse,
        "random": Variant("random", run.sparse.stopping, "random"),
        "lowest attention": Variant("lowest-attention", run.sparse.stopping, "lowest"),
    }
    table = rows(run, variants)
    sets = {name: run.inverted(variant, 0, run.settings.images) for name, variant in variants.items()}
    save_rows(run.out / "which_patches.png", sets, class_names(run.model))
    return Section(
        "An ablation of ours: which patches go on",
        "All variants follow the published schedule. The patches that go on are those with the most of the class "
        f"token's attention, random ones, or those with the least. {_text(run.settings)}",
        COLUMNS,
        table,
        picture="which_patches.png",
    )


def figure8(run: Experiment) -> Section:
    stops = run.sparse.stopping.stops
    variants = {"none (dense)": run.dense, "0.3 each (sparse)": run.sparse}
    for fraction in run.settings.fractions:
        schedule = StoppingSchedule(dict.fromkeys(stops, fraction))
        variants[f"{fraction:g} each"] = Variant(f"fraction-{fraction:g}", schedule)
    table = sorted(rows(run, variants), key=lambda row: row[2])
    columns = dict(zip(COLUMNS, zip(*table, strict=True), strict=True))
    lines = {
        name: [columns["sparsity, %"], *spread(columns[name])]
        for name in ("iterations/s", "transfer, %")
        if isinstance(columns[name][0], list)
    }
    speed = {"": lines.pop("iterations/s")}
    return Section(
        "Fig. 8: sparsity against accuracy and speed",
        f"Each variant stops another fraction of the patches at each of the iterations {', '.join(map(str, stops))}, "
        f"where 0.3 is the published one. {_text(run.settings)}",
        COLUMNS,
        table,
        ["In the paper, both speed and transfer accuracy rise with sparsity."],
        panels=[
            {"x": "sparsity, %", "y": "test accuracy, %", "lines": lines},
            {"x": "sparsity, %", "y": "iterations/s", "lines": speed},
        ],
    )


def rows(run: Experiment, variants: dict[str, Variant]) -> list[list]:
    """Return a row of `COLUMNS` for each variant."""
    return [[name, *_measure(run, variant)] for name, variant in variants.items()]


def _measure(run: Experiment, variant: Variant) -> list:
    s = run.settings
    sets = [run.inverted(variant, seed, s.images) for seed in range(s.ablation_seeds)]
    costs = [[dataset.metadata[key] for dataset in sets] for key in ("iterations_per_second", "confidence")]
    transfer = "no student"
    if run.student is not None:
        how = {"rounds": 1, "steps": s.ablation_steps, "batch_size": s.batch_size, "lr": s.student_lr}
        transfer = [
            run.transfer(f"once-{variant.name}", lambda dataset=dataset: dataset, seed, **how)[-1]
            for seed, dataset in enumerate(sets)
        ]
    return [kept(sets[0]), run.sparsity(sets[0]), *costs, transfer]


def _text(s: Settings) -> str:
    return (
        f"A row averages {s.ablation_seeds} seeds with {s.images} images each. The transfer takes {s.ablation_steps} "
        f"steps on them alone and is measured on {split(s.test_images)}."
    )
