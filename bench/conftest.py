"""Options of the benchmarks, and how contestants that were timed in turn become entries of pytest-benchmark.

A test marked `contest` is a group. Its function returns the contestants, which are set up once from shared inputs. The
group runs once for each case: the first of its entries that pytest reaches times all contestants in turn (see duel.py),
and the others find their times there. Each entry then plays its own recorded seconds back to pytest-benchmark, through
a clock that moves by nothing else. So the statistics, the table and the JSON of pytest-benchmark hold exactly the
rounds that were measured side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from duel import OURS, Outcome, ceilings, duel


def pytest_addoption(parser):
    group = parser.getgroup("smi-fast")
    group.addoption("--smi-checkout", type=Path, help="the authors' published code, a work tree of Egg-Hu/SMI")
    group.addoption("--tome-checkout", type=Path, help="a work tree of facebookresearch/ToMe")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="where to run; by default the GPU if there is one")
    group.addoption("--threads", type=int, help="CPU threads; by default as many as torch chooses")
    group.addoption("--stop-after", type=float, help="seconds after which no further group begins, so that results "
                    "are written in time")  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "contest(contestants, cpu, cuda): contestants, and the cases on each device")
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    if config.option.bench_device is None:
        config.option.bench_device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # otherwise only convolutions would not compute in float32


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
    for name in ("node", "release"):  # names of the host, which mean nothing to others
        machine_info.pop(name, None)
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["device"] = config.option.bench_device
    if config.option.bench_device == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["ceilings"] = ceilings(torch.device("cuda"))


class RecordedClock:
    """A clock that is moved by recorded seconds only."""

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
def begun() -> float:
    return time.monotonic()


@pytest.fixture(scope="session")
def duels() -> dict[str, dict[str, Outcome] | Exception]:
    """For each group that has run, its outcomes by contestant, or the error that ended it."""
    return {}


@pytest.fixture
def enter(request, benchmark, begun, duels, case, contestant, device) -> Callable:
    """A function `enter(title, contestants, facts, **arguments of duel)` that records this contestant's rounds.

    `contestants` is called once for each group and makes the rounds of all. `facts` are numbers of the group that
    report.py reads: the `length` of a sequence, whether lengths are `ragged`, and for the floor the `floor_bytes` that
    must move and the `floor_flops` that must be computed."""

    def enter(title: str, contestants: Callable[[], dict], facts: dict[str, float] | None = None, **options) -> None:
        group = f"{title}: {case}"
        if group not in duels:
            limit = request.config.option.stop_after
            if limit is not None and time.monotonic() - begun > limit:
                benchmark.skipped = True
                pytest.skip(f"not begun {limit:g} s into the run")
            torch.manual_seed(0)
            try:
                duels[group] = duel(contestants(), device=device, **options)
            except Exception as error:  # the first contestant's, without which there is nothing to compare with
                duels[group] = error
        outcomes = duels[group]
        if isinstance(outcomes, Exception):
            raise outcomes
        outcome = outcomes.get(contestant, Outcome(absent=f"does not run on {device.type}"))
        if outcome.wrong:
            pytest.fail(outcome.wrong)
        if outcome.absent:
            benchmark.skipped = True
            pytest.skip(outcome.absent)
        benchmark.group = group
        benchmark.extra_info.update(
            title=title,
            contestant=contestant,
            **{name: str(value) for name, value in vars(case).items()},
            **(facts or {}),
            median_ms=outcome.median * 1e3,
            ratio=outcome.median / outcomes[OURS].median,
            peak_bytes=outcome.peak_bytes,
            graph=outcome.graph,
        )
        CLOCK.replay(benchmark, outcome.seconds)

    return enter
