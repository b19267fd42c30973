"""The settings of each method, which Python code, all commands and the studies share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.objectives import Objective, deep_inversion, deep_inversion_cnn
from smi_fast.inversion.psaq import psaq
from smi_fast.inversion.schedule import LearningRate, RebirthSchedule, StoppingSchedule, WarmupCosine, as_schedule
from smi_fast.inversion.until import Until
from smi_fast.inversion.views import Views
from smi_fast.models import CNN_INSIDE, MODEL_INSIDE

SMALL = 64  # images of fewer pixels a side have the settings for CIFAR-10
PSAQ_JITTER = (15, 30)  # pixels, in the first and in the second half of the iterations


def psaq_views(iterations: int, generator: torch.Generator) -> Tensor:
    """Draw the views of PSAQ-ViT's published code: the same shift along both axes, of up to 15 pixels in the first half
    of the iterations and up to 30 in the second one, and a mirror with probability 1/2. (iterations, 3) int32."""
    limits = torch.full((iterations,), PSAQ_JITTER[0])
    limits[iterations // 2 :] = PSAQ_JITTER[1]
    shifts = torch.floor(torch.rand(iterations, generator=generator) * (2 * limits + 1)) - limits
    flips = torch.rand(iterations, generator=generator) < 0.5
    return torch.stack((shifts, shifts, flips), 1).int()


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
      first of the two stoppings. It selects patches by attention only and has no `Mass`, no `Release` and no stream.

    Other habits of that code are habits of every run: one view for the batch, drawn as `random_views` says; the plain
    view in the iteration that measures attention and in the one that stops patches; a clamp after each step; norms over
    the whole batch; and the last images as the result. Two habits of its files are never copied: 8 bits that are cut
    off and not rounded, and values of exactly 0 in normalised space that become black.
    """

    objective: Objective = field(default_factory=deep_inversion)
    iterations: int = 4000
    lr: float = 0.25  # Adam's step size, in normalised pixel space
    betas: tuple[float, float] = (0.5, 0.99)  # of Adam
    lr_schedule: LearningRate | None = None  # factors of the step size
    jitter: float | int = 1 / 8  # largest shift of a view, as a share of the image's side or in pixels
    flip: float = 0.5  # probability that a view is mirrored
    views: Views | None = None  # draws the views instead
    pooling: Mapping[int, int] = field(default_factory=dict)  # from which iterations the model sees smaller images
    clamp: bool = True  # whether pixels stay in the range of real images
    stopping: StoppingSchedule | RebirthSchedule | str = "paper"  # when patches stop, as `Inverter` takes it
    until: Until | float | None = None  # when an image is finished before the last iteration
    published: bool = False  # do what the published code does with stopped patches

    @property
    def schedule(self) -> StoppingSchedule:
        """When patches stop. The text "paper" stands for the published schedule, scaled to `iterations`."""
        return as_schedule(self.stopping, self.iterations)

    def inverter(self, model: nn.Module, **options) -> Inverter:
        """Make an `Inverter` of the model with these settings. `options` are further arguments of `Inverter`."""
        own = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return Inverter(model, **own | {"stopping": self.schedule} | options)

    def replaced(self, values: Mapping[str, Any]) -> InversionSettings:
        """Return the settings with other values, by the names of settings of the run or of its objective. If the number
        of iterations changes, the iterations at which the resolution changes and a `WarmupCosine` are scaled with it.

        Raises:
            ValueError: neither has a setting of this name, or a value is out of range.
        """
        own, of_objective = {setting.name for setting in fields(self)}, {}
        for name in set(values) - own:
            if name not in {setting.name for setting in fields(self.objective)}:
                raise ValueError(f"the objective {type(self.objective).__name__} has no setting {name}")
            of_objective[name] = values[name]
        settings = replace(self, **{name: value for name, value in values.items() if name in own})
        scale = settings.iterations / self.iterations
        if scale != 1 and "pooling" not in values:
            starts = {round(start * scale): factor for start, factor in self.pooling.items()}
            settings = replace(settings, pooling={at: f for at, f in starts.items() if at < settings.iterations})
        if scale != 1 and "lr_schedule" not in values and isinstance(self.lr_schedule, WarmupCosine):
            settings = replace(settings, lr_schedule=self.lr_schedule.scaled(scale))
        return replace(settings, objective=replace(self.objective, **of_objective)) if of_objective else settings

    def record(self) -> dict:
        """Return the settings for a report, as values that JSON can hold."""
        return {setting.name: _recorded(getattr(self, setting.name)) for setting in fields(self)} | {
            "stopping": str(self.schedule)
        }


def _recorded(value: Any) -> Any:
    if is_dataclass(value):
        return {"name": type(value).__name__} | {name: _recorded(part) for name, part in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _recorded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return list(value)
    return getattr(value, "__name__", str(value)) if callable(value) else value


PAPER = InversionSettings()
# A small model of small images becomes sure of its targets sooner, and needs a stronger prior and smaller steps.
DEMO = InversionSettings(deep_inversion(tv_l2=1e-3), iterations=600, lr=0.1)
# DeepInversion (Yin et al., CVPR 2020): the published command for ImageNet, and the paper's settings for CIFAR-10.
IMAGENET_CNN = InversionSettings(
    deep_inversion_cnn(),
    iterations=3000,
    betas=(0.5, 0.9),
    lr_schedule=WarmupCosine(100),
    jitter=30,
    pooling={0: 2, 2000: 1},
    stopping="dense",
)
CIFAR10_CNN = InversionSettings(
    deep_inversion_cnn(batch_norm=10.0, first_batch_norm=1.0, tv_l2=2.5e-5, l2=0.0, l2_norm="batch"),
    iterations=2000,
    lr=0.05,
    betas=(0.9, 0.999),
    jitter=2,
    flip=0.0,
    clamp=False,
    stopping="dense",
)
# The statistics of a few images are farther from those of the training set than those of the published batch of 256.
# A smaller weight of them leaves room for the classes, and a stronger prior smooths the images.
CNN_DEMO = InversionSettings(
    deep_inversion_cnn(batch_norm=1.0, first_batch_norm=1.0, tv_l2=1e-2, l2=0.0),
    iterations=600,
    lr=0.1,
    betas=(0.5, 0.9),
    lr_schedule=WarmupCosine(50),
    jitter=2,
    stopping="dense",
)
# PSAQ-ViT (Li et al., ECCV 2022), its published code. The learning rate begins anew in the second half, Adam does not.
PSAQ = InversionSettings(
    psaq(), iterations=1000, lr=0.2, betas=(0.5, 0.9), lr_schedule=WarmupCosine(100, 500), views=psaq_views,
    stopping="dense",
)  # fmt: skip
OBJECTIVES = ("deep_inversion", "deep_inversion_cnn", "psaq")


def settings_of(name: str, model: nn.Module, objective: str | None = None) -> InversionSettings:
    """Return the settings of a method for a model.

    Args:
        name: the model's name. The ViT and the CNN in this package have settings for a demonstration.
        model: the model. A CNN for images of fewer than 64 pixels a side has the settings for CIFAR-10.
        objective: one of OBJECTIVES. None: "deep_inversion" for a ViT, "deep_inversion_cnn" for any other model.

    Raises:
        ValueError: the objective is unknown.
    """
    if objective is None:
        objective = "deep_inversion" if isinstance(model, VisionTransformer) else "deep_inversion_cnn"
    if objective == "deep_inversion":
        return DEMO if name == MODEL_INSIDE else PAPER
    if objective == "psaq":
        return PSAQ
    if objective != "deep_inversion_cnn":
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if name == CNN_INSIDE:
        return CNN_DEMO
    small = min(resolve_data_config(model=model)["input_size"][1:]) < SMALL
    return CIFAR10_CNN if small else IMAGENET_CNN
