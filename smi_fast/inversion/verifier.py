"""Verifier: what another network makes of the images while they are inverted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.backbones.base import frozen
from smi_fast.backbones.conversion import as_backbone
from smi_fast.packed import all_patches


class Verifier:
    """A callback of `Inverter.run` that records the accuracy of another network on the images (Yin et al., CVPR 2020,
    Sec. 4.3). Images that convince only the network that they were inverted from hold little of their class.

    The images are the plain ones in full size, not the view of the iteration, normalised as the verifier wants them.
    Stopped patches are black. The host waits for the device when an accuracy is recorded.

    Args:
        model: a model that `Inverter` takes, with the same classes, on the device of the inversion. Its weights and
            its mode are not changed.
        every: the number of iterations between two records.
        dtype: the dtype of its matrix products, as `accelerate` and `CNN` take it.

    Attributes:
        records: (iteration, accuracy) after every `every` iterations and at the end of a run, where `iteration` counts
            the iterations that are done, and the accuracy is the share of images whose largest logit is their target.
            Several runs add up; `records.clear()` begins anew.

    Raises:
        ValueError: `every` is less than 1. On the first record: the verifier does not take images of this size, or has
            no such class as a target.
        UnsupportedModelError: see `CNN` and `accelerate`.
    """

    def __init__(self, model: nn.Module, every: int = 100, dtype: torch.dtype | None = None):
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.backbone, self.every = as_backbone(model, dtype), every
        self.records: list[tuple[int, float]] = []

    def __call__(self, step: Any) -> None:
        """Record the accuracy after this `Step`, if it is due."""
        done = step.iteration + 1
        if done % self.every == 0 or step.is_last:
            self.record(done, step.images(), step.targets)

    def record(self, done: int, images: Tensor, targets: Tensor) -> None:
        """Record the accuracy on these images after so many iterations, in place of a record of the same iteration.
        There may be several images of each target, as a `Step` and an `InversionResult` return them."""
        if self.records and self.records[-1][0] == done:
            self.records.pop()
        if len(images) > len(targets):  # images that were released earlier, in the order of the targets
            targets = targets.repeat(len(images) // len(targets), *[1] * (targets.ndim - 1))
        self.records.append((done, self.accuracy(images, targets)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, targets: Tensor) -> float:
        """Return the share of images (B, C, H, W) in [0, 1] whose largest logit is their target, (B,) int64 or soft
        labels (B, num_classes)."""
        backbone = self.backbone
        classes = targets.argmax(1) if targets.ndim == 2 else targets
        wrong = int(classes.max())
        if wrong >= backbone.num_classes:
            raise ValueError(f"target {wrong} is no class of the verifier's {backbone.num_classes}")
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (backbone.mean, backbone.std))
        images, grid = (images - mean) / std, backbone.grid(images.shape[-2:])
        every = all_patches(len(images), grid.num_patches, images.device)
        with frozen(backbone):
            logits = backbone.outputs(replace(every, values=grid.gather(images, every)), grid_size=grid.size).logits
        return (logits.argmax(1) == classes).float().mean().item()
