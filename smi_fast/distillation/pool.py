"""The pool of images that a student learns from, and the models that read its patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from smi_fast.backbones.conversion import as_backbone
from smi_fast.backbones.vit import AcceleratedViT
from smi_fast.data.sparse import InvertedDataset, Sample, normalize_patches
from smi_fast.grid import PatchGrid
from smi_fast.packed import PackedTokens


class Reader:
    """A model that takes patches with pixels in [0, 1], and normalises them itself.

    Args:
        model: a model that `Inverter` takes.
        image_size: (H, W) in pixels of the images that the patches come from.
        patch_size: (height, width) in pixels of the patches. None: the model's. A model with other patches, such as a
            CNN, whose only patch is the image, takes all patches of an image or none.

    Attributes:
        heads: the layers that turn features into logits, which linear probing trains. Empty if they are not known.

    Raises:
        UnsupportedModelError: see `Inverter`.
        ValueError: the model does not take images of this size.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], patch_size: tuple[int, int] | None = None):
        self.fast = as_backbone(model, image_size=image_size)
        self.device, self.grid = self.fast.device, self.fast.grid(image_size)
        self.given = PatchGrid.of(image_size, patch_size or self.grid.patch_size)
        self.mean, self.std = self.fast.mean, self.fast.std
        heads = self.fast.get_classifier() if isinstance(self.fast, AcceleratedViT) else ()
        # A model with a distillation token has two heads, whose logits are averaged.
        self.heads = nn.ModuleList(heads if isinstance(heads, tuple) else [heads])

    def __call__(self, tokens: PackedTokens) -> Tensor:
        """Return the logits (B, classes) of a batch that `InvertedDataset.collate` has made."""
        patches = normalize_patches(tokens.to(self.device), self.mean, self.std)
        return self.fast.outputs(self.given.recut(patches, self.grid), grid_size=self.grid.size).logits

    @torch.no_grad()
    def features(self, forward: Callable[[], Tensor]) -> Tensor:
        """Return the inputs of the heads while `forward` runs the model: (B, heads, C) float32."""
        given: list[Tensor] = []
        hooks = [head.register_forward_pre_hook(lambda _, args: given.append(args[0])) for head in self.heads]
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(given, 1).float()

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes) of `features` (B, heads, C)."""
        return sum(head(x) for head, x in zip(self.heads, features.unbind(1), strict=True)) / len(self.heads)


class Pool:
    """All images so far, with the results that are computed once for each of them.

    An image has two views, itself and its mirror image. For each view the pool holds the teacher's `logits` (views, N,
    classes) and, with linear probing, the `features` (views, N, heads, C) that the student's heads take. Without linear
    probing the whole student changes, so it reads the patches again in every step.

    Args:
        teacher, student: the models.
        mirror: makes the mirror image of a sample. None: images are not mirrored and have one view.
        linear_probing: whether only the student's heads are trained.
        batch_size: the number of images in a batch.
    """

    def __init__(
        self,
        teacher: Reader,
        student: Reader,
        mirror: Callable[[Sample], Sample] | None,
        linear_probing: bool,
        batch_size: int,
    ):
        self.teacher, self.student, self.mirror = teacher, student, mirror
        self.linear_probing, self.batch_size = linear_probing, batch_size
        self.samples: list[list[Sample]] = []  # the views of each image; empty with linear probing
        self.logits = torch.empty(2 if mirror else 1, 0, teacher.fast.num_classes, device=teacher.device)
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return self.logits.shape[1]

    @torch.no_grad()
    def add(self, images: Dataset) -> None:
        """Add images, given as samples of an `InvertedDataset`."""
        logits, features = [self.logits], [] if self.features is None else [self.features]
        for first in range(0, len(images), self.batch_size):
            samples = [images[number] for number in range(first, min(first + self.batch_size, len(images)))]
            views = [samples, [self.mirror(sample) for sample in samples]] if self.mirror else [samples]
            tokens = [InvertedDataset.collate(view)[0] for view in views]
            logits.append(torch.stack([self.teacher(view) for view in tokens]).float())
            if self.linear_probing:
                read = [self.student.features(lambda view=view: self.student(view)) for view in tokens]
                features.append(torch.stack(read))
            else:
                self.samples += map(list, zip(*views, strict=True))
        self.logits = torch.cat(logits, 1)
        self.features = torch.cat(features, 1) if features else None

    def draw(self, steps: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each step the indices (B,) of images and the indices (B,) of their views, in shuffled passes over
        all images."""
        size = min(self.batch_size, len(self))
        passes = -(-steps * size // len(self))
        index = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(passes)])[: steps * size]
        view = torch.randint(len(self.logits), index.shape, generator=generator)
        return zip(*(drawn.to(self.logits.device).split(size) for drawn in (index, view)), strict=True)

    def student_logits(self, index: Tensor, view: Tensor) -> Tensor:
        """Return the student's logits (B, classes) of the views that `draw` has drawn, with gradients."""
        if self.linear_probing:
            return self.student.logits(self.features[view, index])
        samples = [self.samples[i][v] for i, v in zip(index.tolist(), view.tolist(), strict=True)]
        return self.student(InvertedDataset.collate(samples)[0])
