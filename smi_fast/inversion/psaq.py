"""PSAQ-ViT's objective: images whose patches differ as those of photographs do, on which a model can be calibrated."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.backbones.base import Outputs
from smi_fast.inversion.objectives import classification
from smi_fast.inversion.priors import total_variation
from smi_fast.kernels import MAX_HEAD_DIM, patch_entropy
from smi_fast.kernels.patch_entropy import check_density
from smi_fast.kernels.pixels import NEIGHBOURS, pixel_pairs
from smi_fast.seeds import check_seed

PUBLISHED_TV = 2500.0, 3000.0  # the bounds of the total variation of 32 images of 3 x 224 x 224
PUBLISHED_ROOTS = [math.sqrt(32 * 3 * (224 - dy) * (224 - abs(dx))) for dy, dx in NEIGHBOURS]


@dataclass(frozen=True)
class psaq:
    """The loss of PSAQ-ViT (Li et al., ECCV 2022, and its published code): cross-entropy + tv |TV - V| - the sum over
    blocks of the entropy of the similarities between an image's patches.

    Where patches are stopped, all terms run over those that are left: an image of K patches has K x K similarities, and
    TV and V take the pairs of pixels of which both are left.

    Args:
        entropy: weight of the entropies of all blocks' attention outputs before the projection, each the mean of
            `kernels.patch_entropy` over the images.
        classification: weight of the cross-entropy, the mean over the images. Targets may be soft labels.
        tv: weight of the distance between the total variation TV of the images as the model sees them and its target V.
        tv_target: decides V, whatever the number and the size of the images. It is the sum over the four directions of
            the root mean square difference between neighbours in normalised space, if that is the same in all of them:
            V is tv_target / 4 times the sum over directions of sqrt(number of differences). None: drawn by `seed` so
            that V is uniform from 2500 to 3000 for 32 images of 3 x 224 x 224, as published; from 1.14 to 1.37.
        seed: draws the target, which stays the same in all iterations.
        bandwidth, points, diagonal: see `kernels.patch_entropy`. A diagonal is 1 / K of an image's similarities.

    Raises:
        ValueError: a number is out of range. The message names it.
        TypeError: the seed is not an integer.
    """

    entropy: float = 1.0
    classification: float = 1.0
    tv: float = 0.05
    tv_target: float | None = None
    seed: int = 0
    bandwidth: float = 0.01
    points: int = 10
    diagonal: bool = True

    def __post_init__(self):
        weights = {"entropy": self.entropy, "classification": self.classification, "tv": self.tv}
        for name, value in (weights | {"tv_target": self.target}).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        check_density(self.bandwidth, self.points)

    @property
    def features(self) -> tuple[str, ...]:
        """The places in the model that the loss reads."""
        return ("heads",) if self.entropy else ()

    @property
    def target(self) -> float:
        """The given or drawn `tv_target`."""
        if self.tv_target is not None:
            return self.tv_target
        return random.Random(check_seed(self.seed)).uniform(*PUBLISHED_TV) * 4 / sum(PUBLISHED_ROOTS)

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Return the scalar to minimise. The targets are (B,) int64 or soft labels (B, classes).

        Raises:
            ValueError: the model gives no attention outputs, or without the diagonal, images have a single patch.
        """
        loss = self.classification * classification(outputs, targets, "mean")
        if self.entropy:
            loss = loss - self.entropy * self.entropies(outputs).sum()
        if self.tv:
            images, kept = outputs.seen()
            images = images.to(torch.promote_types(images.dtype, torch.float32))
            distance = total_variation(images, kept) - self.target * mean_root_of_pairs(images, kept)
            loss = loss + self.tv * distance.abs()
        return loss

    def entropies(self, outputs: Outputs) -> Tensor:
        """Return the entropy of each block's patch similarities, (blocks,), on average over the images."""
        blocks = [tokens for name, tokens in outputs.features.items() if name.endswith(".heads")]
        if not blocks:
            raise ValueError("the model gives no attention outputs, whose patch entropy psaq maximises")
        if not self.diagonal and outputs.patches is not None and outputs.patches.max_seqlen < 2:
            raise ValueError("images of a single patch have no pairs of patches without the diagonal")
        options = {"bandwidth": self.bandwidth, "points": self.points, "diagonal": self.diagonal}
        backend = outputs.backend if blocks[0].values.shape[-1] <= MAX_HEAD_DIM else "auto"  # which has no limit
        found = [
            patch_entropy(x.values, x.positions, x.cu_seqlens, x.max_seqlen, **options, backend=backend) for x in blocks
        ]
        return torch.stack(found).mean(1)


def mean_root_of_pairs(images: Tensor, kept: Tensor) -> Tensor:
    """Return the mean over four directions of sqrt(number of differences that `total_variation` takes the norm of), a
    scalar on the device.

    Args:
        images: (B, C, H, W).
        kept: (B, 1, H, W) bool, the pixels that are kept.
    """
    pairs = [torch.logical_and(*pixel_pairs(kept, dy, dx)).sum() for dy, dx in NEIGHBOURS]
    return (torch.stack(pairs) * images.shape[1]).to(images.dtype).sqrt().mean()
