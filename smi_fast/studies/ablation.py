"""Tables 6 and 7 and Fig. 8: how results change with other stoppings, other patches and other fractions."""

from __future__ import annotations

from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.studies.experiment import Experiment, Settings, Variant, kept, split
from smi_fast.studies.images import save_rows
from smi_fast.studies.page import Section, spread

COLUMNS = {
    "inversion": "", "patches kept": ".0f", "sparsity, %": ".1f", "iterations/s": ".1f", "confidence": ".3f",
    "W8/A8, %": ".2f", "W4/A8, %": ".2f", "transfer, %": ".2f",
}  # fmt: skip


def table6(run: Experiment) -> Section:
    stops = list(run.sparse.stopping.stops)
    share = 1 - (run.final_count + 0.5) / run.grid.num_patches  # half a patch guards against rounding
    variants = {
        f"one stage, at {at}": Variant(f"at-{at}", StoppingSchedule({at: share})) for at in stops[:: len(stops) - 1]
    }
    return Section(
        "Table 6: one stage against several",
        "All variants keep the same number of patches. The others stop in one stage, or in several as published. "
        f"{_text(run.settings)}",
        COLUMNS,
        rows(run, variants | {f"at {', '.join(map(str, stops))}": run.sparse}),
    )


def table7(run: Experiment) -> Section:
    variants = {
        "most attention": run.sparse,
        "random": Variant("random", run.sparse.stopping, "random"),
        "lowest attention": Variant("lowest-attention", run.sparse.stopping, "lowest"),
    }
    table = rows(run, variants)
    sets = {name: run.inverted(variant, 0, run.settings.images) for name, variant in variants.items()}
    save_rows(run.out / "table7.png", sets)
    return Section(
        "Table 7: which patches are kept",
        "All variants follow the published schedule. The patches that go on are those with the most of the class "
        f"token's attention, random ones, or those with the least. {_text(run.settings)}",
        COLUMNS,
        table,
        picture="table7.png",
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
        for name in ("iterations/s", "W8/A8, %", "W4/A8, %", "transfer, %")
        if isinstance(columns[name][0], list)
    }
    speed = {"": lines.pop("iterations/s")}
    return Section(
        "Fig. 8: sparsity against accuracy and speed",
        f"Each variant stops another fraction of the patches at each of the iterations {', '.join(map(str, stops))}, "
        f"where 0.3 is the published one. {_text(run.settings)}",
        COLUMNS,
        table,
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
        how = {"rounds": 1, "steps": s.ablation_steps, "batch_size": s.batch_size}
        transfer = [
            run.transfer(f"once-{variant.name}", lambda dataset=dataset: dataset, seed, **how)[-1]
            for seed, dataset in enumerate(sets)
        ]
    return [
        kept(sets[0]), run.sparsity(sets[0]), *costs,
        *run.quantised(variant.name, sets, s.ablation_test_images), transfer,
    ]  # fmt: skip


def _text(s: Settings) -> str:
    return (
        f"A row averages {s.ablation_seeds} seeds with {s.images} images each. Quantised models are calibrated on them "
        f"and measured on {split(s.ablation_test_images)}. The transfer takes {s.ablation_steps} steps on them alone "
        f"and is measured on {split(s.test_images)}."
    )
