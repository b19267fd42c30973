"""Inverter: the loop that turns noise into images of a class, on fewer and fewer patches."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smi_fast.backbones.base import Backbone, frozen
from smi_fast.backbones.conversion import as_backbone
from smi_fast.backbones.pruning import Mass
from smi_fast.backbones.vit import AcceleratedViT
from smi_fast.inversion.graphs import Replayed, free_memory, has_graphs, side_stream
from smi_fast.inversion.objectives import Loss, Objective, as_loss, deep_inversion
from smi_fast.inversion.priors import ImagePrior, PixelLoss
from smi_fast.inversion.schedule import StoppingSchedule, as_schedule
from smi_fast.inversion.selection import Scores, check_strategy, scores
from smi_fast.inversion.state import InversionState, Stage
from smi_fast.inversion.tape import Taped
from smi_fast.inversion.views import random_views
from smi_fast.seeds import check_seed, seeded_generator


@dataclass(frozen=True)
class Step:
    """The information that a callback gets after an iteration. Creating it does not synchronise."""

    iteration: int  # from 0
    stage: Stage
    loss: Tensor  # scalar, on the device
    _state: InversionState = field(repr=False)
    _started: float = field(repr=False)

    @property
    def tokens(self) -> float:
        """Tokens per image in this iteration, on average if images differ."""
        return self.stage.tokens

    @property
    def keep(self) -> Tensor | list[Tensor]:
        """The patches that are still inverted: (B, K) int64, or a list of B index tensors if images differ."""
        return self._state.keep.indices()

    @property
    def targets(self) -> Tensor:
        """The targets of the run, on the device."""
        return self._state.targets

    @property
    def is_last(self) -> bool:
        """Whether this is the run's last iteration."""
        return self.iteration + 1 == len(self._state.losses)

    def images(self) -> Tensor:
        """Return the images as they are now: (B, C, H, W) in [0, 1], with stopped patches black.

        Pixels that are NaN or infinite are returned as they were when the stage began.
        """
        return self._state.results()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that the run needs to go on from here, in this process or another. `torch.save`
        can save it, and `Inverter.run` takes it as `state`."""
        return self._state.state_dict()

    def seconds(self) -> float:
        """Return the seconds since the run began. The host waits for the device."""
        if self.loss.is_cuda:
            torch.cuda.synchronize(self.loss.device)
        return time.perf_counter() - self._started


@dataclass(frozen=True)
class InversionResult:
    """The result of an inversion.

    Args:
        images: (B, C, H, W) float32 in [0, 1] on the CPU, with stopped patches black. Pixels that have become NaN or
            infinite are returned as they were when the last stage began, and a warning says so.
        keep: (B, K) int64, the patches that were never stopped, or a list of B index tensors if images differ.
        targets: (B,) int64.
        losses: (iterations,) float32, one for every iteration that ran.
        history: the stages that ran. If the run was interrupted, the last one is cut short.
        patch_size: (height, width) of a patch in pixels.
        interrupted: whether Ctrl-C ended the run early.
    """

    images: Tensor
    keep: Tensor | list[Tensor]
    targets: Tensor
    losses: Tensor
    history: list[Stage]
    patch_size: tuple[int, int]
    interrupted: bool = False


class NonFiniteError(RuntimeError):
    """Raised by `Inverter.run` if the attention is NaN or infinite at a stopping, so that no patch can be selected.

    Attributes:
        iteration: the iteration of the stopping.
        result: the `InversionResult` of the iterations before it. Pixels that are no longer finite are returned in it
            as they were when the last stage began.
    """

    def __init__(self, iteration: int, result: InversionResult):
        since = "" if result.losses.isfinite().all() else f"; the loss is {_first_non_finite(result.losses)} on"
        super().__init__(
            f"at iteration {iteration} no patch can be selected, because the attention is NaN or infinite{since}"
        )
        self.iteration, self.result = iteration, result


class Inverter:
    """Sparse model inversion of a timm ViT (Hu et al., ICML 2024).

    Pixels are optimised with Adam until the model is sure of each image's target class. At each stopping the class
    token's attention in the last block picks the patches that go on. The others leave the forward and the backward pass
    and keep their pixels for good.

    Args:
        model: a timm model that `accelerate` takes, an `AcceleratedViT`, or another `Backbone`. While `run` runs, it is
            in evaluation mode and its weights are frozen. Both are restored afterwards.
        stopping: when patches are stopped: a `StoppingSchedule`, a mapping such as {50: 0.3}, or a text that
            `StoppingSchedule.parse` reads. "paper" is the paper's schedule, scaled to the number of iterations. None:
            the paper's schedule without scaling, {50: 0.3, 100: 0.3, 200: 0.3, 300: 0.3}.
        objective: the loss of the model's outputs: `deep_inversion(...)`, a function of (logits, images, targets), or
            an `Objective`.
        prior: the loss of the pixels: an `ImagePrior`, or a function of (images, kept) with images (B, C, H, W) in the
            model's normalised space and kept (B, 1, H, W) bool, the pixels that are still inverted. None: the
            objective's own prior, such as that of `deep_inversion`, if it has one.
        select: which patches go on at a stopping: "attention" (the most important ones), "lowest" (the least important
            ones), "random", or a function of (importance, keep), float32 (T,) and `PackedTokens`, that returns a score
            (T,) for each patch. The patches with the highest scores go on.
        iterations: the number of optimiser steps.
        lr, betas: the settings of Adam.
        jitter: views are rolled by up to this share of the image's side, in either direction.
        flip: the probability that a view is mirrored.
        view_per_image: draw a view for each image, instead of one for the batch as the published code does.
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
        stopping: StoppingSchedule | Mapping[int, float | Mass] | str | None = None,
        objective: Objective | Loss | None = None,
        prior: ImagePrior | PixelLoss | None = None,
        select: str | Scores = "attention",
        iterations: int = 4000,
        lr: float = 0.25,
        betas: tuple[float, float] = (0.5, 0.99),
        jitter: float = 1 / 8,
        flip: float = 0.5,
        view_per_image: bool = False,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        compile: bool = False,
        graphs: bool = True,
        progress: bool = True,
    ):
        _check_numbers(iterations, lr, betas, jitter, flip)
        self.backbone: Backbone = as_backbone(model, dtype, backend, image_size)
        self.stopping = StoppingSchedule.paper() if stopping is None else as_schedule(stopping, iterations)
        self._minimise(deep_inversion() if objective is None else objective)
        self.prior = getattr(self.objective, "prior", None) if prior is None else prior
        if not (self.prior is None or isinstance(self.prior, ImagePrior) or callable(self.prior)):
            raise TypeError(f"a prior is an ImagePrior or a function of (images, kept), got {self.prior!r}")
        # The step on the pixels computes an ImagePrior and its gradient.
        self._fused = asdict(self.prior) if isinstance(self.prior, ImagePrior) else {}
        self.select = check_strategy(select)
        if select == "lowest" and any(isinstance(stop, Mass) for stop in self.stopping.stops.values()):
            raise ValueError('select="lowest" cannot keep a mass of attention: the schedule has to hold fractions')
        self.iterations, self.lr, self.betas = iterations, lr, betas
        self.jitter, self.flip, self.view_per_image = jitter, flip, view_per_image
        self.graphs, self.progress = graphs, progress
        self._compiled = compile
        self._outputs = torch.compile(self.backbone.outputs) if compile else self.backbone.outputs
        self.mean = tuple(map(float, self.backbone.mean if mean is None else mean))
        self.std = tuple(map(float, self.backbone.std if std is None else std))
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.backbone.num_channels:
                raise ValueError(
                    f"{name} has {len(values)} values, the model has {self.backbone.num_channels} channels"
                )
        if not min(self.std) > 0:
            raise ValueError(f"std must be positive, got {self.std}")
        self.image_size = tuple(image_size or self.backbone.image_size)
        self.grid = self.backbone.grid(self.image_size)
        self.stages = self._plan()
        self._check_objective()

    def _minimise(self, objective: Objective | Loss) -> None:
        self.objective, self._loss = objective, as_loss(objective)
        features = getattr(objective, "features", ())
        if isinstance(features, str):
            raise TypeError(f"an objective's features are a sequence of names, got the text {features!r}")
        self._features = tuple(features)
        self._models = (self.backbone, *getattr(objective, "models", ()))

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
        starts = {0: self.grid.num_patches, **self.stopping.patches(self.grid.num_patches)}
        ends = [*list(starts)[1:], self.iterations]
        return [self._stage(start, end, n) for (start, n), end in zip(starts.items(), ends, strict=True)]

    def _stage(self, start: int, end: int, patches: float | None) -> Stage:
        return Stage(start, end, patches, None if patches is None else patches + self.backbone.num_prefix_tokens)

    def run(
        self,
        targets: Tensor | Sequence[int],
        seed: int = 0,
        callback: Callable[[Step], None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> InversionResult:
        """Invert one image for each target, as one batch.

        Args:
            targets: (B,) class indices.
            seed: decides the initial noise, the views and random choices. The same seed, device, dtype and backend give
                the same bits.
            callback: called with a `Step` after every iteration. If it changes weights, modules or hooks of the model,
                the next iteration uses the changed model.
            state: what `Step.state_dict()` returned in a run with the same arguments. This run goes on from there, in
                this process or another, and gives the same bits as a run that was not interrupted.

        Returns:
            The result. After Ctrl-C it is that of the iterations so far.

        Raises:
            ValueError: a target is not a class of the model, a weight is not finite, or the state is of another run.
            NonFiniteError: the attention is NaN or infinite at a stopping. The error holds the result so far.
        """
        targets, seed = self._check_targets(targets), check_seed(seed)
        self._check_weights()
        device, stops, started = self.backbone.device, self.stopping.stops, time.perf_counter()
        with self._inverting(device):
            current, views = self._begin(targets.to(device), seed, state)
            step, interrupted = partial(self._step, current, views), False
            with self._bar(current) as bar:
                try:
                    for stage in self.stages:
                        if current.iteration >= stage.end:
                            continue  # the saved run has finished this stage
                        if current.iteration == stage.start and stage.start:
                            self._stop(current, stops[stage.start])
                        stage = self._enter(current, stage)
                        replayed, seen = self._replayed(step), self._seen_of_model()
                        for iteration in range(current.iteration, stage.end):
                            measures = iteration + 1 in stops
                            if measures:  # a stage's last iteration, which frees the memory of its graphs
                                replayed = None
                                free_memory(device)
                            if measures or iteration in stops:
                                current.importance = step(current.current, plain=True, measures=measures)
                            else:
                                replayed(current.current)
                            current.advance()
                            if callback is not None:
                                callback(Step(iteration, stage, current.losses[iteration], current, started))
                                if replayed is not None and seen != (seen := self._seen_of_model()):
                                    replayed = self._replayed(step)
                            bar.advance(stage, current.losses[iteration])
                except KeyboardInterrupt:
                    interrupted = True
            return self._finish(current, interrupted)

    def _begin(self, targets: Tensor, seed: int, state: Mapping[str, Any] | None) -> tuple[InversionState, Tensor]:
        """Return the state that the run begins with, and its views: (iterations, 3) or (iterations, B, 3) int32."""
        generator, batch_size = seeded_generator(seed), len(targets)
        count = self.iterations * (batch_size if self.view_per_image else 1)
        views = random_views(count, self.image_size, jitter=self.jitter, flip=self.flip, generator=generator)
        views = views.view(self.iterations, batch_size, 3) if self.view_per_image else views
        # The noise is drawn on the CPU, so that every device starts from the same numbers.
        noise = torch.randn(batch_size, self.backbone.num_channels, *self.image_size, generator=generator)
        current = InversionState(
            noise.to(targets.device),
            targets,
            self.grid,
            mean=self.mean,
            std=self.std,
            iterations=self.iterations,
            seed=seed,
            scales_loss=self.backbone.compute_dtype == torch.float16,
            settings=self._settings(),
        )
        if state is not None:
            current.load_state_dict(state)
        return current, views.to(targets.device)

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be equal in a saved run and in the run that continues it, functions by name."""
        named = {"objective": self.objective, "prior": self.prior, "select": self.select}
        return {
            "stopping": repr(self.stopping),  # str() rounds the fractions
            "iterations": self.iterations,
            "lr": float(self.lr),
            "betas": list(map(float, self.betas)),
            "jitter": float(self.jitter),
            "flip": float(self.flip),
            "view_per_image": bool(self.view_per_image),
            "image_size": list(self.image_size),
            "patch_size": list(self.grid.patch_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": str(self.backbone.compute_dtype),
            **{name: _name_of(value) for name, value in named.items()},
        }

    def _enter(self, current: InversionState, stage: Stage) -> Stage:
        """Begin a stage, or go on with the one that a saved run has begun. Return it with its number of patches."""
        stage = self._stage(stage.start, stage.end, current.patches)
        if not current.history or current.history[-1].start != stage.start:
            current.history.append(stage)
        free_memory(self.backbone.device)  # cached blocks of other shapes do not fit this stage
        return stage

    def _stop(self, current: InversionState, stop: float | Mass) -> None:
        """Choose the patches that go on by the importance that the iteration before has measured."""
        if current.importance.isfinite().logical_not().any():
            raise NonFiniteError(current.iteration, self._result(current))
        chosen = scores(
            self.select, current.importance, current.keep, stop, seed=current.seed, iteration=current.iteration
        )
        current.stop(chosen, stop, self.backbone.backend)

    def _step(
        self, current: InversionState, views: Tensor, number: int, plain: bool = False, measures: bool = False
    ) -> Tensor | None:
        """Run one iteration from the images `current.pair[number]`, and return the importance of the kept patches if it
        measures. Everything that differs between iterations is read from the device, so that a CUDA graph of one can be
        replayed for the others."""
        backbone, view = self.backbone, None if plain else views.index_select(0, current.clock)[0]
        dtype = getattr(backbone, "patch_dtype", backbone.compute_dtype)
        tokens, inverse = current.gather(number, view, dtype, backbone.backend)
        patches, images = tokens.values.requires_grad_(), current.pair[number].detach().requires_grad_()
        outputs = self._outputs(tokens, grid_size=self.grid.size, importance=measures, features=self._features)
        outputs = replace(outputs, patches=tokens, grid=self.grid, mean=self.mean, std=self.std)
        loss = self._loss(outputs, images, current.targets)
        if self.prior is not None and not self._fused:
            loss = loss + self.prior(images, current.mask)
        grad, of_images = _gradients(loss, (patches, images), current)
        grad = torch.zeros_like(patches) if grad is None else grad
        value = current.step(
            number,
            grad,
            inverse=None if plain else inverse,
            view=view,
            pixel_grad=None if of_images is None else self.grid.gather(of_images, current.keep),
            lr=self.lr,
            betas=self.betas,
            backend=backbone.backend,
            **self._fused,
        )
        current.record(loss.detach() + value)
        return outputs.importance

    def _replayed(self, step: Callable[[int], object]) -> Callable[[int], object]:
        """Return what calls `step` in a stage, which may replay it."""
        if self.graphs and has_graphs(self.backbone.device):
            return Replayed(step)
        return Taped(step) if self.graphs and self._runs_only_known_code() else step

    def _seen_of_model(self) -> list:
        """Return what is compared to see whether a callback has changed a model, so that no iteration of another model
        is replayed: its modules, their modes and hooks, and its weights."""
        found: list = []
        for module in chain.from_iterable(model.modules() for model in self._models):
            found += (id(module), module.training, *module._forward_hooks, *module._forward_pre_hooks)
            for weight in module._parameters.values():
                if weight is not None:
                    memory = weight.data_ptr() if torch._C._has_storage(weight) else 0
                    found += (id(weight), memory, 0 if weight.is_inference() else weight._version)
        return found

    def _runs_only_known_code(self) -> bool:
        """Return whether nothing but operators decides what an iteration on a CPU does."""
        known = type(self.objective) is deep_inversion and (self.prior is None or isinstance(self.prior, ImagePrior))
        plain = isinstance(self.backbone, AcceleratedViT) and self.backbone.is_plain
        return known and plain and not self._compiled and self.backbone.device.type == "cpu"

    @contextmanager
    def _inverting(self, device: torch.device) -> Iterator[None]:
        """Freeze the models, cast their weights once, and run on the device's side stream."""
        with side_stream(device), ExitStack() as stack:
            for model in self._models:
                stack.enter_context(frozen(model))
                stack.enter_context(model.cast_weights(pack=not self._compiled))
            yield

    def _result(self, current: InversionState, interrupted: bool = False) -> InversionResult:
        """Return the result of the iterations that are done."""
        done, keep = current.iteration, current.keep.to("cpu").indices()
        history = [replace(stage, end=min(stage.end, done)) for stage in current.history if stage.start < done]
        images, losses = current.results().cpu(), current.losses[:done].cpu()
        return InversionResult(images, keep, current.targets.cpu(), losses, history, self.grid.patch_size, interrupted)

    def _finish(self, current: InversionState, interrupted: bool) -> InversionResult:
        """Return the result, and warn if some of it is not finite."""
        result, lost = self._result(current, interrupted), int(current.images().isfinite().logical_not().sum())
        if not result.losses.isfinite().all():
            warnings.warn(f"the loss is {_first_non_finite(result.losses)} on", stacklevel=3)
        elif lost:
            warnings.warn(
                f"{lost} pixels are NaN or infinite and are given as they were when the last stage began", stacklevel=3
            )
        return result

    def _check_targets(self, targets: Tensor | Sequence[int]) -> Tensor:
        targets = torch.as_tensor(targets)
        if targets.ndim != 1 or len(targets) == 0:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected (B,) with at least one")
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"targets are {targets.dtype}, expected integers")
        num_classes = self.backbone.num_classes
        wrong = ((targets < 0) | (targets >= num_classes)).nonzero()
        if len(wrong):
            number = int(wrong[0])
            raise ValueError(
                f"target {int(targets[number])} (number {number}) is no class of the model's {num_classes}"
            )
        return targets.long()

    def _check_weights(self) -> None:
        for model in self._models:
            names, parameters = zip(*model.named_parameters(), strict=True)
            counts = torch.stack([weight.detach().isfinite().logical_not().sum() for weight in parameters]).tolist()
            for name, count in zip(names, counts, strict=True):
                if count:
                    whose = "the model's" if model is self.backbone else f"the objective's {type(model).__name__}'s"
                    name = name.removeprefix("model.")  # as timm's model calls it
                    raise ValueError(f"{whose} weight {name} holds {count} values that are NaN or infinite")

    def _bar(self, current: InversionState) -> _Bar:
        return _Bar(
            total=self.iterations,
            initial=current.iteration,
            disable=not self.progress,
            desc="inverting",
            unit="it",
            dynamic_ncols=True,
            mininterval=0.5,
        )


def _check_numbers(iterations: int, lr: float, betas: tuple[float, float], jitter: float, flip: float) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations must be an integer, got {iterations!r}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name, share in (("jitter", jitter), ("flip", flip)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")


def _name_of(value: Any) -> str:
    """Return a text that identifies a strategy's name, a function or an objective with settings in every process."""
    if isinstance(value, str) or is_dataclass(value):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _gradients(loss: Tensor, inputs: tuple[Tensor, ...], current: InversionState) -> list[Tensor | None]:
    """Return the gradients of a scalar loss, which is scaled for the backward pass if float16 needs it. The gradient of
    an input that the loss does not read is None.

    Raises:
        ValueError: the loss reads none of the inputs.
    """
    scale = current.loss_scale
    of_loss = current.one if scale is None else scale.value  # torch would fill a tensor with ones in every iteration
    of_loss = of_loss.view(loss.shape) if loss.numel() == 1 else None  # torch refuses other losses
    grads = torch.autograd.grad(loss, inputs, of_loss, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError("the loss has no gradient: it reads neither the model's outputs nor the images")
    return list(grads) if scale is None else scale.unscale(*grads)


def _first_non_finite(losses: Tensor) -> str:
    """Describe the first of the losses (iterations,) that is not finite, for example "nan from iteration 12"."""
    first = int((~losses.isfinite()).nonzero()[0])
    return f"{losses[first].item()} from iteration {first}"


class _Bar(tqdm):
    """A progress bar that shows the loss a few times a second. It never waits for a loss to arrive on the host."""

    _asked = 0.0  # when the loss was last asked for
    _loss: Tensor | None = None  # on the host
    _arrived: torch.cuda.Event | None = None

    def advance(self, stage: Stage, loss: Tensor) -> None:
        if self.disable:
            return
        if self._loss is None and (time.monotonic() - self._asked > 0.5 or self.n + 1 == self.total):
            self._asked = time.monotonic()
            self._loss = torch.empty((), pin_memory=loss.is_cuda).copy_(loss, non_blocking=True)
            if loss.is_cuda:
                self._arrived = torch.cuda.Event()
                self._arrived.record()
        if self._loss is not None and (self._arrived is None or self._arrived.query()):
            self.set_postfix(tokens=stage.tokens, loss=f"{self._loss.item():.3f}", refresh=False)
            self._loss = None
        self.update()
