"""What a run's report says of speed: the table of stages that smi-fast invert prints."""

import time

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import Inverter, StoppingSchedule
from smi_fast.inversion.inverter import Stage, Step
from smi_fast.inversion.meter import StageMeter, stage_records


def metered(monkeypatch, *runs: list[tuple[Stage, list[float]]]) -> list[dict]:
    """The records of stages whose iterations take the given seconds, by a clock that only they advance."""
    now, meter = 100.0, StageMeter(torch.device("cpu"))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for stages in runs:
        meter.begin_batch()
        started = now
        for stage, durations in stages:
            for iteration, seconds in enumerate(durations, stage.start):
                now += seconds
                meter(Step(iteration, stage, torch.tensor(0.0), None, started))
        meter.end_batch()
    return stage_records(list(meter.costs.values()))


@pytest.mark.parametrize(
    "cold", [[3.0, 1.0, *[0.2] * 6], [3.0, 0.9, 1.5, 1.5, 0.2, 0.2, 0.2, 0.9]], ids=["cpu", "CUDA graph"]
)
def test_the_first_calls_of_a_stage_are_not_in_its_speed(cold, monkeypatch):
    dense, sparse = Stage(0, 8, 64, 65), Stage(8, 100, 14, 15)
    first, last = metered(monkeypatch, [(dense, cold), (sparse, [*[0.7] * 6, *[0.05] * 86])])
    assert first["iterations_per_second"] == pytest.approx(5)
    assert last["iterations_per_second"] == pytest.approx(20)
    assert (first["speedup_over_dense"], last["speedup_over_dense"]) == (1, pytest.approx(4))


def test_the_speed_of_a_stage_is_that_over_all_batches_also_of_one_that_was_interrupted(monkeypatch):
    stage, then = Stage(0, 3, 64, 65), Stage(3, 9, 14, 15)
    whole, interrupted = [(stage, [9.0, 3.0, 3.0]), (then, [0.5] * 6)], [(stage, [2.0, 2.0])]
    first, last = metered(monkeypatch, whole, interrupted)
    assert first["iterations_per_second"] == pytest.approx(1 / 3.0)  # all are first calls: the median of both batches
    assert last["iterations_per_second"] == pytest.approx(1 / 0.5)


def test_the_durations_of_iterations_add_up_to_the_time_of_the_run(device, seed):
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3).to(device)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "input_size": (3, 16, 16)}
    inverter = Inverter(model, stopping=StoppingSchedule({4: 0.5}), iterations=12, progress=False)
    meter, ends = StageMeter(device), []
    before = time.perf_counter()
    meter.begin_batch()
    inverter.run([0, 1], lambda step: [meter(step), ends.append(step.seconds())])
    meter.end_batch()
    elapsed = time.perf_counter() - before
    durations = [seconds for cost in meter.costs.values() for seconds in cost.durations]
    assert [cost.iterations for cost in meter.costs.values()] == [4, 8]
    assert min(durations) > 0
    assert 0.5 * ends[-1] < sum(durations) < elapsed
