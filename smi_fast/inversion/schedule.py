"""StoppingSchedule: when patches stop, and how many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smi_fast.backbones.pruning import Mass, kept_count


class StoppingSchedule:
    """The iterations at which patches stop, and the fraction of the remaining patches that stops at each.

    `StoppingSchedule({50: 0.3, 100: 0.3})` stops 30 % of the patches at iteration 50 and 30 % of the rest at iteration
    100. If a fraction r of n patches stops, int(n * (1 - r)) go on (Sparse Model Inversion, Sec. 4.2).

    Args:
        stops: maps an iteration to the fraction in (0, 1) that stops, or to a `Mass` of attention that goes on. With
            `Mass`, images can keep different numbers of patches. Iterations count from 0 and must increase. The first
            possible one is 1, because the attention comes from the iteration before.

    Raises:
        TypeError, ValueError: an iteration is not an integer or is below 1, iterations do not increase, or a fraction
            is outside (0, 1).
    """

    PAPER = ((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3))
    PAPER_ITERATIONS = 4000

    def __init__(self, stops: Mapping[int, float | Mass] | Sequence[tuple[int, float | Mass]]):
        pairs = list(stops.items()) if isinstance(stops, Mapping) else [tuple(pair) for pair in stops]
        previous = 0
        for iteration, fraction in pairs:
            if isinstance(iteration, bool) or not isinstance(iteration, int):
                raise TypeError(f"a stopping iteration is an integer, got {iteration!r}")
            if iteration < 1:
                raise ValueError(f"nothing can be stopped at iteration {iteration}: the first possible one is 1")
            if iteration <= previous:
                raise ValueError(f"stopping iterations must increase, got {iteration} after {previous}")
            if not isinstance(fraction, Mass) and not 0 < fraction < 1:
                raise ValueError(f"the fraction stopped at iteration {iteration} must lie in (0, 1), got {fraction}")
            previous = iteration
        self.stops: dict[int, float | Mass] = {
            iteration: stop if isinstance(stop, Mass) else float(stop) for iteration, stop in pairs
        }

    @classmethod
    def parse(cls, text: str, iterations: int = PAPER_ITERATIONS) -> StoppingSchedule:
        """Read "50:0.3,100:0.3", "50:0.3,100:mass=0.9", "paper" (scaled to `iterations`) or "dense".

        Raises:
            ValueError: the text is none of these. The message names the part that is wrong.
        """
        if text.strip() == "dense":
            return cls.dense()
        if text.strip() == "paper":
            return cls.paper(iterations)
        pairs = []
        for part in text.split(","):
            iteration, _, fraction = part.partition(":")
            try:
                name, equals, share = fraction.partition("=")
                stop = Mass(float(share)) if equals and name.strip() == "mass" else float(fraction)
                pairs.append((int(iteration), stop))
            except ValueError:
                raise ValueError(
                    f"cannot read {part!r} in the stopping schedule {text!r}: "
                    "expected ITERATION:FRACTION, like 50:0.3, or ITERATION:mass=SHARE"
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
            ValueError: a stopping leaves none of the `num_patches` patches.
        """
        counts, count = {}, num_patches
        for iteration, fraction in self.stops.items():
            kept = None if count is None or isinstance(fraction, Mass) else kept_count(count, fraction)
            if kept == 0:
                raise ValueError(
                    f"the schedule {self} leaves no patch: at iteration {iteration} it stops {fraction:g} of {count}"
                )
            counts[iteration] = count = kept
        return counts

    def __str__(self) -> str:
        stops = (f"{at}:{stop if isinstance(stop, Mass) else f'{stop:g}'}" for at, stop in self.stops.items())
        return ",".join(stops) or "dense"

    def __repr__(self) -> str:
        return f"StoppingSchedule({self.stops})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoppingSchedule) and list(self.stops.items()) == list(other.stops.items())

    def __hash__(self) -> int:
        return hash(tuple(self.stops.items()))


def as_schedule(stopping: StoppingSchedule | Mapping[int, float | Mass] | str, iterations: int) -> StoppingSchedule:
    """Return a schedule unchanged, or make one from a mapping or a text. The text "paper" is scaled to `iterations`.

    Raises:
        TypeError, ValueError: the argument is none of these, or see `StoppingSchedule` and its `parse`.
    """
    if isinstance(stopping, StoppingSchedule):
        return stopping
    if isinstance(stopping, str):
        return StoppingSchedule.parse(stopping, iterations)
    if isinstance(stopping, (Mapping, Sequence)):
        return StoppingSchedule(stopping)
    raise TypeError(f"stopping must be a StoppingSchedule, a mapping of iterations or a text, got {stopping!r}")
