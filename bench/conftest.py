"""Options, and how contestants that were timed in turn become entries of pytest-benchmark.

A test marked `contest` is a group: its function returns the contestants, set up once from shared inputs. The group runs
once for each case: the first of its entries that pytest reaches times all contestants in turn (see duel.py), the others
find their times there. Each entry then plays its own recorded seconds back to pytest-benchmark, through a clock
that stands still but for them, so that the statistics, the table and the JSON of pytest-benchmark hold exactly the
rounds that were measured side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from duel import OURS, Outcome, duel


def pytest_addoption(parser):
    group = parser.getgroup("smi-fast")
    group.addoption("--smi-checkout", type=Path, help="the authors' published code, a work tree of Egg-Hu/SMI")
    group.addoption("--tome-checkout", type=Path, help="a work tree of facebookresearch/ToMe")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="where to run; the GPU if there is one")
    group.addoption("--threads", type=int, help="CPU threads; as torch chooses")


def pytest_configure(config):
    config.addinivalue_line("markers", "contest(contestants, cpu, cuda): contestants, and the cases on each device")
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    if config.option.bench_device is None:
        config.option.bench_device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # else convolutions, and they alone, would not compute in float32


def pytest_generate_tests(metafunc):
    contest = metafunc.definition.get_closest_marker("contest")
    if contest is None:
        return
    entries = [
        pytest.param(case, name, id=f"{case}, {name}")
        for case in contest.kwargs[metafunc.config.option.bench_device]
        for name in contest.kwargs["contestants"]
    ]
    metafunc.parametrize(("case", "contestant"), entries)
    metafunc.function.pytestmark.append(pytest.mark.benchmark(timer=CLOCK.now))


def pytest_benchmark_update_machine_info(config, machine_info):
    for name in ("node", "release"):  # of the host, which tell nobody anything
        machine_info.pop(name, None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["device"] = config.option.bench_device
    if config.option.bench_device == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


class RecordedClock:
    """A clock that moves by nothing but recorded seconds."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def replay(self, benchmark, recorded: tuple[float, ...]) -> None:
        """One round of `benchmark` for each recorded time, exactly as long as that."""
        rounds: Iterator[float] = iter(recorded)

        def reset() -> None:
            self.seconds = 0.0

        def advance() -> None:
            self.seconds = next(rounds)

        benchmark.pedantic(advance, setup=reset, rounds=len(recorded))


CLOCK = RecordedClock()


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.option.bench_device)


@pytest.fixture(scope="session")
def duels() -> dict[str, dict[str, Outcome]]:
    """The outcomes of the groups that have run, by name."""
    return {}


@pytest.fixture
def enter(benchmark, duels, case, contestant, device) -> Callable:
    """Record this contestant's rounds: `enter(title, contestants, **duel's arguments)`, where `contestants` is called
    once a group and makes the rounds of all of them."""

    def enter(title: str, contestants: Callable[[], dict], **options) -> None:
        group = f"{title}: {case}"
        if group not in duels:
            torch.manual_seed(0)
            duels[group] = duel(contestants(), device=device, **options)
        outcome = duels[group].get(contestant, Outcome(absent=f"does not run on {device.type}"))
        if outcome.absent:
            benchmark.skipped = True
            pytest.skip(outcome.absent)
        benchmark.group = group
        benchmark.extra_info.update(
            contestant=contestant,
            **{name: str(value) for name, value in vars(case).items()},
            median_ms=outcome.median * 1e3,
            ratio=outcome.median / duels[group][OURS].median,
            peak_bytes=outcome.peak_bytes,
        )
        CLOCK.replay(benchmark, outcome.seconds)

    return enter
