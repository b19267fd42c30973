"""Loop: the iterations of an inversion, one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.backbones.base import Outputs, frozen
from smi_fast.backbones.vit import AcceleratedViT
from smi_fast.grid import PatchGrid
from smi_fast.inversion.graphs import Replayed, free_memory, has_graphs, side_stream
from smi_fast.inversion.objectives import as_loss, deep_inversion
from smi_fast.inversion.priors import ImagePrior
from smi_fast.inversion.published import chosen_anew, importance_of_all
from smi_fast.inversion.result import NonFiniteError, Step, result_of
from smi_fast.inversion.schedule import Stop
from smi_fast.inversion.selection import scores
from smi_fast.inversion.state import InversionState, Stage
from smi_fast.inversion.tape import Taped
from smi_fast.packed import PackedTokens
from smi_fast.seeds import batch_seed, seeded_generator


class Loop:
    """The iterations of an inversion.

    Args:
        inverter: the `Inverter` whose settings count.
    """

    def __init__(self, inverter: Any):
        self.settings, self.backbone, self.grid = inverter, inverter.backbone, inverter.grid
        self.device = inverter.backbone.device
        self._loss, self._features = as_loss(inverter.objective), inverter.features
        # The step on the pixels computes an ImagePrior and its gradient.
        self._fused = asdict(inverter.prior) if isinstance(inverter.prior, ImagePrior) else {}
        self._outputs = torch.compile(self.backbone.outputs) if inverter.compile else self.backbone.outputs
        self.started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Freeze the models, cast their weights once, and run on the device's side stream."""
        with side_stream(self.device), ExitStack() as stack:
            for model in self.settings.models:
                stack.enter_context(frozen(model))
                stack.enter_context(model.cast_weights(pack=not self.settings.compile))
            yield

    def begin(self, targets: Tensor, seed: int, start: Tensor | None = None) -> InversionState:
        """Return the state in which a batch begins. The seed decides its views and its noise."""
        generator = seeded_generator(seed)
        views = self.settings.draw_views(len(targets), generator)
        # The noise is drawn on the CPU, so that every device starts from the same numbers.
        shape = len(targets), self.backbone.num_channels, *self.settings.image_size
        images = torch.randn(shape, generator=generator) if start is None else start.float().clone()
        return self._state(images, targets, views, seed)

    def begin_each(self, targets: Tensor, seed: int, numbers: Sequence[int]) -> InversionState:
        """Return the state in which images with the given numbers begin, each with views and noise of its own, so that
        neither depends on the other images of the batch."""
        images, views = [], []
        for number in numbers:
            generator = seeded_generator(batch_seed(seed, number))
            views.append(self.settings.draw_views(1, generator).reshape(-1, 1, 3))
            images.append(torch.randn(self.backbone.num_channels, *self.settings.image_size, generator=generator))
        state = self._state(torch.stack(images), targets, torch.cat(views, 1), seed)
        state.numbers, state.clocks = list(numbers), torch.zeros_like(state.steps)
        return state

    def _state(self, images: Tensor, targets: Tensor, views: Tensor, seed: int) -> InversionState:
        settings, views = self.settings, views.to(self.device, copy=True)
        for stop in settings.stopping.stops:  # the iteration that measures attention and the one that stops patches
            views[stop - 1 : stop + 1] = 0
        return InversionState(
            images.to(self.device),
            targets.to(self.device),
            views,
            self.grid,
            mean=settings.mean,
            std=settings.std,
            clamp=settings.clamp,
            iterations=settings.iterations,
            seed=seed,
            scales_loss=self.backbone.compute_dtype == torch.float16,
            all_move=settings.published,
            settings=settings_record(settings),
        )

    def iterations(self, current: InversionState, stages: Sequence[Stage], *, watch: bool = False) -> Iterator[Step]:
        """Run the iterations of some stages, those that a saved run has finished left out, and yield a `Step` after
        each. With `watch`, an iteration that would be replayed runs anew if the model has changed meanwhile."""
        stops, step = self.settings.stopping.stops, partial(self.step, current)
        for stage in stages:
            if current.iteration >= stage.end:
                continue
            stage = self.enter(current, stage)
            replayed = self.replayed(step, watch)
            for iteration in range(current.iteration, stage.end):
                measures = iteration + 1 in stops
                if measures:  # a stage's last iteration, which frees the memory of its graphs
                    replayed = None
                    free_memory(self.device)
                if measures or iteration in stops:
                    current.importance = step(current.current, measures=measures)
                else:
                    replayed(current.current)
                current.advance()
                loss = current.losses[iteration]
                yield Step(iteration, stage, loss, current, self.started, current.state_dict)

    def enter(self, current: InversionState, stage: Stage) -> Stage:
        """Begin a stage, or go on with the one that a saved run has begun. Return it with its number of patches."""
        begins = not current.history or current.history[-1].start != stage.start
        if begins and stage.start in self.settings.pooling and stage.start:
            current.restart()
        if begins and stage.start in self.settings.stopping.stops:
            self._stop(current, self.settings.stopping.stops[stage.start])
        current.pooling, current.lr = stage.pooling, self._rates(stage)
        stage = self.settings.stage(stage.start, stage.end, current.patches)
        if begins:
            current.history.append(stage)
        free_memory(self.device)  # cached blocks of other shapes do not fit this stage
        return stage

    def _stop(self, current: InversionState, stop: Stop) -> None:
        """Choose the patches that go on by the importance that the iteration before has measured."""
        _check_finite(current.importance, current)
        chosen = scores(
            self.settings.select,
            current.importance,
            current.keep,
            stop,
            seed=current.seed,
            iteration=current.iteration,
        )
        current.stop(chosen, stop, self.backbone.backend)

    def choose_anew(self, current: InversionState) -> None:
        """Choose the patches of finished images as the published code does."""
        patches, importance = importance_of_all(current.whole_results(), self.grid, self.backbone)
        _check_finite(importance, current)
        prefix = self.backbone.num_prefix_tokens
        current.keep = chosen_anew(patches, importance, self.settings.stopping, prefix)

    def _rates(self, stage: Stage) -> float | Tensor:
        """Return the learning rate in a stage: a number, or (steps,) for Adam's steps since its last restart."""
        lr, schedule = self.settings.lr, self.settings.lr_schedule
        if schedule is None:
            return lr
        restarts = [*self.settings.pooling, self.settings.iterations]
        start = max(restart for restart in (0, *restarts) if restart <= stage.start)
        steps = min(restart for restart in restarts if restart > stage.start) - start
        factors = [float(schedule(step, steps)) for step in range(steps)]
        for step, factor in enumerate(factors):
            if not 0 <= factor < math.inf:
                raise ValueError(f"lr_schedule gives {factor} in step {step}, expected a finite number from 0 on")
        return torch.tensor([lr * factor for factor in factors], device=self.device)

    def step(self, current: InversionState, number: int, measures: bool = False) -> Tensor | None:
        """Run one iteration from the images `current.pair[number]`, and return the importance of the kept patches if it
        measures. Everything that differs between iterations is read from the device, so that a CUDA graph of one can be
        replayed for the others."""
        backbone, view = self.backbone, current.view()
        tokens, inverse = current.gather(number, view, backbone.patch_dtype, backbone.backend)
        patches, images = tokens.values.requires_grad_(), current.pair[number].detach().requires_grad_()
        outputs = self.outputs(tokens, current.pooling, importance=measures, features=self._features)
        loss = self._loss(outputs, images, current.targets)
        if self.settings.prior is not None and not self._fused:
            loss = loss + self.settings.prior(images, current.mask)
        grad, of_images = _gradients(loss, (patches, images), current)
        grad = torch.zeros_like(patches) if grad is None else grad
        value = current.step(
            number,
            grad,
            inverse=inverse,
            view=view,
            pixel_grad=None if of_images is None else self.grid.gather(of_images, current.moving),
            betas=self.settings.betas,
            backend=backbone.backend,
            **self._fused,
        )
        current.record(loss.detach() + value)
        return outputs.importance

    def outputs(self, tokens: PackedTokens, pooling: int, **asked: Any) -> Outputs:
        """Run the model on patches, of which it sees the means of squares of `pooling` pixels a side."""
        grid = self.grid
        if pooling > 1:  # the grid has one patch, the whole image
            images = tokens.values.view(len(tokens.values), -1, *grid.image_size)
            pooled = F.avg_pool2d(images, pooling)
            tokens, grid = replace(tokens, values=pooled.flatten(1)), PatchGrid.of(pooled.shape[2:], pooled.shape[2:])
        outputs = self._outputs(tokens, grid_size=grid.size, **asked)
        return replace(outputs, patches=tokens, grid=grid, mean=self.settings.mean, std=self.settings.std)

    def is_due(self, current: InversionState) -> bool:
        """Return whether the images are to be checked now, as they are every so often after the last stopping."""
        settled = current.iteration - self.settings.stages[-1].start
        return settled > 0 and settled % self.settings.until.every == 0

    @torch.no_grad()
    def check(self, current: InversionState) -> list[int]:
        """Classify the kept patches in the plain view, and return how many checks in a row each image has passed."""
        tokens, _ = current.gather(current.current, None, self.backbone.patch_dtype, self.backbone.backend)
        logits = self.outputs(tokens, current.pooling).logits
        return self.settings.until.count(current.confident, logits, current.targets)

    def replayed(self, step: Callable[[int], object], watch: bool) -> Callable[[int], object]:
        """Return what calls `step` in a stage, which may replay it. With `watch`, it is not replayed but runs anew if
        the model has changed since the call before."""
        if not watch:
            return self._replayed(step)
        replayed, seen = self._replayed(step), self.seen_of_model()

        def call(number: int) -> None:
            nonlocal replayed, seen
            if seen != (seen := self.seen_of_model()):
                replayed = self._replayed(step)
            replayed(number)

        return call

    def _replayed(self, step: Callable[[int], object]) -> Callable[[int], object]:
        if self.settings.graphs and has_graphs(self.device):
            return Replayed(step)
        return Taped(step) if self.settings.graphs and self._runs_only_known_code() else step

    def seen_of_model(self) -> list:
        """Return what is compared to see whether a callback has changed a model, so that no iteration of another model
        is replayed: its modules, their modes and hooks, and its weights."""
        found: list = []
        for module in chain.from_iterable(model.modules() for model in self.settings.models):
            found += (id(module), module.training, *module._forward_hooks, *module._forward_pre_hooks)
            for weight in module._parameters.values():
                if weight is not None:
                    memory = weight.data_ptr() if torch._C._has_storage(weight) else 0
                    found += (id(weight), memory, 0 if weight.is_inference() else weight._version)
        return found

    def _runs_only_known_code(self) -> bool:
        """Return whether nothing but operators decides what an iteration on a CPU does."""
        objective, prior = self.settings.objective, self.settings.prior
        known = type(objective) is deep_inversion and (prior is None or isinstance(prior, ImagePrior))
        plain = isinstance(self.backbone, AcceleratedViT) and self.backbone.is_plain
        return known and plain and not self.settings.compile and self.device.type == "cpu"


def settings_record(inverter: Any) -> dict[str, Any]:
    """Return the settings of an inverter that must be equal in a saved run and in the run that continues it, in JSON's
    types. Functions are there by their names."""
    named = ("objective", "prior", "select", "lr_schedule", "views", "until")
    return {
        "stopping": repr(inverter.stopping),  # str() rounds the fractions
        "iterations": inverter.iterations,
        "lr": float(inverter.lr),
        "betas": list(map(float, inverter.betas)),
        "jitter": inverter.jitter,
        "flip": float(inverter.flip),
        "view_per_image": bool(inverter.view_per_image),
        "published": bool(inverter.published),
        "pooling": {str(iteration): factor for iteration, factor in inverter.pooling.items()},
        "clamp": bool(inverter.clamp),
        "image_size": list(inverter.image_size),
        "patch_size": list(inverter.grid.patch_size),
        "mean": list(inverter.mean),
        "std": list(inverter.std),
        "dtype": str(inverter.backbone.compute_dtype),
        **{name: _name_of(getattr(inverter, name)) for name in named},
        "verify_every": None if inverter.verifier is None else inverter.verify_every,
    }


def _name_of(value: Any) -> str:
    """Return a text that identifies a strategy's name, a function or an object with settings in every process."""
    if value is None or isinstance(value, str) or is_dataclass(value):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _check_finite(importance: Tensor, current: InversionState) -> None:
    if importance.isfinite().logical_not().any():
        raise NonFiniteError(current.iteration, result_of(current))


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
