"""Options of the benchmarks, and how contestants that were timed in turn become entries of pytest-benchmark.

A test marked `contest` is a group. Its function returns the contestants, which are set up once from shared inputs. The
group runs once for each case: the first of its entries that pytest reaches times all contestants in turn (see duel.py),
and the others find their times there. Each entry then plays its own recorded seconds back to pytest-benchmark, through
a clock that moves by nothing else. So the statistics, the table and the JSON of pytest-benchmark hold exactly the
rounds that were measured side by side.

With --results the entries of a group are written into a JSON file as soon as the group has been measured, in the form
of pytest-benchmark's own. A later run with the same file measures only the groups that are not in it. What a contestant
failed with is in the list "failed" of that file.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from duel import OURS, Outcome, answers, ceilings, duel
from journal import DEAD, STOPPED, Journal, source
from pytest_benchmark.stats import Stats


def pytest_addoption(parser):
    group = parser.getgroup("smi-fast")
    group.addoption("--smi-checkout", type=Path, help="the authors' published code, a work tree of Egg-Hu/SMI")
    group.addoption("--tome-checkout", type=Path, help="a work tree of facebookresearch/ToMe")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="where to run; by default the GPU if there is one")
    group.addoption("--threads", type=int, help="CPU threads; by default as many as torch chooses")
    group.addoption("--stop-after", type=float, help="seconds after which no further group begins")
    group.addoption("--results", type=Path, help="write each group here when it is measured, and skip what is there")
    group.addoption("--compile-only", action="store_true", help="compile what smi-fast launches, and time nothing")
    group.addoption("--rounds", type=int, help="time so many rounds of each contestant; by default what time allows")


def pytest_configure(config):
    config.addinivalue_line("markers", "contest(contestants, cpu, cuda): contestants, and the cases on each device")
    config.addinivalue_line("markers", "rotate: on a GPU the calls of a graph take different inputs in turn")
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    if config.option.bench_device is None:
        config.option.bench_device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # otherwise only convolutions would not compute in float32


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK and getattr(session, "stopped", False):
        session.exitstatus = STOPPED


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
    machine_info["ceilings"] = measured_ceilings(config.option.bench_device)
    if config.option.bench_device == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


@cache
def measured_ceilings(device: str) -> dict:
    return ceilings(torch.device(device))


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
def results(request) -> Journal:
    """The lists "benchmarks" (entries as pytest-benchmark has them), "failed" (contestants without times, and why) and
    "begun" (groups)."""
    config = request.config
    session = config._benchmarksession
    about = config.hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=[],
        include_data=True,
        machine_info=session.get_machine_info(),
        commit_info=config.hook.pytest_benchmark_generate_commit_info(config=config),
    )
    del about["benchmarks"]
    info = about["machine_info"]
    on = str(info.get("gpu", info["device"])), str(info["threads"])
    return Journal(config.option.results, source(*on), **about)


@pytest.fixture(scope="session")
def ahead(request) -> Iterator:
    if not request.config.option.compile_only:
        yield None
        return
    from ahead import Ahead

    found = Ahead()
    yield found
    found.compile()


@pytest.fixture
def enter(request, benchmark, begun, results, ahead, case, contestant, device) -> Callable:
    """A function `enter(title, contestants, facts, **arguments of duel)` that records this contestant's rounds.

    `contestants` makes the rounds of all. `facts` are numbers of the group that report.py reads: the `length` of a
    sequence, whether lengths are `ragged`, and for the floor the `floor_bytes` that must move and the `floor_flops`
    that must be computed."""

    def enter(title: str, contestants: Callable[[], dict], facts: dict[str, float] | None = None, **options) -> None:
        group = f"{title}: {case}"
        names = request.node.get_closest_marker("contest").kwargs["contestants"]
        about = {"title": title, **{name: str(value) for name, value in vars(case).items()}, **(facts or {})}
        if ahead is not None:
            if contestant == OURS and not _is_there(results, group):
                ahead.take(contestants)
            benchmark.skipped = True
            pytest.skip("compiled only")
        limit = request.config.option.stop_after
        if not _is_there(results, group):
            if limit is not None and time.monotonic() - begun > limit:
                benchmark.skipped = request.session.stopped = True
                pytest.skip(f"not begun {limit:g} s into the run")
            if request.config.option.rounds:
                options["rounds"] = request.config.option.rounds
            if request.node.get_closest_marker("rotate"):
                options["again"] = contestants
            outcomes = _outcomes(results, group, contestants, names, device, options)
            place = request.node.nodeid.partition("[")[0]
            _record(results, group, place, about, outcomes)
            if not answers(device):
                pytest.exit(f"the device does not answer after {group}", returncode=DEAD)
        _play(results, group, contestant, benchmark)

    return enter


def _is_there(results: Journal, group: str) -> bool:
    return any(entry["group"] == group for entry in results["benchmarks"] + results["failed"])


def _outcomes(
    results: Journal, group: str, contestants: Callable[[], dict], names: list[str], device: torch.device, options: dict
) -> dict[str, Outcome]:
    """Measure a group. If this ended the process twice before, that is what is recorded of its contestants."""
    if sum(begun["group"] == group for begun in results["begun"]) >= 2:
        return dict.fromkeys(names, Outcome(wrong="the process ended while the group was measured, twice"))
    results.add(begun=[{"group": group}])
    torch.manual_seed(0)
    try:
        outcomes = duel(contestants(), device=device, **options)
    except Exception as error:  # it comes from what all contestants share
        traceback.print_exc()
        return dict.fromkeys(names, Outcome(wrong=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
    return {name: outcomes.get(name, Outcome(absent=f"does not run on {device.type}")) for name in names}


def _record(results: Journal, group: str, place: str, about: dict, outcomes: dict[str, Outcome]) -> None:
    """Write the entries of a group, all at once."""
    entries, failed = [], []
    ours = outcomes[OURS].median if outcomes[OURS].seconds else None
    for name, outcome in outcomes.items():
        facts = {**about, "contestant": name}
        if not outcome.seconds:
            reason = {"wrong": outcome.wrong} if outcome.wrong else {"absent": outcome.absent}
            failed.append({"group": group, "extra_info": facts, **reason})
            continue
        stats = Stats()
        for seconds in outcome.seconds:
            stats.update(seconds)
        facts |= {
            "median_ms": outcome.median * 1e3,
            "warm_ms": statistics.median(outcome.warm) * 1e3 if outcome.warm else None,
            "ratio": outcome.median / ours if ours else None,
            "peak_bytes": outcome.peak_bytes,
            "graph": outcome.graph,
            "nodes": outcome.nodes,
        }
        entry = {"group": group, "fullname": f"{place}[{group.partition(': ')[2]}, {name}]", "extra_info": facts}
        entry |= {"name": entry["fullname"].rpartition("::")[2], "params": None, "param": None, "options": {}}
        entries.append({**entry, "stats": {**stats.as_dict(), "data": stats.data, "iterations": 1}})
    results.add(benchmarks=entries, failed=failed)


def _play(results: Journal, group: str, contestant: str, benchmark) -> None:
    """Play what was recorded of a contestant back to pytest-benchmark."""

    def is_own(entry: dict) -> bool:
        return entry["group"] == group and entry["extra_info"]["contestant"] == contestant

    for entry in filter(is_own, results["failed"]):
        benchmark.skipped = True
        pytest.fail(entry["wrong"]) if "wrong" in entry else pytest.skip(entry["absent"])
    (entry,) = filter(is_own, results["benchmarks"])
    benchmark.group = group
    benchmark.extra_info.update(entry["extra_info"])
    CLOCK.replay(benchmark, tuple(entry["stats"]["data"]))
