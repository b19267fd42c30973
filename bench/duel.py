"""Times contestants in turn, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.inversion.graphs import capture, side_stream

OURS = "smi-fast"
SECONDS = {"cpu": 2.0, "cuda": 0.15}  # for all rounds of a group
ROUNDS = {"cpu": (7, 200), "cuda": (11, 31)}  # the least and the most that each contestant has
Call = Callable[[], object]
Measure = Callable[[Call], Sequence[float]]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Round:
    """One round of a contestant. `comparable` makes its outputs comparable with the first contestant's, by taking the
    padding out, say. It is not timed."""

    call: Call
    comparable: Callable[..., Outputs] = lambda *outputs: outputs


@dataclass(frozen=True)
class Outcome:
    """What was measured of one contestant: the seconds of every round, and the most bytes that tensors held at once.

    `peak_bytes` is None if it was not measured. `graph` says whether a round was the replay of a CUDA graph. It is None
    if that was not tried. A contestant without times says in `absent` why it did not run, or in `wrong` what it
    computed wrongly.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    graph: bool | None = None
    absent: str = ""
    wrong: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def duel(
    contestants: dict[str, Call | Round | str],
    *,
    device: torch.device,
    tolerance: float | None = None,
    rounds: int | None = None,
    memory: bool = True,
    measure: Measure | None = None,
) -> dict[str, Outcome]:
    """Check the contestants against each other, warm them up, and time single rounds of all of them in turn.

    Each round starts with another contestant, so that none always runs behind the same neighbour. On a GPU a round is
    captured as a CUDA graph where it can be, and its replay is checked like the round itself and timed in its place:
    kernels of a few microseconds would otherwise wait for the host that launches them.

    Args:
        contestants: for each name one round of it, or a sentence that says why it cannot run here. If the first round
            of any but the first contestant raises, that contestant is absent with the error's message.
        device: where the contestants compute.
        tolerance: a round returns a tensor or a tuple of tensors. They may differ from those of the first contestant by
            at most this, relative to the largest value. None compares nothing.
        rounds: how many are timed of each. None takes as many as SECONDS allow, within ROUNDS.
        memory: whether to measure the peak too, in one more round of each.
        measure: runs a round and returns its seconds, one or several. None is a stopwatch for the device, and on a GPU
            rounds become graphs.

    Raises:
        AssertionError: the replay of the first contestant computes something else than its round.
    """
    capture = device.type == "cuda" and measure is None
    measure = measure or stopwatch(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # frees what the graphs of the last group held
    outcomes: dict[str, Outcome] = {}
    running: dict[str, Call] = {}
    reference = None
    with without_gc():
        for name, contestant in contestants.items():
            if isinstance(contestant, str):
                outcomes[name] = Outcome(absent=contestant)
                continue
            one = contestant if isinstance(contestant, Round) else Round(contestant)
            try:
                output = one.comparable(*_detached(one.call()))
                peak = peak_bytes(one.call, device) if memory else None
                replay = captured(one.call) if capture else None
            except Exception as error:
                if reference is None:
                    raise
                outcomes[name] = Outcome(absent=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                continue
            first, reference = reference is None, output if reference is None else reference
            try:
                if tolerance is not None:
                    check(name, output, reference, tolerance)
                    if replay:
                        check(f"{name}, replayed", one.comparable(*replay()), reference, tolerance)
            except AssertionError as error:
                if first:
                    raise
                outcomes[name] = Outcome(wrong=str(error))
                continue
            outcomes[name] = Outcome(peak_bytes=peak, graph=bool(replay) if capture else None)
            running[name] = replay or one.call
        times = _in_turn(running, measure, rounds, device)
    for name, seconds in times.items():
        outcomes[name] = Outcome(tuple(seconds), outcomes[name].peak_bytes, outcomes[name].graph)
    return outcomes


def _in_turn(
    running: dict[str, Call], measure: Measure, rounds: int | None, device: torch.device
) -> dict[str, list[float]]:
    if rounds is None:
        started = time.perf_counter()
        for call in running.values():
            measure(call)
        least, most = ROUNDS[device.type]
        rounds = int(SECONDS[device.type] / max(time.perf_counter() - started, 1e-9))
        rounds = max(least, min(most, rounds))
    times: dict[str, list[float]] = {name: [] for name in running}
    order = list(running)
    for number in range(rounds):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            times[name].extend(measure(running[name]))
    return times


def check(name: str, output: Outputs, reference: Outputs, tolerance: float) -> None:
    """Raise AssertionError unless `output` is `reference` up to `tolerance` times the largest value of each tensor."""
    assert len(output) == len(reference), f"{name} returns {len(output)} tensors, expected {len(reference)}"
    for number, (ours, theirs) in enumerate(zip(reference, output, strict=True)):
        assert theirs.shape == ours.shape, f"{name}: output {number} is {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        error = (theirs.double() - ours.double()).abs().max() / ours.double().abs().max()
        assert error <= tolerance, f"{name}: output {number} is off by {error:.1e}, more than {tolerance:.1e}"


def _detached(output: object) -> Outputs:
    if output is None:
        return ()
    return tuple(tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,)))


def captured(call: Call) -> Callable[[], Outputs] | None:
    """Capture one round as a CUDA graph.

    Args:
        call: the round. What it reads has to stay where it is in memory.

    Returns:
        A function that replays the graph and returns the outputs, which every replay overwrites. None if the round
        cannot be captured, because it waits for the device, say.
    """
    outputs: list[Outputs] = []
    with side_stream(torch.device("cuda", torch.cuda.current_device())):
        call()  # lets libraries set up what they keep for each stream
        try:
            graph = capture(lambda: outputs.append(_detached(call())), torch.cuda.graph_pool_handle())
        except RuntimeError:
            return None

    def replay() -> Outputs:
        graph.replay()
        return outputs[0]

    return replay


def stopwatch(device: torch.device) -> Measure:
    """A function that measures the seconds of one call.

    On CUDA it measures the device's time between two events. Before them it writes so much memory that nothing useful
    is left in the L2 cache and the host gets ahead of the device, as Triton's own benchmarks do."""

    def on_host(call: Call) -> list[float]:
        started = time.perf_counter()
        call()
        return [time.perf_counter() - started]

    if device.type != "cuda":
        return on_host
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def on_device(call: Call) -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3]

    return on_device


def ceilings(device: torch.device, *, copied: int = 2**32, side: int = 8192) -> dict[str, float]:
    """The best that the device reaches: the bytes a second that a large copy reads and writes, and the floating-point
    operations a second of a large bfloat16 matrix product."""
    measure = stopwatch(device)
    source = torch.randint(0, 127, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy, product = (
        statistics.median(second for _ in range(11) for second in measure(call))
        for call in (lambda: target.copy_(source), lambda: a @ b)
    )
    return {"bytes_per_second": 2 * copied / copy, "flops_per_second": 2 * side**3 / product}


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that the tensors of one call hold at once. Tensors that were there before do not count."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def without_gc():
    """Let no garbage be collected in the middle of a round. Only young objects are collected before, because a full
    collection would take longer than many groups of kernels."""
    enabled = gc.isenabled()
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
