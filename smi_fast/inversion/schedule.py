"""The schedules of an inversion: when patches stop and how many of them, and how the learning rate changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smi_fast.backbones.pruning import Mass, kept_count

LearningRate = Callable[[int, int], float]  # a factor of the learning rate, by the step and the number of steps


@dataclass(frozen=True)
class Release:
    """A stopping at which the most important patches of each image leave: one of `parts` equal parts. They are a
    finished sparse image, and the others go on (Patch Rebirth Inversion, arXiv 2509.23235, Sec. 3).

    Raises:
        TypeError, ValueError: `parts` is not an integer from 2 on.
    """

    parts: int

    def __post_init__(self):
        if isinstance(self.parts, bool) or not isinstance(self.parts, int):
            raise TypeError(f"the number of parts is an integer, got {self.parts!r}")
        if self.parts < 2:
            raise ValueError(f"a release needs at least 2 parts, of which one leaves, got {self.parts}")

    def leaving(self, count: int) -> int:
        """Return how many of `count` patches leave.

        Raises:
            ValueError: there are fewer patches than parts.
        """
        if count < self.parts:
            raise ValueError(f"{count} patches cannot be released in {self.parts} parts")
        return count // self.parts

    def __str__(self) -> str:
        return f"release={self.parts}"


Stop = float | Mass | Release


class StoppingSchedule:
    """The iterations at which patches stop, and the fraction of the remaining patches that stops at each.

    `StoppingSchedule({50: 0.3, 100: 0.3})` stops 30 % of the patches at iteration 50 and 30 % of the rest at iteration
    100. If a fraction r of n patches stops, int(n * (1 - r)) go on (Sparse Model Inversion, Sec. 4.2).

    Args:
        stops: maps an iteration to the fraction in (0, 1) that stops, to a `Mass` of attention that goes on, or to a
            `Release`. With `Mass`, images can keep different numbers of patches. Iterations count from 0 and must
            increase. The first possible one is 1, because the attention comes from the iteration before.

    Raises:
        TypeError, ValueError: an iteration is not an integer or is below 1, iterations do not increase, or a fraction
            is outside (0, 1).
    """

    PAPER = ((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3))
    PAPER_ITERATIONS = 4000

    def __init__(self, stops: Mapping[int, Stop] | Sequence[tuple[int, Stop]]):
        pairs = list(stops.items()) if isinstance(stops, Mapping) else [tuple(pair) for pair in stops]
        previous = 0
        for iteration, fraction in pairs:
            if isinstance(iteration, bool) or not isinstance(iteration, int):
                raise TypeError(f"a stopping iteration is an integer, got {iteration!r}")
            if iteration < 1:
                raise ValueError(f"nothing can be stopped at iteration {iteration}: the first possible one is 1")
            if iteration <= previous:
                raise ValueError(f"stopping iterations must increase, got {iteration} after {previous}")
            if not isinstance(fraction, (Mass, Release)) and not 0 < fraction < 1:
                raise ValueError(f"the fraction stopped at iteration {iteration} must lie in (0, 1), got {fraction}")
            previous = iteration
        self.stops: dict[int, Stop] = {
            iteration: stop if isinstance(stop, (Mass, Release)) else float(stop) for iteration, stop in pairs
        }

    @property
    def images_per_target(self) -> int:
        """How many sparse images a run makes for each target: one, and one more for each `Release`."""
        return 1 + sum(isinstance(stop, Release) for stop in self.stops.values())

    @classmethod
    def parse(cls, text: str, iterations: int = PAPER_ITERATIONS) -> StoppingSchedule:
        """Read "50:0.3,100:0.3", "50:0.3,100:mass=0.9", "50:release=4", "paper" (scaled to `iterations`), "rebirth=4"
        (see `RebirthSchedule`) or "dense".

        Raises:
            ValueError: the text is none of these. The message names the part that is wrong.
        """
        if text.strip() == "dense":
            return cls.dense()
        if text.strip() == "paper":
            return cls.paper(iterations)
        name, _, releases = text.strip().partition("=")
        if name == "rebirth" and releases.strip().isdecimal():
            return RebirthSchedule(int(releases)).stopping(iterations)
        pairs = []
        for part in text.split(","):
            iteration, _, fraction = part.partition(":")
            try:
                pairs.append((int(iteration), _read_stop(fraction)))
            except ValueError:
                raise ValueError(
                    f"cannot read {part!r} in the stopping schedule {text!r}: "
                    "expected ITERATION:FRACTION, like 50:0.3, or ITERATION:mass=SHARE, or ITERATION:release=PARTS"
                ) from None
        return cls(pairs)

    @classmethod
    def paper(cls, iterations: int = PAPER_ITERATIONS) -> StoppingSchedule:
        """Return the published schedule, 50:0.3,100:0.3,200:0.3,300:0.3 of 4000 iterations, scaled to `iterations`.

        Scaled iterations are rounded up and kept apart by at least one.
        """
        stops, previous = [], 0
        for iteration, fraction in cls.PAPER:
            previous = max(previous + 1, -(-iteration * iterations // cls.PAPER_ITERATIONS))
            stops.append((previous, fraction))
        return cls([(iteration, fraction) for iteration, fraction in stops if iteration < iterations])

    @classmethod
    def dense(cls) -> StoppingSchedule:
        """Return the schedule that never stops a patch."""
        return cls({})

    def patches(self, num_patches: int) -> dict[int, int | None]:
        """Map each stopping to the number of patches that an image keeps from there on. From the first `Mass` on, the
        number is None, because it depends on the image.

        Raises:
            ValueError: a stopping leaves none of the `num_patches` patches, or a release has more parts than patches.
        """
        counts, count = {}, num_patches
        for iteration, fraction in self.stops.items():
            if count is None or isinstance(fraction, Mass):
                kept = None
            elif isinstance(fraction, Release):
                kept = count - fraction.leaving(count)
            else:
                kept = kept_count(count, fraction)
            if kept == 0:
                raise ValueError(
                    f"the schedule {self} leaves no patch: at iteration {iteration} it stops {fraction:g} of {count}"
                )
            counts[iteration] = count = kept
        return counts

    def __str__(self) -> str:
        stops = (f"{at}:{f'{stop:g}' if isinstance(stop, float) else stop}" for at, stop in self.stops.items())
        return ",".join(stops) or "dense"

    def __repr__(self) -> str:
        return f"StoppingSchedule({self.stops})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoppingSchedule) and list(self.stops.items()) == list(other.stops.items())

    def __hash__(self) -> int:
        return hash(tuple(self.stops.items()))


def _read_stop(text: str) -> Stop:
    """Read "0.3", "mass=0.9" or "release=4"."""
    name, equals, value = text.partition("=")
    if equals and name.strip() == "mass":
        return Mass(float(value))
    return Release(int(value)) if equals and name.strip() == "release" else float(text)


@dataclass(frozen=True)
class RebirthSchedule:
    """The schedule of Patch Rebirth Inversion (arXiv 2509.23235, 2025): one run of T iterations makes v disjoint sparse
    images of each target.

    At the iterations k * floor(T / v), k = 1 to v - 1, the most attended patches leave as a finished sparse image, and
    the rest goes on. Each image has a v-th part of the patches.

    Args:
        releases: v, such as 2, 4 or 7, for images of 50, 75 or 86 % sparsity.

    Raises:
        TypeError, ValueError: `releases` is not an integer from 2 on.
    """

    releases: int

    def __post_init__(self):
        Release(self.releases)  # checks the number

    def stopping(self, iterations: int) -> StoppingSchedule:
        """Return the schedule for a run of this many iterations.

        Raises:
            ValueError: there are more releases than iterations.
        """
        length = iterations // self.releases
        if length == 0:
            raise ValueError(f"{self.releases} images cannot be released in {iterations} iterations")
        return StoppingSchedule({k * length: Release(self.releases - k + 1) for k in range(1, self.releases)})

    def __str__(self) -> str:
        return f"rebirth={self.releases}"


@dataclass(frozen=True)
class WarmupCosine:
    """A schedule of the learning rate that rises linearly and then falls as a cosine, as DeepInversion's does (Yin et
    al., CVPR 2020, published code): step t of T has the factor (t + 1) / W while t < W, then
    (1 + cos(pi (t - W) / (T - W))) / 2.

    Args:
        warmup: W, the number of steps in which the rate rises.
        period: T, after which the schedule begins anew. None: the number of steps of the run or, if the resolution
            changes, of each resolution.

    Raises:
        ValueError: a number is out of range.
    """

    warmup: int = 100
    period: int | None = None

    def __post_init__(self):
        if self.warmup < 0 or (self.period is not None and self.period < 1):
            raise ValueError(f"warmup must be at least 0 and period at least 1, got {self.warmup} and {self.period}")

    def scaled(self, scale: float) -> WarmupCosine:
        """Return the schedule for a run of another length, of which it takes the same shares."""
        period = None if self.period is None else max(1, round(self.period * scale))
        return WarmupCosine(round(self.warmup * scale), period)

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor of a step, counted from 0."""
        period = self.period or steps
        step %= period
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (1 + math.cos(math.pi * (step - self.warmup) / (period - self.warmup))) / 2


def as_schedule(
    stopping: StoppingSchedule | RebirthSchedule | Mapping[int, Stop] | str, iterations: int
) -> StoppingSchedule:
    """Return a schedule unchanged, or make one from a mapping or a text. The texts "paper" and "rebirth=4" and a
    `RebirthSchedule` are scaled to `iterations`.

    Raises:
        TypeError, ValueError: the argument is none of these, or see `StoppingSchedule` and its `parse`.
    """
    if isinstance(stopping, StoppingSchedule):
        return stopping
    if isinstance(stopping, RebirthSchedule):
        return stopping.stopping(iterations)
    if isinstance(stopping, str):
        return StoppingSchedule.parse(stopping, iterations)
    if isinstance(stopping, (Mapping, Sequence)):
        return StoppingSchedule(stopping)
    raise TypeError(f"stopping must be a StoppingSchedule, a mapping of iterations or a text, got {stopping!r}")
