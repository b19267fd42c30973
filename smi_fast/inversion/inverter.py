"""Inverter: the loop that turns noise into images of a class, on fewer and fewer patches."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from smi_fast import kernels
from smi_fast.backbones.base import frozen
from smi_fast.backbones.pruning import Mass
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.inversion.graphs import Replayed, free_memory, has_graphs, side_stream
from smi_fast.inversion.objectives import KeptPixels, Loss, Objective, as_objective, deep_inversion
from smi_fast.inversion.scaling import LossScale
from smi_fast.inversion.schedule import StoppingSchedule, as_schedule
from smi_fast.inversion.selection import select_patches
from smi_fast.inversion.views import random_views
from smi_fast.packed import PackedTokens
from smi_fast.seeds import check_seed, seeded_generator


@dataclass(frozen=True)
class Stage:
    """Iterations between two stoppings, which all have the same shapes."""

    start: int  # first iteration
    end: int  # one behind the last
    patches: float | None  # kept patches an image, in the mean where images differ; None before the images decided
    tokens: float | None  # patches and prefix tokens an image


@dataclass(frozen=True)
class Step:
    """What a callback is told after an iteration. Nothing in it has synchronised."""

    iteration: int  # from 0
    stage: Stage
    loss: Tensor  # scalar, on the device
    _pixels: Pixels = field(repr=False)
    _started: float = field(repr=False)

    @property
    def tokens(self) -> float:
        """Tokens per image in this iteration, in the mean where images differ."""
        return self.stage.tokens

    @property
    def keep(self) -> Tensor | list[Tensor]:
        """The patches still inverted, (B, K) int64, or a list of B index tensors where images differ."""
        return self._pixels.keep()

    def images(self) -> Tensor:
        """The images as they are now: (B, C, H, W) in [0, 1], stopped patches black.

        Pixels that are NaN or infinite are given as they were when the stage began.
        """
        return self._pixels.results()

    def seconds(self) -> float:
        """Seconds since the run began; waits for the device."""
        if self.loss.is_cuda:
            torch.cuda.synchronize(self.loss.device)
        return time.perf_counter() - self._started


@dataclass(frozen=True)
class InversionResult:
    """What an inversion made.

    Args:
        images: (B, C, H, W) float32 in [0, 1] on the CPU, stopped patches black. Pixels that have become NaN or
            infinite, of which a warning tells, are given as they were when the last stage began.
        keep: (B, K) int64, the patches that were never stopped; a list of B index tensors where images differ.
        targets: (B,) int64.
        losses: (iterations,) float32, of every iteration that ran.
        history: the stages that ran, the last one cut short where the run was interrupted.
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
    """Raised by `Inverter.run` at a stopping where the attention is NaN or infinite, so that it selects no patches.

    Attributes:
        iteration: the stopping's.
        result: the `InversionResult` of the iterations before it. Pixels that are no longer finite are there as they
            were when the last stage began.
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
    token's attention in the last block picks the patches that go on; the others leave the forward and the backward pass
    and keep their pixels for good.

    Args:
        model: a timm model that `accelerate` takes, or an `AcceleratedViT`. It is in evaluation mode and its weights
            are frozen while `run` runs; both are as they were afterwards.
        stopping: when patches are stopped: a `StoppingSchedule`, a mapping such as {50: 0.3}, or a text that
            `StoppingSchedule.parse` reads. "paper" is the paper's schedule, scaled to the number of iterations. None:
            the paper's schedule as it is, {50: 0.3, 100: 0.3, 200: 0.3, 300: 0.3}.
        objective: what is minimised: `deep_inversion(...)`, a function of (logits, images, targets), or an `Objective`.
        iterations: optimiser steps.
        lr, betas: of Adam.
        jitter: views are rolled by up to this share of the image's side, in either direction.
        flip: probability that a view is mirrored.
        view_per_image: draw a view for each image, not one for the batch as the published code does.
        image_size: (height, width) in pixels; None: the model's.
        mean, std: the model's normalisation, per channel; None: from timm's data config of the model.
        dtype, backend: passed to `accelerate`; not for a model that is accelerated already.
        compile: fuse what surrounds the matrix products with torch.compile, which takes a minute before the first
            iteration.
        cuda_graphs: on a GPU, capture an iteration of each stage and replay it. Python in a loss of your own then runs
            up to six times a stage only: turn this off if the loss counts its calls, for example. A loss that cannot be
            captured runs as it is, and a warning says so.
        seed: of the initial noise and the views. The same seed, device, dtype and backend give the same bits.
        progress: show a progress bar with iteration, tokens per image and loss.

    Raises:
        ValueError, TypeError: an argument out of range; the message names it.
        UnsupportedModelError: as `accelerate`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stopping: StoppingSchedule | Mapping[int, float | Mass] | str | None = None,
        objective: Objective | Loss | None = None,
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
        cuda_graphs: bool = True,
        seed: int = 0,
        progress: bool = True,
    ):
        if isinstance(iterations, bool) or not isinstance(iterations, int):
            raise TypeError(f"iterations must be an integer, got {iterations!r}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter must lie in [0, 1], got {jitter}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], got {flip}")
        if isinstance(model, AcceleratedViT):
            if dtype is not None or backend != "auto":
                raise ValueError(
                    f"the model is accelerated already: dtype={dtype} and backend={backend!r} come too late"
                )
            self.fast = model
        else:
            self.fast = accelerate(model, dtype=dtype, backend=backend)
        timm_model = self.fast.model
        self.stopping = StoppingSchedule.paper() if stopping is None else as_schedule(stopping, iterations)
        self.objective = as_objective(deep_inversion() if objective is None else objective)
        self.iterations, self.lr, self.betas = iterations, lr, betas
        self.jitter, self.flip, self.view_per_image = jitter, flip, view_per_image
        self.cuda_graphs, self.seed, self.progress = cuda_graphs, check_seed(seed), progress
        self._compiled, self._forward, self._forward_patches = compile, self.fast, self.fast.forward_patches
        if compile:
            self._forward, self._forward_patches = torch.compile(self._forward), torch.compile(self._forward_patches)

        config = resolve_data_config(model=timm_model)
        channels = timm_model.patch_embed.proj.in_channels
        self.mean = tuple(config["mean"] if mean is None else mean)
        self.std = tuple(config["std"] if std is None else std)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{name} has {len(values)} values, the model has {channels} channels")
        if not min(self.std) > 0:
            raise ValueError(f"std must be positive, got {self.std}")
        self.image_size = tuple(image_size or timm_model.patch_embed.img_size or config["input_size"][1:])
        self.grid = self.fast.grid(self.image_size)
        self.grid_size = self.grid.size
        self.stages = self._plan()

    def _plan(self) -> list[Stage]:
        late = [iteration for iteration in self.stopping.stops if iteration >= self.iterations]
        if late:
            raise ValueError(
                f"the schedule stops patches at iteration {late[0]}, of {self.iterations} iterations in all"
            )
        num_patches = self.grid_size[0] * self.grid_size[1]
        starts = {0: num_patches, **self.stopping.patches(num_patches)}
        ends = [*list(starts)[1:], self.iterations]
        prefix = self.fast.model.num_prefix_tokens
        return [
            Stage(start, end, patches, None if patches is None else patches + prefix)
            for (start, patches), end in zip(starts.items(), ends, strict=True)
        ]

    def run(self, targets: Tensor | Sequence[int], callback: Callable[[Step], None] | None = None) -> InversionResult:
        """Invert one image for each target, as one batch.

        Args:
            targets: (B,) class indices.
            callback: called with a `Step` after every iteration.

        Returns:
            The result; after Ctrl-C what there is so far.

        Raises:
            ValueError: targets that are no classes of the model; weights that are not finite.
            NonFiniteError: the attention is NaN or infinite when it has to select patches. The images so far are kept.
        """
        device = self.fast.model.patch_embed.proj.weight.device
        targets = self._check_targets(targets)
        self._check_weights()
        with side_stream(device), frozen(self.fast), self.fast.cast_weights(pack=not self._compiled):
            return self._run(targets.to(device), callback)

    def _run(self, targets: Tensor, callback: Callable[[Step], None] | None) -> InversionResult:
        device = targets.device
        losses = torch.zeros(self.iterations, device=device)
        generator = seeded_generator(self.seed)
        views = self._draw_views(len(targets), generator).to(device)
        pixels = Pixels(self, len(targets), generator, device)
        scale = LossScale(device) if self.fast.compute_dtype == torch.float16 else None
        iterate = partial(self._iterate, pixels, targets, views, losses, scale)
        interrupted, done, attention, history = False, 0, None, []

        def result() -> InversionResult:
            """The result of the iterations that are done."""
            stages = [replace(stage, end=min(stage.end, done)) for stage in history if stage.start < done]
            keep = pixels.keep()
            keep = keep.cpu() if isinstance(keep, Tensor) else [row.cpu() for row in keep]
            images, so_far = pixels.results().cpu(), losses[:done].cpu()
            return InversionResult(images, keep, targets.cpu(), so_far, stages, pixels.patch_size, interrupted)

        started = time.perf_counter()
        with self._bar() as bar:
            try:
                for stage in self.stages:
                    if stage.start:
                        if attention.isfinite().logical_not().any():
                            raise NonFiniteError(stage.start, result())
                        pixels.stop(attention, self.stopping.stops[stage.start])
                    stage = replace(
                        stage, patches=pixels.count, tokens=pixels.count + self.fast.model.num_prefix_tokens
                    )
                    history.append(stage)
                    free_memory(device)  # what other shapes have left does not fit this stage's
                    inner = Replayed(iterate) if self.cuda_graphs and has_graphs(device) else iterate
                    for iteration in range(stage.start, stage.end):
                        measures = iteration + 1 in self.stopping.stops
                        if measures:  # the stage's last iteration, so that the memory of its graphs is free
                            inner = None
                            free_memory(device)
                        if measures or iteration in self.stopping.stops:
                            attention = iterate(pixels.current, plain=True, measures=measures)
                        else:
                            inner(pixels.current)
                        pixels.current = 1 - pixels.current
                        done = iteration + 1
                        if callback is not None:
                            callback(Step(iteration, stage, losses[iteration], pixels, started))
                        bar.advance(stage, losses[iteration])
            except KeyboardInterrupt:
                interrupted = True
        finished, lost = result(), int(pixels.images().isfinite().logical_not().sum())
        if not finished.losses.isfinite().all():
            warnings.warn(f"the loss is {_first_non_finite(finished.losses)} on", stacklevel=3)
        elif lost:
            warnings.warn(
                f"{lost} pixels are NaN or infinite and are given as they were when the last stage began", stacklevel=3
            )
        return finished

    def _iterate(
        self,
        pixels: Pixels,
        targets: Tensor,
        views: Tensor,
        losses: Tensor,
        scale: LossScale | None,
        number: int,
        plain: bool = False,
        measures: bool = False,
    ) -> Tensor | None:
        """One iteration, from the images of this number of the pair. All that changes from one to the next is read from
        the device, so that a CUDA graph of it can be replayed. Returns the importance of the kept patches, if it
        measures."""
        view = None if plain else views.index_select(0, pixels.steps)[0]
        keep, attention = pixels.packed_keep, None
        if type(self.objective) is deep_inversion:
            patches, cells, inverse = kernels.gather_patches(
                pixels.pair[number], keep.positions, keep.cu_seqlens, view, patch_size=pixels.patch_size,
                dtype=self.fast.compute_dtype, return_inverse=True, backend=self.fast.backend,
            )  # fmt: skip
            tokens = PackedTokens(patches.requires_grad_(), cells, keep.cu_seqlens, keep.max_seqlen)
            logits = self._forward_patches(tokens, grid_size=pixels.grid_size, return_attention=measures)
            logits, attention = logits if measures else (logits, None)
            loss = self.objective.classification(logits, targets)
            grad = _gradient(loss, patches, scale)
            inverse = None if plain else inverse
            terms = {"tv_l2": self.objective.tv_l2, "l2": self.objective.l2}
            loss = loss.detach() + pixels.step(number, grad, inverse=inverse, view=view, **terms)
        else:
            images = pixels.pair[number].detach().requires_grad_()
            logits = self._forward(images, keep, view=view, return_attention=measures)
            logits, attention = logits if measures else (logits, None)
            loss = self.objective.loss(logits, images, targets, pixels.kept_pixels)
            grad = _gradient(loss, images, scale)
            pixels.step(number, pixels.kept.gather(grad.contiguous()))
        losses.index_copy_(0, pixels.steps - 1, loss.detach().to(losses.dtype).view(1))
        return attention

    def _draw_views(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """(iterations, 3) or (iterations, B, 3) int32."""
        count = self.iterations * (batch_size if self.view_per_image else 1)
        views = random_views(count, self.image_size, jitter=self.jitter, flip=self.flip, generator=generator)
        return views.view(self.iterations, batch_size, 3) if self.view_per_image else views

    def _check_targets(self, targets: Tensor | Sequence[int]) -> Tensor:
        targets = torch.as_tensor(targets)
        if targets.ndim != 1 or len(targets) == 0:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected (B,) with at least one")
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(f"targets are {targets.dtype}, expected integers")
        num_classes = self.fast.model.num_classes
        wrong = ((targets < 0) | (targets >= num_classes)).nonzero()
        if len(wrong):
            number = int(wrong[0])
            raise ValueError(
                f"target {int(targets[number])} (number {number}) is no class of the model's {num_classes}"
            )
        return targets.long()

    def _check_weights(self) -> None:
        names, parameters = zip(*self.fast.model.named_parameters(), strict=True)
        counts = torch.stack([parameter.detach().isfinite().logical_not().sum() for parameter in parameters]).tolist()
        for name, count in zip(names, counts, strict=True):
            if count:
                raise ValueError(f"the model's weight {name} holds {count} values that are NaN or infinite")

    def _bar(self) -> _Bar:
        return _Bar(
            total=self.iterations,
            disable=not self.progress,
            desc="inverting",
            unit="it",
            dynamic_ncols=True,
            mininterval=0.5,
        )


class Pixels:
    """The images under optimisation, in normalised space, and their optimiser's state, which has kept patches only.

    Two batches of images take turns: a step reads one and writes the kept pixels of the other. Stopped pixels are equal
    in both and out of the optimiser's reach, so that nothing can change them.
    """

    def __init__(self, inverter: Inverter, batch_size: int, generator: torch.Generator, device: torch.device):
        rows, columns = inverter.grid_size
        height, width = inverter.image_size
        channels = len(inverter.mean)
        self.patch_size = (height // rows, width // columns)
        self.grid_size = (rows, columns)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (inverter.mean, inverter.std))
        self.lowest, self.highest = (-self.mean / self.std).flatten(), ((1 - self.mean) / self.std).flatten()
        self.adam = {"lr": inverter.lr, "betas": inverter.betas}
        self.backend = inverter.fast.backend
        # drawn on the CPU, so that every device starts from the same noise
        images = torch.randn(batch_size, channels, height, width, generator=generator).to(device)
        self.pair = (images, images.clone())
        self.current = 0  # which of the pair the next step reads
        self.steps = torch.zeros(1, dtype=torch.int64, device=device)
        self.begun = images.clone()  # finite images from when the stage began
        self._keep(torch.arange(rows * columns, device=device).expand(batch_size, -1))
        moments = images.new_zeros(2, batch_size * rows * columns, images[0].numel() // (rows * columns))
        self.moments = tuple(moments)

    def _keep(self, keep: Tensor | list[Tensor]) -> None:
        if isinstance(keep, Tensor):
            self.packed_keep = PackedTokens.from_batch(None, keep)
            self.count: float = keep.shape[1]  # kept patches an image, in the mean
        else:
            lengths = [len(row) for row in keep]
            self.packed_keep = PackedTokens.from_sequences(None, keep)
            self.count = sum(lengths) / len(lengths)
        self.kept = KeptPixels(self.packed_keep, self.grid_size, self.patch_size)
        self.sites = kernels.patch_sites(self.packed_keep.positions, self.packed_keep.cu_seqlens, self.grid_size)

    def keep(self) -> Tensor | list[Tensor]:
        """The kept patches: (B, K) int64, or a list where images differ, for which the host waits."""
        return self.packed_keep.indices()

    @property
    def kept_pixels(self) -> KeptPixels | None:
        """What the objective is told: None while nothing is stopped."""
        return None if self.count == self.grid_size[0] * self.grid_size[1] else self.kept

    def images(self) -> Tensor:
        """All images as they are now: (B, C, H, W) in normalised space."""
        return self.pair[self.current]

    def _finite(self) -> Tensor:
        """`images`, but pixels that are NaN or infinite as they were when the stage began."""
        return torch.where(self.images().isfinite(), self.images(), self.begun)

    def step(self, number: int, grad: Tensor, **prior) -> Tensor:
        """One step of Adam on the kept patches, from the images of that number to the others, then into the range of
        real pixels. Returns the prior, and takes the rest of its arguments, as `kernels.pixel_step`."""
        return kernels.pixel_step(
            self.pair[1 - number], *self.moments, self.steps, self.pair[number], grad, self.sites, self.lowest,
            self.highest, patch_size=self.patch_size, backend=self.backend, **self.adam, **prior,
        )  # fmt: skip

    @torch.no_grad()
    def stop(self, attention: Tensor, stop: float | Mass) -> None:
        """Go on with the patches that matter by their importance, (B, K) or packed (T,); leave the others for good."""
        rows = torch.arange(len(self.sites), dtype=torch.int32, device=self.sites.device)
        how = {"mass": stop.share} if isinstance(stop, Mass) else {"fraction": stop}
        kept = select_patches(attention, replace(self.packed_keep, positions=rows), backend=self.backend, **how)
        rows = kept.flatten() if isinstance(kept, Tensor) else torch.cat(kept)
        self.moments = tuple(moment[rows] for moment in self.moments)
        self.pair[1 - self.current].copy_(self.images())  # of which stopped pixels are a step behind
        self.begun = self._finite()
        positions = self.packed_keep.positions[rows].long()
        self._keep(
            positions.view(kept.shape) if isinstance(kept, Tensor) else list(positions.split([len(k) for k in kept]))
        )

    @torch.no_grad()
    def results(self) -> Tensor:
        """The images in [0, 1], stopped patches black: (B, C, H, W)."""
        patches = (self.kept.gather(self._finite()) * self.std + self.mean).clamp(0, 1)
        return self.kept.scatter(patches, torch.zeros_like(self.images()))


def _gradient(loss: Tensor, of: Tensor, scale: LossScale | None) -> Tensor:
    """The gradient of a scalar loss, which is scaled for the backward pass where float16 needs it."""
    if scale is None:
        return torch.autograd.grad(loss, of)[0]
    return scale.unscale(torch.autograd.grad(loss * scale.value, of)[0])


def _first_non_finite(losses: Tensor) -> str:
    """Such as "nan from iteration 12", of losses (iterations,) of which one is not finite."""
    first = int((~losses.isfinite()).nonzero()[0])
    return f"{losses[first].item()} from iteration {first}"


class _Bar(tqdm):
    """A progress bar that shows the loss a few times a second, as of when it has arrived on the host: nothing waits."""

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
