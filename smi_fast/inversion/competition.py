"""competition(): the term of adaptive DeepInversion, for images on which a teacher and a student disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.backbones.base import Backbone, Outputs
from smi_fast.backbones.conversion import as_backbone
from smi_fast.grid import PatchGrid
from smi_fast.inversion.objectives import Objective
from smi_fast.packed import PackedTokens

if TYPE_CHECKING:
    from smi_fast.inversion.inverter import Inverter

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one number per channel each


@dataclass(frozen=True, repr=False)
class competition:
    """Another objective, and beside it the competition with a student of adaptive DeepInversion (Yin et al., CVPR 2020,
    Eq. 6 and 7): objective + weight * (1 - clamp(J, 0, 1)).

    J is the Jensen-Shannon divergence of the class probabilities of the student and of the inverted model, see
    `jensen_shannon`. Gradients flow through both models, so that the images become such that the two disagree. The
    student sees what the inverted model sees: through the same view, without stopped patches, in its own normalisation.

    If the objective has norm="image", each image has a term of its own, and the terms are added up. Otherwise J is the
    mean over the batch, as published.

    Args:
        objective: an objective with a method `loss`, such as `deep_inversion()`. Its features and its prior are used.
        student: a model that `Inverter` takes, with the classes of the inverted model. A run freezes it, and restores
            it afterwards. Images of which patches are stopped need a student with the same patches.
        weight: the weight of the term. The paper takes 0.2 for ImageNet and 10 for CIFAR-10.
        js: "published" or "exact", see `jensen_shannon`.
        temperature: the temperature of both softmaxes.

    Raises:
        ValueError: a number is out of range, or `js` is neither of the two.
        TypeError: the objective has no method `loss`.
        UnsupportedModelError: the student is no model that can be inverted.
    """

    objective: Objective
    student: nn.Module
    weight: float = 0.2
    js: str = "published"
    temperature: float = 3.0

    def __post_init__(self):
        if not isinstance(self.objective, Objective) or isinstance(self.objective, type):
            raise TypeError(f"competition takes an objective with a method loss, got {self.objective!r}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be at least 0 and finite, got {self.weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.js not in DIVERGENCES:
            raise ValueError(f"js must be one of {', '.join(DIVERGENCES)}, got {self.js!r}")
        object.__setattr__(self, "student", as_backbone(self.student))

    def __repr__(self) -> str:
        settings = f"weight={self.weight}, js={self.js!r}, temperature={self.temperature}"
        return f"competition({self.objective}, {type(self.student).__name__}, {settings})"

    def __getattr__(self, name: str) -> Any:
        """Return what the objective has under this name, such as its features and its prior."""
        if name.startswith("__") or "objective" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.objective, name)

    @property
    def models(self) -> tuple[Backbone, ...]:
        """The models that `loss` runs beside the inverted one."""
        return self.student, *getattr(self.objective, "models", ())

    def check(self, inverter: Inverter) -> None:
        """Check that the student fits an inversion.

        Raises:
            ValueError: the student has other classes or channels, is on another device, does not take images of this
                size, or cannot see images without their stopped patches.
        """
        getattr(self.objective, "check", lambda inverter: None)(inverter)
        student, model = self.student, inverter.backbone
        for what in ("num_classes", "num_channels", "device"):
            ours, theirs = getattr(student, what), getattr(model, what)
            if ours != theirs:
                raise ValueError(f"the student's {what} is {ours}, the inverted model's is {theirs}")
        grid = student.grid(inverter.image_size)
        if grid != inverter.grid and inverter.stopping.stops:
            sizes = ["{}x{}".format(*each.patch_size) for each in (grid, inverter.grid)]
            raise ValueError(
                f"the student takes patches of {sizes[0]} pixels and the inverted model of {sizes[1]}: such a student "
                'needs whole images, so use stopping="dense"'
            )
        for factor in inverter.pooling.values():
            student.grid([side // factor for side in inverter.image_size])

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the objective's loss and the term of the competition."""
        grid = self.student.grid(outputs.grid.image_size)
        student = self.student.outputs(self._seen(outputs, grid), grid_size=grid.size).logits
        student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, outputs.logits))
        divergence = jensen_shannon(student / self.temperature, teacher / self.temperature, self.js)
        if getattr(self.objective, "norm", None) != "image":
            divergence = divergence.mean()
        return self.objective.loss(outputs, targets) + self.weight * (1 - divergence.clamp(0, 1)).sum()

    def _seen(self, outputs: Outputs, grid: PatchGrid) -> PackedTokens:
        """Return the pixels that the inverted model was given, as the student takes them."""
        patches = outputs.grid.recut(outputs.patches, grid)
        values = renormalised(patches.values, (outputs.mean, outputs.std), (self.student.mean, self.student.std))
        return replace(patches, values=values.to(self.student.patch_dtype))


def renormalised(pixels: Tensor, given: Normalisation, wanted: Normalisation) -> Tensor:
    """Map pixels (T, C * ph * pw), normalised by one mean and std, to those of another. A CUDA graph can hold this."""
    if given == wanted:
        return pixels
    channels = pixels.to(torch.promote_types(pixels.dtype, torch.float32)).unflatten(1, (len(given[0]), -1)).unbind(1)
    mapped = [
        x * (std / to_std) + (mean - to_mean) / to_std
        for x, mean, std, to_mean, to_std in zip(channels, *given, *wanted, strict=True)
    ]
    return torch.stack(mapped, 1).flatten(1)


def jensen_shannon(student: Tensor, teacher: Tensor, js: str = "exact") -> Tensor:
    """Compute the Jensen-Shannon divergence of P = softmax(student) and Q = softmax(teacher) for each image.

    With M = (P + Q) / 2, "exact" is (KL(P || M) + KL(Q || M)) / 2, which is at most ln 2. "published" is what the code
    of Yin et al. computes: (KL(M || P) + KL(M || Q)) / 2, after P, Q and M are clamped to [0.01, 0.99]. It exceeds 1,
    so that the term has no gradient, where the two are sure of different classes.

    Args:
        student, teacher: logits (B, classes), divided by the temperature.

    Returns:
        (B,).
    """
    return DIVERGENCES[js](student, teacher)


def _exact(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    m = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - m) + q.exp() * (q - m)).sum(1) / 2


def _published(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.softmax(1), teacher.softmax(1)
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    return (m * (2 * m.log() - p.log() - q.log())).sum(1) / 2


DIVERGENCES = {"published": _published, "exact": _exact}
