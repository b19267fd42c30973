"""The time of an inversion weighs each stage by its length."""

from types import SimpleNamespace

import pytest

from smi_fast import StoppingSchedule
from smi_fast.studies.speed import inversion_seconds


def test_stages_are_weighed_by_their_lengths_and_outliers_ignored(monkeypatch):
    class Clock:
        """Iterations that take 1 s before the first stopping, 0.5 s and then 0.25 s; the first of a stage takes 9 s."""

        def __init__(self, fast, *, stopping, iterations, progress):
            self.starts, self.iterations = [0, *stopping.stops], iterations

        def run(self, targets, callback):
            assert len(targets) == 8
            now, stage = 0.0, -1
            for iteration in range(self.iterations):
                stage += iteration in self.starts
                now += 9 if iteration in self.starts else (1, 0.5, 0.25)[stage]
                callback(SimpleNamespace(seconds=lambda now=now: now))
            return SimpleNamespace(interrupted=False)

    monkeypatch.setattr("smi_fast.studies.speed.Inverter", Clock)
    schedule = StoppingSchedule({50: 0.3, 300: 0.3})
    assert inversion_seconds(None, schedule, 4000, 8, 5) == pytest.approx(50 + 250 * 0.5 + 3700 * 0.25)
