"""Table 8: the speed of inversions."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import timm
import torch

from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.result import Step
from smi_fast.inversion.schedule import RebirthSchedule, StoppingSchedule
from smi_fast.studies.experiment import Experiment, name_of
from smi_fast.studies.page import Section
from smi_fast.studies.paper import TABLE8

REBIRTH = (4, 7)  # images of each target
PAPER = {"deit_base": TABLE8["DeiT-B"], "deit_tiny": TABLE8["DeiT-T"]}  # how names of timm's models begin
PAPER_SPEEDUP = "The paper reports up to 3.79 times for its models on its GPUs (abstract)."


def table8(run: Experiment) -> Section:
    s, rows, iterations = run.settings, [], run.settings.inversion.iterations
    models = {name_of(run.model): accelerate(run.model, dtype=run.dtype)}
    for name in s.speed_models:
        model = timm.create_model(name).eval().to(run.device)
        models[f"{name}, random weights"] = accelerate(model, dtype=run.dtype)
    for (name, fast), size in product(models.items(), s.speed_batches):
        measure = partial(in_turn, run, fast, size)
        dense, sparse, *reborn = run.once(f"speed-{name}-{size}", measure)
        paper = next((times.get(size, "") for start, times in PAPER.items() if name.startswith(start)), "")
        rows.append([name, size, iterations / dense, iterations / sparse, dense / sparse, paper])
        rows[-1] += [v * sparse / seconds for v, seconds in zip(REBIRTH, reborn, strict=True)]
    return Section(
        "Table 8: speed by batch size and model",
        f"The speed is that of an inversion of {iterations} iterations, computed from the median of "
        f"{s.speed_iterations} timed ones in each of its stages, in {s.dtype or 'the default dtype'}. Dense, "
        "sparse and rebirth inversions are timed in turn. Rebirth makes several sparse images of each target.",
        {
            "model": "", "batch": "d", "dense, iterations/s": ".2f", "sparse, iterations/s": ".2f",
            "times faster": ".2f", "paper: times faster": ".2f",
            **{f"rebirth={v}, times sparse's images/s": ".2f" for v in REBIRTH},
        },
        rows,
        [PAPER_SPEEDUP],
    )  # fmt: skip


def in_turn(run: Experiment, fast: AcceleratedViT, batch_size: int) -> list[float]:
    """Return the seconds of a dense inversion, of a sparse one, and of patch rebirth with each of REBIRTH."""
    iterations, timed = run.settings.inversion.iterations, run.settings.speed_iterations
    schedules = [run.dense.stopping, run.sparse.stopping, *(RebirthSchedule(v).stopping(iterations) for v in REBIRTH)]
    return [
        inversion_seconds(fast, schedule, iterations, batch_size, timed, run.job.signals.check)
        for schedule in schedules
    ]  # fmt: skip


def inversion_seconds(
    fast: AcceleratedViT,
    stopping: StoppingSchedule,
    iterations: int,
    batch_size: int,
    timed: int,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Estimate the seconds of an inversion's iterations from the median of a few timed ones in each stage. `check` is
    called after every iteration."""
    stops = {timed * number: fraction for number, fraction in enumerate(stopping.stops.values(), 1)}
    count = timed * (len(stops) + 1)
    short = Inverter(fast, stopping=StoppingSchedule(stops), iterations=count, progress=False)
    durations = iteration_seconds(short, batch_size, check)
    lengths = [end - start for start, end in pairwise([0, *stopping.stops, iterations])]
    return sum(n * statistics.median(durations[k * timed : (k + 1) * timed]) for k, n in enumerate(lengths))


def iteration_seconds(inverter: Inverter, batch_size: int, check: Callable[[], None]) -> list[float]:
    """Run an inversion, and return the seconds of each of its iterations. `check` is called after every one."""
    moments = [0.0]

    def callback(step: Step) -> None:
        moments.append(step.seconds())
        check()

    if inverter.run(torch.zeros(batch_size, dtype=torch.int64), callback=callback).interrupted:
        raise KeyboardInterrupt
    return [after - before for before, after in pairwise(moments)]
