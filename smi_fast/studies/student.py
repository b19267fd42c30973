"""Student: the model that all transfers of a comparison teach, by linear probing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cached_property

from torch import Tensor, nn

from smi_fast.backbones.base import frozen
from smi_fast.backbones.vit import AcceleratedViT
from smi_fast.data.labelled import accuracy
from smi_fast.distillation import Reader, distill

Batches = Iterable[tuple[Tensor, Tensor]]


class Student:
    """A student. Each transfer teaches a copy of it.

    Only the heads of the copies learn, so their inputs for the test images are computed once.

    Args:
        model: the student. It stays as it is.
        teacher: the model that teaches.
        test: returns the batches of test images, preprocessed for the student.
    """

    def __init__(self, model: nn.Module, teacher: AcceleratedViT, test: Callable[[], Batches]):
        self.model, self.teacher, self.test = model, teacher, test

    def copy(self) -> nn.Module:
        """Return a copy of the model, for a transfer."""
        return copy.deepcopy(self.model)

    def learn(self, seed: int, student: nn.Module | None = None, **settings) -> list[float]:
        """Teach a copy, given or new, and return its test accuracy after each round, in %. `settings` are those of
        `distill`, which also say what the images are."""
        settings |= {"evaluate": self.accuracy, "progress": False}
        result = distill(self.teacher, student or self.copy(), seed=seed, **settings)
        if result.interrupted:
            raise KeyboardInterrupt
        return [100 * finished.accuracy for finished in result.history]

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.model, self.teacher.image_size)

    def accuracy(self, student: nn.Module) -> float:
        """Return the share of the test images that a copy recognises."""
        return accuracy(Reader(student, self.teacher.image_size).logits, self._test_features, progress=False)

    @cached_property
    def _test_features(self) -> list[tuple[Tensor, Tensor]]:
        fast, device = self.reader.fast, self.reader.device
        with frozen(fast):
            return [
                (self.reader.features(lambda images=images: fast(images.to(device))), labels)
                for images, labels in self.test()
            ]
