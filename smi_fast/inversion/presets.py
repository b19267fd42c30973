"""The settings of an inversion for each model, once, for Python and for every command."""

from __future__ import annotations

from dataclasses import dataclass

from smi_fast.models.loading import MODEL_INSIDE


@dataclass(frozen=True)
class InversionSettings:
    """How long an inversion is, and how strong."""

    iterations: int
    lr: float  # Adam's step size
    tv_l2: float  # the weight of total variation


PAPER = InversionSettings(iterations=4000, lr=0.25, tv_l2=1e-4)
# A small model of small images is sure sooner, and needs a smoother prior and smaller steps.
DEMO = InversionSettings(iterations=600, lr=0.1, tv_l2=1e-3)


def settings_of(model: str) -> InversionSettings:
    """The settings for a model of this name: the demo's for the model inside, the paper's for any other."""
    return DEMO if model == MODEL_INSIDE else PAPER
