"""The loop on torch's CUDA path, with a runtime that computes nothing: graphs, streams, devices, memory."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakecuda_cases import fake_cuda, needs_fake_cuda

FOLDER = Path(__file__).parent / "fakecuda"
STOPS, ITERATIONS = (8, 16), 24
# The iterations of each stage that may be replayed: those beside a stopping see the plain view and measure attention.
STAGES, OF_TWO_RESOLUTIONS = ((0, 7), (9, 15), (17, ITERATIONS)), ((0, 12), (12, ITERATIONS))
pytestmark = needs_fake_cuda


@dataclass(frozen=True)
class Event:
    kind: str  # kernel, copy, fill, wait, replay or note
    device: str
    stream: str
    capture: int  # 0: none
    name: str


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that has the runtime in the place of CUDA's."""
    return fake_cuda(tmp_path_factory.mktemp("fakecuda"))


@pytest.fixture
def play(environment, tmp_path):
    """A scenario's findings, and the events of the runtime."""

    def play(scenario: str, device: str = "cuda:0") -> tuple[dict, list[Event]]:
        log = tmp_path / "log"
        command = [sys.executable, FOLDER / "scenarios.py", scenario, log, device]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        events = []
        for line in log.read_text().splitlines():
            kind, device, stream, capture, name = line.split("\t", 4)
            events.append(Event(kind, device, stream, 0 if capture == "-" else int(capture), name))
        return json.loads(run.stdout), events

    return play


def iterations_of(events: list[Event]) -> list[list[Event]]:
    """The events of each iteration but the first, which the notes after iterations separate."""
    ends = [number for number, event in enumerate(events) if event.kind == "note" and event.name.isdigit()]
    return [events[start + 1 : end] for start, end in itertools.pairwise(ends)]


def split(events: list[Event], note: str) -> list[list[Event]]:
    parts = [[]]
    for event in events:
        if event.kind == "note" and event.name == note:
            parts.append([])
        else:
            parts[-1].append(event)
    return parts


def replayed(iteration: list[Event]) -> bool:
    return any(event.kind == "replay" for event in iteration)


def launches(iteration: list[Event]) -> list[Event]:
    """What an iteration gives the GPU to do; what a capture records runs in replays only."""
    return [event for event in iteration if event.kind in ("kernel", "copy", "fill", "replay") and not event.capture]


def check_replays(events: list[Event], stages: tuple[tuple[int, int], ...] = STAGES) -> None:
    """Every stage is captured and replayed: two graphs each, of as many nodes as an iteration has without."""
    iterations = [[], *iterations_of(events)]
    assert len(iterations) == ITERATIONS
    for first, end in stages:  # the first with each of two image batches run as they are
        usual, replays = iterations[first + 1], iterations[first + 2 : end]
        nodes = {event.name for iteration in replays for event in iteration if event.kind == "replay"}
        assert nodes == {str(len(launches(usual)))}
        assert not replayed(usual)
        # torch writes the seed and the offset of its random numbers before some replays.
        assert all(len(launches(iteration)) <= 3 for iteration in replays)
        assert len(launches(replays[-1])) == 1
    captures = {event.capture for iteration in iterations for event in iteration if event.capture}
    assert len(captures) == 2 * len(stages)


def check_waits(events: list[Event], starts: tuple[int, ...] = STOPS) -> None:
    """The host waits for the device where a stage starts and in a capture, and nowhere else."""
    for number, iteration in enumerate(iterations_of(events), start=1):
        if number not in starts and not any(event.capture for event in iteration):
            assert not [event for event in iteration if event.kind == "wait"], number


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_every_stage_is_replayed_on_one_side_stream(play, device):
    _, events = play("stages", device)
    streams = set()
    for run in split(events, "next run"):
        check_replays(run)
        used = [event for iteration in iterations_of(run) for event in iteration]
        assert {event.device for event in used} == {device[-1]}
        assert {event.kind for event in used if event.stream == "0"} <= {"wait"}
        streams |= {event.stream for event in used}
    assert len(streams - {"0"}) == 1


def test_nothing_waits_for_the_device_within_a_stage(play):
    _, events = play("stages")
    for run in split(events, "next run")[::2]:  # a user's own loss may wait
        check_waits(run)


def test_every_method_is_replayed_and_waits_for_nothing_within_a_stage(play):
    """psaq, Rebirth, the published mode, and a CNN in two resolutions with a schedule of the learning rate."""
    _, events = play("methods")
    *runs, cnn = split(events, "next run")
    assert len(runs) == 3
    for run in runs:
        check_replays(run)
        check_waits(run)
    check_replays(cnn, OF_TWO_RESOLUTIONS)
    check_waits(cnn, (12,))
    names = {event.name for event in runs[0] if event.capture}
    assert {f"_{name}_kernel" for name in ("unit", "range", "sum", "entropy", "backward")} <= names


def test_a_run_that_goes_on_from_a_checkpoint_is_replayed_and_waits_for_nothing_within_a_stage(play):
    """It was stopped in the middle of the second stage, after iteration 12."""
    found, events = play("long_run")
    assert found == {"checkpoints": ["00000.state"], "images": 4}
    before, after = (iterations_of(part) for part in split(events, "next run"))
    assert (len(before), len(after)) == (12, 10)
    for number, iteration in [*enumerate(before, start=1), *enumerate(after, start=14)]:
        between = number in STOPS or number + 1 in (*STOPS, ITERATIONS)  # figures and pictures of a stage are taken
        if not between and not any(event.capture for event in iteration):
            assert not [event for event in iteration if event.kind == "wait"], number
    # After the first iteration, 13, the second one runs as it is, too, and then there are graphs.
    assert [number for number, iteration in enumerate(after, start=14) if replayed(iteration)] == [*range(19, 24)]
    assert {event.stream for iteration in after for event in iteration if event.capture} == {"1"}


def test_a_streams_graphs_outlast_a_refill_and_only_its_checks_wait(play):
    """Two images finish and are replaced, and then the batch shrinks to one slot."""
    _, events = play("stream")
    notes = [number for number, event in enumerate(events) if event.kind == "note"]
    marks = [number for number in notes if events[number].name != "check"]
    assert len(notes) - len(marks) == 4
    spans = [(events[end].name, events[start + 1 : end]) for start, end in itertools.pairwise(marks)]
    iterations = {int(name): span for name, span in spans if name.isdigit()}
    assert list(iterations) == list(range(8, 28))
    assert [number for number, span in iterations.items() if not replayed(span)] == [8, 9, 23, 24]
    captures = {number: {event.capture for event in span} - {0} for number, span in iterations.items()}
    assert [number for number, found in captures.items() if found] == [10, 11, 25, 26]
    assert len(set.union(*captures.values())) == 4
    checked, after_checks = {12, 17, 22, 27}, {8, 13, 18, 23}  # the latter begin with a refill or a smaller batch
    for number in iterations.keys() - checked - after_checks - {10, 11, 25, 26}:
        assert not [event for event in iterations[number] if event.kind == "wait"], number


def test_memory_stays_flat_over_stages_and_runs(play):
    models, _ = play("memory")
    for found in models.values():
        first, *others = found["reserved"]
        assert max(others) <= 1.1 * first  # the allocator's segments may be cut otherwise
        assert max(found["reserved"]) <= 1.3 * found["peak"]


def test_a_failed_capture_is_said_and_harms_nothing_later(play):
    found, events = play("failed_capture")
    assert found["warnings"]
    assert all("without a CUDA graph" in warning for warning in found["warnings"])
    assert found["sync_debug_mode"] == 0
    first, *others = split(events, "again")
    assert not any(event.kind == "replay" for event in first)
    assert len(iterations_of(first)) == ITERATIONS - 1
    for run in others:
        check_replays(run)
    assert found["reserved"][2] <= 1.1 * found["reserved"][0]


def test_threads_do_not_record_each_others_work(play):
    _, events = play("threads")
    nodes = Counter(event.name for event in events if event.kind == "replay")
    assert len(nodes) == 2
    assert len(set(nodes.values())) == 1


def test_an_iteration_is_a_few_nodes_and_none_of_them_fills_copies_or_casts(play):
    """Of a loop in bfloat16. A block is 8 products, and 8 kernels of ours around them."""
    found, events = play("nodes")
    for name, counts in found.items():
        blocks = 12 if "12 blocks" in name else 3
        assert set(counts) == {36 + 16 * (blocks - 1)}, name
    captured = [event for event in events if event.capture and event.kind != "wait"]
    assert captured
    assert {event.kind for event in captured} == {"kernel"}
    assert not [event.name for event in captured if "FillFunctor" in event.name or "copy_kernel_cuda" in event.name]
