"""Inverter: turns noise into images of a class, on fewer and fewer patches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.backbones.base import Backbone
from smi_fast.backbones.cnn import CNN
from smi_fast.backbones.conversion import as_backbone
from smi_fast.backbones.pruning import Mass
from smi_fast.inversion.checks import (
    check_functions,
    check_jitter,
    check_normalization,
    check_numbers,
    check_pooling,
    check_start,
    check_targets,
    check_verifier,
    check_views,
    check_weights,
)
from smi_fast.inversion.loop import Loop
from smi_fast.inversion.objectives import Loss, Objective, as_loss, deep_inversion, deep_inversion_cnn, features_of
from smi_fast.inversion.priors import ImagePrior, PixelLoss
from smi_fast.inversion.progress import Bar
from smi_fast.inversion.published import check_published
from smi_fast.inversion.result import InversionResult, NonFiniteError, Step, finished
from smi_fast.inversion.schedule import LearningRate, RebirthSchedule, Stop, StoppingSchedule, as_schedule
from smi_fast.inversion.selection import Scores, check_strategy
from smi_fast.inversion.state import InversionState, Stage
from smi_fast.inversion.stream import Slots, check_streams
from smi_fast.inversion.until import Until, as_until
from smi_fast.inversion.verifier import Verifier
from smi_fast.inversion.views import Views, random_views
from smi_fast.seeds import check_seed

__all__ = ["InversionResult", "Inverter", "NonFiniteError", "Stage", "Step"]


class Inverter:
    """Sparse model inversion of a timm ViT (Hu et al., ICML 2024).

    Pixels are optimised with Adam until the model is sure of each image's target class. At each stopping the class
    token's attention in the last block picks the patches that go on. The others leave the forward and the backward pass
    and keep their pixels for good.

    Args:
        model: a timm model that `accelerate` takes, an `AcceleratedViT`, a CNN with BatchNorm2d (timm's, torchvision's
            or another), or another `Backbone`. While `run` runs, it is in evaluation mode and its weights are frozen.
            Both are restored afterwards.
        stopping: when patches are stopped: a `StoppingSchedule`, a `RebirthSchedule`, a mapping such as {50: 0.3}, or a
            text that `StoppingSchedule.parse` reads. "paper" is the paper's schedule, {50: 0.3, 100: 0.3, 200: 0.3,
            300: 0.3} of 4000 iterations, scaled to the number of iterations. None: "paper", or "dense" if the model
            sees an image as a single patch, as CNNs do.
        objective: the loss of the model's outputs: `deep_inversion(...)`, a function of (logits, images, targets), or
            an `Objective`. None: `deep_inversion()`, or `deep_inversion_cnn()` for a CNN.
        prior: the loss of the pixels: an `ImagePrior`, or a function of (images, kept) with images (B, C, H, W) in the
            model's normalised space and kept (B, 1, H, W) bool, the pixels that are still inverted. None: the
            objective's own prior, such as that of `deep_inversion`, if it has one.
        select: which patches go on at a stopping: "attention" (the most important ones), "lowest" (the least important
            ones), "random", or a function of (importance, keep), float32 (T,) and `PackedTokens`, that returns a score
            (T,) for each patch. The patches with the highest scores go on. In a `RebirthSchedule` they are the ones
            that leave as a finished image, with "lowest" the least important ones.
        until: end as soon as the model is sure of all images: an `Until`, or the confidence alone. See also `stream`.
        iterations: the number of optimiser steps.
        lr, betas: the settings of Adam.
        lr_schedule: a function of (step, steps) that returns a factor of the learning rate, such as `WarmupCosine()`.
            None: the learning rate is constant.
        jitter: views are rolled by up to this share of the image's side, a float, or by up to this number of pixels, an
            integer, in either direction.
        flip: the probability that a view is mirrored.
        view_per_image: draw a view for each image, instead of one for the batch as the published code does.
        published: do what the published code does where it differs from the paper. `InversionSettings` lists it.
        views: a function of (iterations, generator) that returns the views (dy, dx, flip), (iterations, 3) integers. It
            takes the place of `jitter` and `flip`.
        pooling: maps iterations to factors: from there on, the model sees means of squares of so many pixels a side, as
            in DeepInversion's lower resolution. {0: 2, 2000: 1} begins at half resolution. Whenever the factor changes,
            Adam and the schedule of the learning rate begin anew. Shifts of a view are multiples of the factor. Only
            for models that take whole images, such as CNNs.
        clamp: after each step, clamp pixels to the range of real images.
        verifier: another network with the same classes, which classifies the images as they are every `verify_every`
            iterations and at the end. It decides nothing; the result has its accuracy.
        image_size: (height, width) in pixels. None: the model's.
        mean, std: the normalisation of images, one number per channel. None: the model's, by timm's data config.
        dtype, backend: arguments for `accelerate`. They cannot be given with a model that is accelerated already.
        compile: fuse the operations around the matrix products with torch.compile, which takes a minute before the
            first iteration.
        graphs: on a GPU, capture an iteration of each stage as a CUDA graph and replay it. The Python code of your own
            loss then runs at most six times per stage, so turn this off if, for example, the loss counts its calls. A
            loss that cannot be captured runs without a graph, and a warning says so. On a CPU, record the operators of
            an iteration and run them again without the model's Python code. That is only done for `deep_inversion` and
            for a model that consists of timm's and torch's modules and has no hooks.
        progress: show a progress bar with iteration, tokens per image and loss.

    Raises:
        ValueError, TypeError: an argument is out of range. The message names it.
        UnsupportedModelError: see `accelerate`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stopping: StoppingSchedule | RebirthSchedule | Mapping[int, Stop] | str | None = None,
        objective: Objective | Loss | None = None,
        prior: ImagePrior | PixelLoss | None = None,
        select: str | Scores = "attention",
        until: Until | float | None = None,
        iterations: int = 4000,
        lr: float = 0.25,
        betas: tuple[float, float] = (0.5, 0.99),
        lr_schedule: LearningRate | None = None,
        jitter: float | int = 1 / 8,
        flip: float = 0.5,
        view_per_image: bool = False,
        published: bool = False,
        views: Views | None = None,
        pooling: Mapping[int, int] | None = None,
        clamp: bool = True,
        verifier: nn.Module | None = None,
        verify_every: int = 100,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        progress: bool = True,
    ):
        check_numbers(iterations, lr, betas, flip, verify_every)
        check_functions(lr_schedule=lr_schedule, views=views)
        self.backbone: Backbone = as_backbone(model, dtype, backend, image_size)
        self.mean, self.std = check_normalization(self.backbone, mean, std)
        self.image_size = tuple(image_size or self.backbone.image_size)
        self.grid = self.backbone.grid(self.image_size)
        if stopping is None:
            stopping = "dense" if self.grid.num_patches == 1 else "paper"
        self.stopping = as_schedule(stopping, iterations)
        if objective is None:
            objective = deep_inversion_cnn() if isinstance(self.backbone, CNN) else deep_inversion()
        self._minimise(objective)
        self.prior = getattr(self.objective, "prior", None) if prior is None else prior
        if not (self.prior is None or isinstance(self.prior, ImagePrior) or callable(self.prior)):
            raise TypeError(f"a prior is an ImagePrior or a function of (images, kept), got {self.prior!r}")
        self.select, self.until = check_strategy(select), as_until(until)
        if select == "lowest" and any(isinstance(stop, Mass) for stop in self.stopping.stops.values()):
            raise ValueError('select="lowest" cannot keep a mass of attention: the schedule has to hold fractions')
        self.published = published
        if published:
            check_published(self.stopping, select)
        self.iterations, self.lr, self.betas, self.lr_schedule = iterations, lr, betas, lr_schedule
        self.jitter, self.flip = check_jitter(jitter, self.image_size), flip
        self.view_per_image, self.views = view_per_image, views
        self.pooling = check_pooling(pooling, self.backbone, self.image_size, iterations)
        self.clamp, self.graphs, self.progress, self.compile = clamp, graphs, progress, compile
        self.verifier = (
            None if verifier is None else check_verifier(as_backbone(verifier), self.backbone, self.image_size)
        )
        self.verify_every = verify_every
        self.stages = self._plan()
        self._check_objective()

    def _minimise(self, objective: Objective | Loss) -> None:
        as_loss(objective)  # checks it
        self.objective, self.features = objective, features_of(objective)
        self.models = (self.backbone, *getattr(objective, "models", ()))

    def _check_objective(self) -> None:
        check = getattr(self.objective, "check", None)
        if check is not None:
            check(self)

    def with_objective(self, objective: Objective | Loss) -> Inverter:
        """Return an inverter of the same model with another objective and otherwise the same settings, the prior among
        them.

        Raises:
            ValueError, TypeError: the objective does not fit.
        """
        other = copy.copy(self)
        other._minimise(objective)
        other._check_objective()
        return other

    def _plan(self) -> list[Stage]:
        if getattr(self.backbone, "prune", None) and self.stopping.stops:
            raise ValueError(
                "the model prunes, and the patches that it has pruned have no importance by which to stop them: use "
                'stopping="dense", or a model that does not prune'
            )
        late = [iteration for iteration in self.stopping.stops if iteration >= self.iterations]
        if late:
            raise ValueError(
                f"the schedule stops patches at iteration {late[0]}, but there are only {self.iterations} iterations"
            )
        stops, patches, stages = self.stopping.patches(self.grid.num_patches), self.grid.num_patches, []
        starts = sorted({0, *stops, *self.pooling})
        for start, end in zip(starts, [*starts[1:], self.iterations], strict=True):
            patches = stops.get(start, patches)
            stages.append(self.stage(start, end, patches))
        return stages

    def stage(self, start: int, end: int, patches: float | None) -> Stage:
        """Return the description of a stage in which images keep so many patches."""
        tokens = None if patches is None else patches + self.backbone.num_prefix_tokens
        factors = [factor for iteration, factor in self.pooling.items() if iteration <= start]
        return Stage(start, end, patches, tokens, factors[-1] if factors else 1)

    def draw_views(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Draw the views of a run: (iterations, 3) int32, or (iterations, B, 3) if each image has views of its own."""
        if self.views is not None:
            return check_views(self.views(self.iterations, generator), self.iterations, batch_size)
        repeats = batch_size if self.view_per_image else 1
        parts = []
        starts = [iteration for iteration in self.pooling if iteration]
        for start, end in zip([0, *starts], [*starts, self.iterations], strict=True):
            count, factor = (end - start) * repeats, self.pooling.get(start, 1)
            parts.append(
                random_views(
                    count, self.image_size, jitter=self.jitter, flip=self.flip, generator=generator, multiple=factor
                )
            )
        views = torch.cat(parts)
        return views.view(self.iterations, batch_size, 3) if self.view_per_image else views

    def run(
        self,
        targets: Tensor | Sequence[int],
        seed: int = 0,
        callback: Callable[[Step], None] | None = None,
        state: Mapping[str, Any] | None = None,
        start: Tensor | None = None,
    ) -> InversionResult:
        """Invert one image for each target, as one batch.

        Args:
            targets: (B,) class indices, or (B, classes) soft labels: probabilities of the classes.
            seed: decides the initial noise, the views and random choices. The same seed, device, dtype and backend give
                the same bits.
            callback: called with a `Step` after every iteration. If it changes weights, modules or hooks of the model,
                the next iteration uses the changed model.
            state: what `Step.state_dict()` returned in a run with the same arguments. This run goes on from there, in
                this process or another, and gives the same bits as a run that was not interrupted.
            start: (B, C, H, W), the images to start from instead of noise, in the model's normalised space.

        Returns:
            The result. After Ctrl-C it is that of the iterations so far.

        Raises:
            TypeError, ValueError: a target is not a class of the model, soft labels are no distribution, a weight is
                not finite, or `state` is no state of a run with these targets, this seed and these settings.
            NonFiniteError: the attention is NaN or infinite at a stopping. The error holds the result so far.
        """
        targets, seed = check_targets(targets, self.backbone.num_classes), check_seed(seed)
        check_weights(self.models)
        loop, interrupted = Loop(self), False
        shape = len(targets), self.backbone.num_channels, *self.image_size
        with loop.running():
            current = loop.begin(targets, seed, check_start(start, shape))
            _go_on(current, state)
            verifier = self._verifier(current)
            with Bar.of(self.iterations, current.iteration, self.progress) as bar:
                try:
                    stages = [] if self._ended(current) else self.stages
                    for step in loop.iterations(current, stages, watch=callback is not None):
                        if self.until is not None and loop.is_due(current):
                            current.confident = loop.check(current)  # before the callback, which may save the state
                        for tell in (verifier, callback):
                            if tell is not None:
                                tell(step)
                        bar.advance(step.stage, step.loss)
                        if self._ended(current):
                            break
                except KeyboardInterrupt:
                    interrupted = True
            if self.published and self.stopping.stops and current.iteration == self.iterations:
                loop.choose_anew(current)
            if verifier is not None and current.iteration:
                verifier.record(current.iteration, current.results(), current.targets)
            return finished(current, interrupted)

    def _verifier(self, current: InversionState) -> Verifier | None:
        """Return the verifier, which adds to the records of the state."""
        if self.verifier is None:
            return None
        verifier = Verifier(self.verifier, self.verify_every)
        verifier.records = current.verified
        return verifier

    def _ended(self, current: InversionState) -> bool:
        """Return whether the model is sure of all images."""
        return self.until is not None and min(current.confident) >= self.until.checks

    def stream(
        self,
        targets: Tensor | Sequence[int],
        batch_size: int,
        seed: int = 0,
        callback: Callable[[Step], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> InversionResult:
        """Invert one image for each target, `batch_size` at a time. An image of which the model is sure leaves, and the
        next one takes its place, so that no time is spent on finished images.

        Each image has noise and views of its own, decided by the seed and its number. The images are those of `run`, up
        to rounding, whichever others are beside them. Images begin in batches, and go through the stoppings together;
        only after the last stopping do they leave one by one. In float16 the images of a batch share the scale of the
        loss: in an iteration in which a gradient of one overflows, all images have the gradient 0.

        Args:
            targets: (N,) class indices, or (N, classes) soft labels.
            batch_size: the number of images that are inverted at the same time.
            seed, callback: see `run`. The callback sees the iterations of all images, in the order in which they run.
            state: what `Step.state_dict()` returned in a stream with the same arguments. This stream goes on from
                there, in this process or another, and gives the same bits as a stream that was not interrupted.

        Returns:
            The result, in the order of the targets. Its losses are those of the iterations after the last stopping,
            each of all images that were inverted then, and before them those of the first batch. After Ctrl-C it has
            the images that are finished or in the batch.

        Raises:
            TypeError, ValueError: the inverter has no `until`, the images of a batch depend on each other (which they
                do not with `deep_inversion(norm="image")`), the schedule lets images keep different numbers of patches,
                the state is of a run or of another `batch_size`, or see `run`.
            NonFiniteError: see `run`. Its result is the one that Ctrl-C would give.
        """
        targets, seed = check_targets(targets, self.backbone.num_classes), check_seed(seed)
        check_weights(self.models)
        check_streams(self, batch_size)
        loop, interrupted = Loop(self), False
        with loop.running():
            slots = Slots(loop, targets, batch_size, seed, watch=callback is not None)
            _go_on(slots, state)
            with Bar.of(len(targets), len(slots.results), self.progress, "image") as bar:
                try:
                    for step in slots.iterations():
                        if callback is not None:
                            callback(step)
                        bar.update(len(slots.results) - bar.n)
                except KeyboardInterrupt:
                    interrupted = True
                except NonFiniteError as error:
                    error.result = slots.result(interrupted)
                    raise
            return slots.result(interrupted)


def _go_on(begun: InversionState | Slots, state: Mapping[str, Any] | None) -> None:
    """Go on from a saved state, if there is one."""
    try:
        if state is not None:
            begun.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f"the state holds no {error}") from None
