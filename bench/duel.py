"""Contestants timed in turn, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

OURS = "smi-fast"
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 2.0, 7, 200
Call = Callable[[], object]
Measure = Callable[[Call], Sequence[float]]


@dataclass(frozen=True)
class Outcome:
    """What one contestant did: seconds of every round, and the most bytes of tensors that one round held at once.

    `peak_bytes` is None where that was not measured. `absent` says why a contestant did not run; it then has no times.
    """

    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    absent: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def duel(
    contestants: dict[str, Call | str],
    *,
    device: torch.device,
    tolerance: float | None = None,
    rounds: int | None = None,
    memory: bool = True,
    measure: Measure | None = None,
) -> dict[str, Outcome]:
    """Check the contestants against each other, warm them up, and time single rounds of all of them in turn.

    Each round starts with another contestant, so that none always runs behind the same neighbour.

    Args:
        contestants: name -> one round of it, or a sentence that says why it cannot run here. A peer (not the first)
            whose first round raises RuntimeError, ValueError or NotImplementedError is absent with that message.
        tolerance: what a round returns (a tensor, or a tuple of tensors) may differ from what the first contestant
            returns by at most this, relative to the largest value; None: nothing is compared.
        rounds: how many to time of each; None: what SECONDS are enough for, within LEAST_ROUNDS and MOST_ROUNDS.
        memory: measure the peak too, in one more round of each.
        measure: runs a round and returns its seconds, one or several; None: a stopwatch for the device.

    Raises:
        AssertionError: a contestant computes something else than the first.
    """
    measure = measure or stopwatch(device)
    outcomes = {name: Outcome(absent=call) for name, call in contestants.items() if isinstance(call, str)}
    running = {name: call for name, call in contestants.items() if not isinstance(call, str)}
    reference = None
    for number, (name, call) in enumerate(list(running.items())):
        try:
            output = _detached(call())
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if number == 0:
                raise
            outcomes[name] = Outcome(absent=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            del running[name]
            continue
        reference = output if number == 0 else reference
        if tolerance is not None:
            check(name, output, reference, tolerance)
    if rounds is None:
        started = time.perf_counter()
        for call in running.values():
            measure(call)
        rounds = int(SECONDS / max(time.perf_counter() - started, 1e-9))
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds))
    times: dict[str, list[float]] = {name: [] for name in running}
    order = list(running)
    with without_gc():
        for number in range(rounds):
            turn = number % len(order)
            for name in order[turn:] + order[:turn]:
                times[name].extend(measure(running[name]))
    for name, call in running.items():
        outcomes[name] = Outcome(tuple(times[name]), peak_bytes(call, device) if memory else None)
    return {name: outcomes[name] for name in contestants}


def check(name: str, output: tuple[Tensor, ...], reference: tuple[Tensor, ...], tolerance: float) -> None:
    """Raise AssertionError unless `output` is `reference` up to `tolerance` times the largest value of each tensor."""
    assert len(output) == len(reference), f"{name} returns {len(output)} tensors, expected {len(reference)}"
    for number, (ours, theirs) in enumerate(zip(reference, output, strict=True)):
        assert theirs.shape == ours.shape, f"{name}: output {number} is {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        error = (theirs.double() - ours.double()).abs().max() / ours.double().abs().max()
        assert error <= tolerance, f"{name}: output {number} is off by {error:.1e}, more than {tolerance:.1e}"


def _detached(output: object) -> tuple[Tensor, ...]:
    if output is None:
        return ()
    return tuple(tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,)))


def stopwatch(device: torch.device) -> Measure:
    """Seconds of one call. CUDA: of the device, between two events behind a write that leaves nothing in its L2 cache
    and gives the host a start, as Triton's own benchmarks do."""

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


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that tensors made during one call hold at once; what lay there before does not count."""
    gc.collect()
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
    """No garbage collection in the middle of a round."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
