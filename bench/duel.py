"""Times contestants in turn, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from floors import OURS
from nodes import counted
from smi_fast.kernels.linear import can_pack, linear
from torch import Tensor

from smi_fast.inversion.graphs import capture, side_stream

SECONDS = {"cpu": 2.0, "cuda": 0.15}  # for all rounds of a group
ROUNDS = {"cpu": (7, 200), "cuda": (11, 31)}  # the least and the most that each contestant has
CALLS = 16  # calls in one timed graph at most, because a graph of one kernel costs 2 to 3 us beside the kernel
LONG = 1e-3  # seconds: a call that takes longer is timed alone
FLUSHED = 256 * 2**20  # bytes that are read to empty the L2 cache
ROTATED = 4 * 2**30, 0.5  # at most so many bytes, and seconds to set up, go into further inputs of a group
CEILING_SECONDS = 0.25  # for each product and the copy that ceilings are taken of
Call = Callable[[], object]
Measure = Callable[[Call], Sequence[float]]
Outputs = tuple[Tensor, ...]
Figures = dict[str, Callable[[], Sequence[float]]]  # by name, what takes one round of a figure


@dataclass(frozen=True)
class Round:
    """One round of a contestant. `comparable` makes its outputs comparable with the first contestant's, by taking the
    padding out, say. It is not timed."""

    call: Call
    comparable: Callable[..., Outputs] = lambda *outputs: outputs


@dataclass(frozen=True)
class Outcome:
    """The measurements of one contestant.

    `seconds` are those of a call, one for each round. On a GPU the caches hold nothing of the call's inputs before it;
    `warm` are those of calls that follow each other on the same inputs, and empty where that was not measured.
    `peak_bytes` is the most that tensors held at once, None if it was not measured. `graph` says whether a round was
    the replay of a CUDA graph, None if that was not tried, and `nodes` how many nodes the graph of a call has. A
    contestant without times says in `absent` why it did not run, or in `wrong` what it did wrongly.
    """

    seconds: tuple[float, ...] = ()
    warm: tuple[float, ...] = ()
    peak_bytes: int | None = None
    graph: bool | None = None
    nodes: int | None = None
    absent: str = ""
    wrong: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


Contestants = dict[str, "Call | Round | str"]


def as_round(contestant: Call | Round) -> Round:
    return contestant if isinstance(contestant, Round) else Round(contestant)


def duel(
    contestants: Contestants,
    *,
    device: torch.device,
    tolerance: float | None = None,
    rounds: int | None = None,
    memory: bool = True,
    measure: Measure | None = None,
    again: Callable[[], Contestants] | None = None,
) -> dict[str, Outcome]:
    """Check the contestants against each other, warm them up, and time single rounds of all of them in turn.

    Each round starts with another contestant, so that none always runs behind the same neighbour. On a GPU a round is
    a CUDA graph of several calls where it can be captured, because kernels of a few microseconds would otherwise wait
    for the host that launches them. Its replay is checked like the call itself.

    A contestant that fails ends nothing: its outcome says how it failed, and the others are timed. The first of those
    that run is what the others are compared with.

    Args:
        contestants: for each name one call of it, or a sentence that says why it cannot run here. If the first call of
            smi-fast raises, it is `wrong`; a peer that raises is `absent`.
        device: where the contestants compute.
        tolerance: a call returns a tensor or a tuple of tensors. They may differ from those of the reference by at
            most this, relative to the largest value. None compares nothing.
        rounds: how many are timed of each. None takes as many as SECONDS allow, within ROUNDS.
        memory: whether to measure the peak too, in one more call of each.
        measure: runs a call and returns its seconds, one or several. None is a stopwatch for the device, and on a GPU
            rounds become graphs.
        again: makes the same contestants on further inputs. A graph has a call for each of them, so that none finds its
            inputs in the caches. Without it, a graph for the cold figure has one call.
    """
    graphs = device.type == "cuda" and measure is None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # frees what the graphs of the last group held
    outcomes: dict[str, Outcome] = {}
    running: dict[str, Figures] = {}
    sets = [contestants]
    if graphs and again is not None:
        sets += further(again)
    reference, broken = None, ""
    with without_gc():
        for name, contestant in contestants.items():
            if broken or isinstance(contestant, str):
                outcomes[name] = Outcome(absent=contestant if isinstance(contestant, str) else broken)
                continue
            try:
                one, *others = (as_round(each[name]) for each in sets)
                with counted() as nodes:
                    output = one.comparable(*_detached(one.call()))
                peak = peak_bytes(one.call, device) if memory else None
                expected = output if reference is None else reference
                if tolerance is not None:
                    check(name, output, expected, tolerance)
                if graphs:
                    outcome, running[name] = _on_gpu(name, one, others, expected, tolerance)
                else:
                    outcome = Outcome(nodes=nodes[-1] if nodes else None)
                    running[name] = {"seconds": partial(measure or on_host, one.call)}
                outcomes[name], reference = replace(outcome, peak_bytes=peak), expected
            except Exception as error:
                traceback.print_exc()
                outcomes[name] = _failure(name, error)
                if not answers(device):
                    broken = f"not run, because the device did not answer after {name}"
        if broken:
            return outcomes | {name: Outcome(absent=broken) for name in running}
        times = _in_turn(running, rounds, device)
    return {name: replace(outcome, **times.get(name, {})) for name, outcome in outcomes.items()}


def _failure(name: str, error: Exception) -> Outcome:
    """A peer may lack what it needs. Ours must run, and nobody may compute something else."""
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, AssertionError):
        return Outcome(wrong=reason)
    reason = f"{type(error).__name__}: {reason}"
    return Outcome(wrong=reason) if name == OURS else Outcome(absent=reason)


def answers(device: torch.device) -> bool:
    """Whether the device still works. After a kernel that read where it must not, nothing does in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def further(again: Callable[[], Contestants]) -> list[Contestants]:
    """The same contestants on other inputs, as often as a graph has calls or ROTATED allows."""
    most, seconds = ROTATED
    sets: list[Contestants] = []
    started, before = time.perf_counter(), torch.cuda.memory_allocated()
    while len(sets) < CALLS - 1 and time.perf_counter() - started < seconds:
        sets.append(again())
        held = torch.cuda.memory_allocated() - before
        if held * (len(sets) + 1) > most * len(sets):  # one more would be too much
            break
    return sets


def _on_gpu(
    name: str, one: Round, others: list[Round], reference: Outputs, tolerance: float | None
) -> tuple[Outcome, Figures]:
    """How a contestant is timed on a GPU: as graphs, or without if it cannot be captured.

    Args:
        others: the same as `one` on other inputs.

    Raises:
        AssertionError: a replay computes something else than the reference.
    """
    pool = torch.cuda.graph_pool_handle()  # the contestant's graphs share it, because one runs at a time
    with counted() as nodes:
        single = captured([one.call], pool)
    if single is None:
        return Outcome(graph=False), figures([one.call], [one.call], None)
    if tolerance is not None:
        check(f"{name}, replayed", one.comparable(*single()), reference, tolerance)
    found = Outcome(graph=True, nodes=nodes[-1] if nodes else None)
    if on_device(single) > LONG:
        return found, figures([single], [single])
    # A call on inputs that another has read would not be cold, so that there is one for each set of inputs.
    return found, figures([one.call, *(other.call for other in others)], [one.call] * CALLS, pool)


def figures(cold: list[Call], warm: list[Call], pool: tuple[int, int] | None = None) -> Figures:
    """Two figures of a call on a GPU: behind an emptied L2 cache, and behind the same call. Calls are captured together
    if a pool of memory for graphs is given.

    The cache is emptied by reading, because what a write leaves there has to be written back in the time of the call.
    """
    counts = {"seconds": len(cold), "warm": len(warm)}
    runs = {"seconds": _together(cold, pool), "warm": _together(warm, pool)}

    def take(figure: str) -> list[float]:
        (flush if figure == "seconds" else runs[figure])()
        return [on_device(runs[figure]) / counts[figure]]

    return {"seconds": lambda: take("seconds"), "warm": lambda: take("warm")}


def _together(calls: list[Call], pool: tuple[int, int] | None) -> Call:
    """One function that makes all calls: a graph if there is a pool for it.

    Raises:
        RuntimeError: the calls cannot be captured together.
    """
    if pool is not None:
        replay = captured(calls, pool)
        if replay is None:
            raise RuntimeError(f"{len(calls)} calls cannot be captured in one graph")
        return replay

    def run() -> None:
        for call in calls:
            call()

    return run


def _in_turn(
    running: dict[str, Figures], rounds: int | None, device: torch.device
) -> dict[str, dict[str, tuple[float, ...]]]:
    """The seconds of each contestant's figures."""
    if rounds is None:
        started = time.perf_counter()
        for one in running.values():
            for take in one.values():
                take()
        least, most = ROUNDS[device.type]
        rounds = int(SECONDS[device.type] / max(time.perf_counter() - started, 1e-9))
        rounds = max(least, min(most, rounds))
    times = {name: {figure: [] for figure in one} for name, one in running.items()}
    order = list(running)
    for number in range(rounds if order else 0):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            for figure, take in running[name].items():
                times[name][figure].extend(take())
    return {name: {figure: tuple(taken) for figure, taken in one.items()} for name, one in times.items()}


def check(name: str, output: Outputs, reference: Outputs, tolerance: float) -> None:
    """Raise AssertionError unless `output` is `reference` up to `tolerance` times the largest value of each tensor."""
    assert len(output) == len(reference), f"{name} returns {len(output)} tensors, expected {len(reference)}"
    for number, (ours, theirs) in enumerate(zip(reference, output, strict=True)):
        assert theirs.shape == ours.shape, f"{name}: output {number} is {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        error = ((theirs.double() - ours.double()).abs().max() / ours.double().abs().max()).item()
        assert error <= tolerance, f"{name}: output {number} is off by {error:.1e}, more than {tolerance:.1e}"


def _detached(output: object) -> Outputs:
    if output is None:
        return ()
    return tuple(tensor.detach() for tensor in (output if isinstance(output, tuple) else (output,)))


def captured(calls: Sequence[Call], pool: tuple[int, int] | None = None) -> Callable[[], Outputs] | None:
    """Capture calls as one CUDA graph.

    Args:
        calls: what they read has to stay where it is in memory.
        pool: memory for graphs, of which only one may run at a time. None: a pool of its own.

    Returns:
        A function that replays the graph and returns the outputs of the last call, which every replay overwrites. None
        if the calls cannot be captured, because they wait for the device, say.
    """
    outputs: list[Outputs] = []
    with side_stream(torch.device("cuda", torch.cuda.current_device())):
        for call in dict.fromkeys(calls):
            call()  # lets libraries set up what they keep for each stream

        def run() -> None:
            for call in calls:
                outputs[:] = [_detached(call())]

        try:
            graph = capture(run, pool or torch.cuda.graph_pool_handle())
        except RuntimeError:
            return None

    def replay() -> Outputs:
        graph.replay()
        return outputs[0]

    return replay


def on_host(call: Call) -> list[float]:
    """The seconds of a call by the host's clock."""
    started = time.perf_counter()
    call()
    return [time.perf_counter() - started]


def on_device(call: Call) -> float:
    """The seconds that the current CUDA device takes for a call, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def flush() -> None:
    """Let the current CUDA device read so much that nothing useful is left in its L2 cache. The host gets ahead of the
    device meanwhile."""
    torch.cuda.synchronize()
    _filler(torch.cuda.current_device()).sum()


@cache
def _filler(index: int) -> Tensor:
    return torch.ones(FLUSHED // 4, device=torch.device("cuda", index))


def ceilings(device: torch.device, *, copied: int = 2**32, side: int | None = None) -> dict[str, float | dict]:
    """The best that the device reaches: the floating-point operations a second of a large matrix product in each dtype,
    by whichever of torch's and our way is faster, and on a GPU the bytes a second that a large copy reads and writes.
    """
    cuda = device.type == "cuda"
    side = side or (8192 if cuda else 1024)
    take = on_device if cuda else lambda call: on_host(call)[0]

    def best(call: Call) -> float:
        call()
        started, times = time.perf_counter(), [take(call)]
        while time.perf_counter() - started < CEILING_SECONDS:
            times.append(take(call))
        return min(times)

    found: dict[str, float | dict] = {}
    if cuda:
        source = torch.randint(0, 127, (copied,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        found["bytes_per_second"] = 2 * copied / best(lambda: target.copy_(source))
        del source, target
    rates = found["flops_per_second"] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        ways = [lambda a=a, b=b: a @ b.t()]
        if can_pack(dtype, device):
            ways.append(lambda a=a, b=b: linear(a, b))
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / min(map(best, ways))
    return found


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
