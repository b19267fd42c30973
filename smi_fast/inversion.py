"""Inverter: the loop that turns noise into images of a class, on fewer and fewer patches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from smi_fast.keep import PackedKeep, uniform_keep
from smi_fast.objectives import KeptPixels, Loss, Objective, as_objective, deep_inversion
from smi_fast.stopping import StoppingSchedule, select_patches
from smi_fast.views import random_views
from smi_fast.vit import AcceleratedViT, accelerate


@dataclass(frozen=True)
class Stage:
    """Iterations between two stoppings, which all have the same shapes."""

    start: int  # first iteration
    end: int  # one behind the last
    patches: int  # kept patches an image
    tokens: int  # patches and prefix tokens an image


@dataclass(frozen=True)
class Step:
    """What a callback is told after an iteration. Nothing in it has synchronised."""

    iteration: int  # from 0
    stage: Stage
    loss: Tensor  # scalar, on the device
    _pixels: Pixels = field(repr=False)
    _started: float = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens per image in this iteration."""
        return self.stage.tokens

    @property
    def keep(self) -> Tensor:
        """The patches still inverted, (B, K) int64."""
        return self._pixels.keep

    def images(self) -> Tensor:
        """The images as they are now: (B, C, H, W) in [0, 1], stopped patches black."""
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
        images: (B, C, H, W) float32 in [0, 1] on the CPU, stopped patches black.
        keep: (B, K) int64, the patches that were never stopped.
        targets: (B,) int64.
        losses: (iterations,) float32, of every iteration that ran.
        history: the stages that ran, the last one cut short where the run was interrupted.
        patch_size: (height, width) of a patch in pixels.
        interrupted: whether Ctrl-C ended the run early.
    """

    images: Tensor
    keep: Tensor
    targets: Tensor
    losses: Tensor
    history: list[Stage]
    patch_size: tuple[int, int]
    interrupted: bool = False


class Inverter:
    """Sparse model inversion of a timm ViT (Hu et al., ICML 2024).

    Pixels are optimised with Adam until the model is sure of each image's target class. At each stopping the class
    token's attention in the last block picks the patches that go on; the others leave the forward and the backward pass
    and keep their pixels for good.

    Args:
        model: a timm model that `accelerate` takes, or an `AcceleratedViT`. It is in evaluation mode and its weights
            are frozen while `run` runs; both are as they were afterwards.
        stopping: when patches are stopped; None: the paper's schedule.
        objective: what is minimised: `deep_inversion(...)`, a function of (logits, images, targets), or an `Objective`.
        iterations: optimiser steps.
        lr, betas: of Adam.
        jitter: views are rolled by up to this share of the image's side, in either direction.
        flip: probability that a view is mirrored.
        view_per_image: draw a view for each image, not one for the batch as the published code does.
        image_size: (height, width) in pixels; None: the model's.
        mean, std: the model's normalisation, per channel; None: from timm's data config of the model.
        dtype, backend: passed to `accelerate`; not for a model that is accelerated already.
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
        stopping: StoppingSchedule | None = None,
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
        seed: int = 0,
        progress: bool = True,
    ):
        if isinstance(iterations, bool) or not isinstance(iterations, int):
            raise TypeError(f"iterations must be an integer, got {iterations!r}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
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
        self.stopping = StoppingSchedule.paper() if stopping is None else stopping
        self.objective = as_objective(deep_inversion() if objective is None else objective)
        self.iterations, self.lr, self.betas = iterations, lr, betas
        self.jitter, self.flip, self.view_per_image = jitter, flip, view_per_image
        self.seed, self.progress = seed, progress

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
        self.grid_size = self.fast.grid_size(self.image_size)
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
            Stage(start, end, patches, patches + prefix)
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
        """
        device = self.fast.model.patch_embed.proj.weight.device
        targets = self._check_targets(targets).to(device)
        self._check_weights()
        losses = torch.zeros(self.iterations, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        views = self._draw_views(len(targets), generator).to(device)
        pixels = Pixels(self, len(targets), generator, device)
        interrupted, done, attention = False, 0, None
        with frozen(self.fast), self._bar() as bar:
            started = time.perf_counter()
            try:
                for stage in self.stages:
                    if stage.start:
                        fraction = self.stopping.stops[stage.start]
                        pixels.stop(select_patches(attention, fraction=fraction, backend=self.fast.backend))
                    for iteration in range(stage.start, stage.end):
                        measures = iteration + 1 in self.stopping.stops
                        plain = measures or iteration in self.stopping.stops
                        images = pixels.images()
                        output = self.fast(
                            images,
                            pixels.packed_keep,
                            view=None if plain else views[iteration],
                            return_attention=measures,
                        )
                        logits, attention = output if measures else (output, None)
                        loss = self.objective.loss(logits, images, targets, pixels.kept_pixels)
                        pixels.step(loss)
                        losses[iteration] = loss.detach()
                        done = iteration + 1
                        if callback is not None:
                            callback(Step(iteration, stage, losses[iteration], pixels, started))
                        bar.advance(stage, losses[iteration])
            except KeyboardInterrupt:
                interrupted = True
        history = [replace(stage, end=min(stage.end, done)) for stage in self.stages if stage.start < done]
        losses = losses[:done].cpu()
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            warnings.warn(f"the loss is {losses[first].item()} from iteration {first} on", stacklevel=2)
        return InversionResult(
            pixels.results().cpu(), pixels.keep.cpu(), targets.cpu(), losses, history, pixels.patch_size, interrupted
        )

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
        for name, parameter in self.fast.model.named_parameters():
            if not parameter.isfinite().all():
                count = int((~parameter.isfinite()).sum())
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
    """The images under optimisation: kept patches as one parameter with its Adam state, everything else at rest.

    Stopped pixels lie in `canvas`, out of the optimiser's reach, so that nothing can change them.
    """

    def __init__(self, inverter: Inverter, batch_size: int, generator: torch.Generator, device: torch.device):
        rows, columns = inverter.grid_size
        height, width = inverter.image_size
        channels = len(inverter.mean)
        self.patch_size = (height // rows, width // columns)
        self.grid_size = (rows, columns)
        # drawn on the CPU, so that every device starts from the same noise
        self.canvas = torch.randn(batch_size, channels, height, width, generator=generator).to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (inverter.mean, inverter.std))
        self.lowest, self.highest = -self.mean / self.std, (1 - self.mean) / self.std
        self.keep = torch.arange(rows * columns, device=device).expand(batch_size, -1)  # [B, K]
        self.lr, self.betas = inverter.lr, inverter.betas
        self._pack()
        self.patches = nn.Parameter(self.kept.gather(self.canvas))  # [T, C, ph, pw]
        self.optimizer = self._adam()

    def _adam(self) -> torch.optim.Adam:
        return torch.optim.Adam([self.patches], lr=self.lr, betas=self.betas, fused=True)

    def _pack(self) -> None:
        self.packed_keep: PackedKeep = uniform_keep(self.keep)
        self.kept = KeptPixels(self.keep, self.grid_size, self.patch_size)

    @property
    def kept_pixels(self) -> KeptPixels | None:
        """What the objective is told: None while nothing is stopped."""
        return None if self.keep.shape[1] == self.grid_size[0] * self.grid_size[1] else self.kept

    def images(self) -> Tensor:
        """All images (B, C, H, W) in normalised space; only the kept patches carry a gradient."""
        return _Place.apply(self.patches, self.canvas, self.kept)

    def step(self, loss: Tensor) -> None:
        """One step of Adam on the kept patches, then into the range of real pixels."""
        (self.patches.grad,) = torch.autograd.grad(loss, self.patches)
        self.optimizer.step()
        with torch.no_grad():
            self.patches.clamp_(self.lowest, self.highest)

    @torch.no_grad()
    def stop(self, kept: Tensor) -> None:
        """Go on with the patches at the places `kept` (B, K') int64 of `keep`, and leave the others for good."""
        rows = (torch.arange(len(kept), device=kept.device)[:, None] * self.keep.shape[1] + kept).flatten()
        state = self.optimizer.state[self.patches]
        state = {name: value if value.ndim == 0 else value[rows] for name, value in state.items()}
        self.kept.scatter(self.patches, self.canvas)
        self.keep, self.patches = self.keep.gather(1, kept), nn.Parameter(self.patches[rows])
        self._pack()
        self.optimizer = self._adam()
        self.optimizer.state[self.patches] = state

    @torch.no_grad()
    def results(self) -> Tensor:
        """The images in [0, 1], stopped patches black: (B, C, H, W)."""
        return self.kept.scatter((self.patches * self.std + self.mean).clamp(0, 1), torch.zeros_like(self.canvas))


class _Place(torch.autograd.Function):
    """Kept patches (T, C, ph, pw) put in their places among the stopped ones: images (B, C, H, W)."""

    @staticmethod
    def forward(ctx, patches: Tensor, canvas: Tensor, kept: KeptPixels) -> Tensor:
        ctx.kept = kept
        return kept.scatter(patches, canvas.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.kept.gather(grad.contiguous()), None, None


class _Bar(tqdm):
    """A progress bar that reads the loss only when it draws, a few times a second."""

    def advance(self, stage: Stage, loss: Tensor) -> None:
        if self.disable:
            return
        if time.monotonic() - getattr(self, "_shown", 0.0) > 0.5 or self.n + 1 == self.total:
            self._shown = time.monotonic()
            self.set_postfix(tokens=stage.tokens, loss=f"{loss.item():.3f}", refresh=False)
        self.update()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no weight asks for a gradient; afterwards, also after an error, all as it was."""
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, value in requires_grad:
            parameter.requires_grad_(value)
