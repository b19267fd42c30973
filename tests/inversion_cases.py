"""What the tests of the inversion share: a small model, and definitions written out pixel by pixel."""

from dataclasses import dataclass

import torch
from torch import nn

from smi_fast import Until
from smi_fast.models import cifar10_vit


def small_model() -> nn.Module:
    """A ViT for images of 8x8 pixels in a grid of 4x4 patches, so that an oracle can be slow."""
    model = cifar10_vit(False, img_size=8, patch_size=2, depth=2, embed_dim=32, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1 / parameter.shape[-1] ** 0.5)
    return model


@dataclass(frozen=True)
class SureOfEven(Until):
    """Images of even classes pass every check, the others none, so that the images of a stream have different ages."""

    def count(self, confident, logits, targets):
        classes = targets.argmax(1) if targets.ndim == 2 else targets
        return [0 if target % 2 else before + 1 for before, target in zip(confident, classes.tolist(), strict=True)]


def grid_mask(keep: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The pixels (B, 1, 8, 8) of the kept patches of a 4x4 grid."""
    mask = torch.zeros(len(keep), 16, dtype=torch.bool)
    for image, row in enumerate(keep):
        mask[image, row] = True
    return mask.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)


def total_variation_by_pairs(images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The total variation over the batch, each pair of neighbouring pixels written out."""
    batch, _, height, width = images.shape
    total = images.new_zeros(())
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = [
            (images[b, :, y, x] - images[b, :, y + dy, x + dx]).square().sum()
            for b in range(batch)
            for y in range(height - dy)
            for x in range(width)
            if 0 <= x + dx < width and kept[b, 0, y, x] and kept[b, 0, y + dy, x + dx]
        ]
        total = total + (torch.stack(squares).sum().sqrt() if squares else 0)
    return total
