"""The settings of each method, which Python code, all commands and the studies share."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.objectives import deep_inversion
from smi_fast.inversion.schedule import StoppingSchedule, as_schedule
from smi_fast.models import MODEL_INSIDE


@dataclass(frozen=True)
class InversionSettings:
    """The settings of an inversion. The defaults are those of Sparse Model Inversion (Hu et al., ICML 2024).

    With `published`, a run does what the authors' code does where that differs from the paper and from this package:
    - A patch that has stopped goes on moving, against Sec. 4.2 of the paper. The priors run over the whole image, and
      Adam moves every pixel, at first by its momentum. Where a view shifts the window of a kept patch over a stopped
      one, the stopped pixels also get the gradient of the classification loss.
    - The result holds other patches than those that the loop has kept to its end. They are chosen from all patches by
      their attention in the finished images, which the model is given in [0, 1] and not normalised.
    - One patch more is chosen than the loop keeps. The schedule's fractions are multiplied and rounded once, and the
      class token counts: 47 patches of 196 in the paper's schedule, where the loop ends with 46. A run that ends early
      or never stops a patch has the loop's patches.
    - Schedules that stop patches in two iterations in a row are refused, because the published code would leave out the
      first of the two stoppings. It selects patches by attention only, and it stops no `Mass`.

    Other habits of that code are habits of every run: one view for the batch, drawn as `random_views` says; the plain
    view in the iteration that measures attention and in the one that stops patches; a clamp after each step; norms over
    the whole batch; and the last images as the result. Two habits of its files are never copied: 8 bits that are cut
    off and not rounded, and values of exactly 0 in normalised space that become black.
    """

    iterations: int = 4000
    lr: float = 0.25  # Adam's step size, in normalised pixel space
    betas: tuple[float, float] = (0.5, 0.99)  # of Adam
    tv_l2: float = 1e-4  # weight of the total variation prior
    l2: float = 0.0  # weight of the l2 prior
    norm: str = "batch"  # the norms of the priors run over the "batch", as published, or over each "image"
    jitter: float = 1 / 8  # largest shift of a view, as a share of the image's side
    flip: float = 0.5  # probability that a view is mirrored
    stopping: StoppingSchedule | str = "paper"  # when patches stop, as `Inverter` takes it
    published: bool = False  # do what the published code does with stopped patches

    @property
    def schedule(self) -> StoppingSchedule:
        """When patches stop. The text "paper" stands for the published schedule, scaled to `iterations`."""
        return as_schedule(self.stopping, self.iterations)

    def inverter(self, model: nn.Module, **options) -> Inverter:
        """Make an `Inverter` of the model with these settings. `options` are further arguments of `Inverter`."""
        return Inverter(
            model,
            stopping=self.schedule,
            objective=deep_inversion(self.tv_l2, self.l2, self.norm),
            iterations=self.iterations,
            lr=self.lr,
            betas=self.betas,
            jitter=self.jitter,
            flip=self.flip,
            published=self.published,
            **options,
        )

    def record(self) -> dict:
        """Return the settings for a report, as values that JSON can hold."""
        return asdict(self) | {"betas": list(self.betas), "stopping": str(self.schedule)}


PAPER = InversionSettings()
# A small model of small images becomes sure of its targets sooner, and needs a stronger prior and smaller steps.
DEMO = InversionSettings(iterations=600, lr=0.1, tv_l2=1e-3)


def settings_of(model: str) -> InversionSettings:
    """Return the settings for a model's name: the demo's for the model in this package, the paper's for any other."""
    return DEMO if model == MODEL_INSIDE else PAPER
