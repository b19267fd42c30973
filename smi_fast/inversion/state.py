"""InversionState: everything that an inversion carries from one iteration to the next, in a form that can be saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smi_fast import kernels
from smi_fast.backbones.pruning import Mass, keep_highest
from smi_fast.grid import PatchGrid
from smi_fast.inversion.scaling import LossScale
from smi_fast.packed import PackedTokens, all_patches

VERSION = 1  # the version of the dict that `state_dict` returns


@dataclass(frozen=True)
class Stage:
    """Iterations between two stoppings, which all have the same shapes."""

    start: int  # first iteration
    end: int  # the iteration after the last one
    patches: float | None  # kept patches per image, on average if images differ; None if a `Mass` is yet to decide
    tokens: float | None  # patches and prefix tokens per image


class InversionState:
    """The images under optimisation, Adam's memory of them, and the progress of the schedule.

    Two batches of images take turns: a step reads one and writes the pixels that move of the other. Stopped pixels are
    equal in both batches, and no step writes them, so they never change.

    Args:
        images: (B, C, H, W) float32, the images that the inversion starts from, in the model's normalised space.
        targets: (B,) int64, the classes.
        grid: the patch grid of the images.
        mean, std: the model's normalisation, one number per channel.
        iterations: the number of steps of the whole run.
        seed: the seed of the run's random numbers.
        scales_loss: whether the loss is scaled for its backward pass, as float16 needs it.
        all_move: whether steps go on moving patches that have stopped, as in the published code.
        settings: further settings by name, which must be equal in a run that continues this one: numbers, texts, lists.

    Attributes:
        iteration: the number of steps that are done, which is also the number of the next step.
        keep: the patches that go on, without values. The model sees these.
        moving: the patches that steps move, without values: `keep`, or all patches.
        mask: (B, 1, H, W) bool, the pixels of `moving`.
        exp_avg, exp_avg_sq: (T, C * ph * pw) float32, Adam's moments of the patches that move.
        steps: (B,) int64, the number of Adam's steps of each image.
        importance: (T,) float32, the importance of the kept patches if the last iteration measured it, otherwise None.
        losses: (iterations,) float32 on the device.
        one: () float32, the number 1 on the device.
        history: the stages that have begun.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        grid: PatchGrid,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        iterations: int,
        seed: int,
        scales_loss: bool,
        all_move: bool = False,
        settings: Mapping[str, Any],
    ):
        (batch_size, channels), device = images.shape[:2], images.device
        self.grid, self.targets, self.seed, self.settings = grid, targets, seed, dict(settings)
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.lowest, self.highest = (-self.mean / self.std).flatten(), ((1 - self.mean) / self.std).flatten()
        self.iteration = 0
        self.pair = (images, images.clone())
        self.current = 0  # which of the pair the next step reads
        self.begun = images.clone()  # the images when the stage began, all of them finite
        moments = batch_size * grid.num_patches, channels * grid.patch_size[0] * grid.patch_size[1]
        self.exp_avg, self.exp_avg_sq = images.new_zeros(2, *moments)
        self.steps = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.importance: Tensor | None = None
        self._recorded = torch.zeros(1 + iterations, device=device)  # by the clock, which a step sets to 1 or more
        self.losses = self._recorded[1:]
        self.one = torch.ones((), device=device)
        self.history: list[Stage] = []
        self.loss_scale = LossScale(device) if scales_loss else None
        self.all_move = all_move
        self._move(all_patches(batch_size, grid.num_patches, device))
        self.keep = self.moving

    def _keep_only(self, keep: PackedTokens) -> None:
        self.keep = keep
        if not self.all_move:
            self._move(keep)

    def _move(self, patches: PackedTokens) -> None:
        self.moving = patches
        self.sites = self.grid.sites(patches)
        self.mask = self.grid.mask(patches)

    @property
    def batch_size(self) -> int:
        return len(self.targets)

    @property
    def patches(self) -> float:
        """Kept patches per image, on average if images differ."""
        return self.keep.max_seqlen if self.keep.is_uniform else len(self.keep.positions) / self.batch_size

    @property
    def clock(self) -> Tensor:
        """(1,) int64, `iteration` on the device. All images of a batch begin together, so the first one's is read."""
        return self.steps[:1]

    def images(self) -> Tensor:
        """Return the images as they are now: (B, C, H, W) in normalised space."""
        return self.pair[self.current]

    def finite_images(self) -> Tensor:
        """Return `images` with pixels that are NaN or infinite as they were when the stage began."""
        return torch.where(self.images().isfinite(), self.images(), self.begun)

    @torch.no_grad()
    def whole_results(self) -> Tensor:
        """Return the images (B, C, H, W) in [0, 1], with the pixels of stopped patches."""
        return (self.finite_images() * self.std + self.mean).clamp(0, 1)

    @torch.no_grad()
    def results(self, keep: PackedTokens | None = None) -> Tensor:
        """Return the images (B, C, H, W) in [0, 1], black where no patch of `keep` is, by default `self.keep`."""
        return torch.where(self.grid.mask(keep or self.keep), self.whole_results(), 0.0)

    def gather(self, number: int, view: Tensor | None, dtype: torch.dtype, backend: str) -> tuple[PackedTokens, Tensor]:
        """Gather the kept patches of the images `pair[number]`, seen through a view. Return the patches and the inverse
        of their cells, which `kernels.gather_patches` describes."""
        patches, cells, inverse = kernels.gather_patches(
            self.pair[number],
            self.keep.positions,
            self.keep.cu_seqlens,
            view,
            patch_size=self.grid.patch_size,
            dtype=dtype,
            return_inverse=True,
            backend=backend,
        )
        return replace(self.keep, values=patches, positions=cells), inverse

    def step(self, number: int, grad: Tensor, **how: Any) -> Tensor:
        """Take a step of Adam on the patches that move, from the images `pair[number]` to the other ones, and clamp
        them to the range of real pixels. Return the prior. `how` holds further arguments of `kernels.pixel_step`."""
        return kernels.pixel_step(
            self.pair[1 - number],
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            self.pair[number],
            grad,
            self.sites,
            self.lowest,
            self.highest,
            patch_size=self.grid.patch_size,
            **how,
        )

    @torch.no_grad()
    def stop(self, scores: Tensor, stop: float | Mass, backend: str) -> None:
        """Go on with the patches of the highest scores (T,). Unless all patches move, the others never change again."""
        rows = torch.arange(len(self.keep.positions), dtype=torch.int32, device=self.sites.device)
        kept = keep_highest(replace(self.keep, positions=rows), scores, stop, backend=backend)
        rows = kept.positions.long()
        if not self.all_move:
            self.exp_avg, self.exp_avg_sq = self.exp_avg[rows], self.exp_avg_sq[rows]
        self.pair[1 - self.current].copy_(self.images())  # stopped pixels are one step behind there
        self.begun = self.finite_images()
        self.importance = None
        self._keep_only(replace(kept, positions=self.keep.positions[rows]))

    def record(self, loss: Tensor) -> None:
        """Keep the scalar loss of the iteration whose step was the last one."""
        self._recorded.index_copy_(0, self.clock, loss.to(self._recorded.dtype).view(1))

    def advance(self) -> None:
        """Count a step as done. The next step reads the images that it has written."""
        self.iteration += 1
        self.current = 1 - self.current

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that a run needs to go on: tensors on their device, numbers, lists and dicts, so
        that `torch.load(..., weights_only=True)` can read it. Pass it to `Inverter.run`."""
        tensors = {
            "targets": self.targets,
            "images": self.images(),
            "begun": self.begun,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "steps": self.steps,
            "positions": self.keep.positions,
            "cu_seqlens": self.keep.cu_seqlens,
            "losses": self.losses[: self.iteration],
        }
        return {
            "version": VERSION,
            "settings": dict(self.settings),
            "seed": self.seed,
            "iteration": self.iteration,
            "max_seqlen": self.keep.max_seqlen,
            "history": [list(astuple(stage)) for stage in self.history],
            "importance": None if self.importance is None else self.importance.clone(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
            **{name: tensor.detach().clone() for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, on the device of this state.

        Raises:
            ValueError: the state is of another version, or of a run with other targets, another seed or other settings.
                The message names the difference, and this state is unchanged.
        """
        if state.get("version") != VERSION:
            raise ValueError(f"the state is of version {state.get('version')}, this code reads version {VERSION}")
        device = self.targets.device
        tensors = {name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)}
        ours = self.settings | {"seed": self.seed, "targets": self.targets.tolist()}
        theirs = state["settings"] | {"seed": state["seed"], "targets": tensors["targets"].tolist()}
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise ValueError(f"the state is of a run whose {name} is {theirs.get(name)}, not {value}")
        self.iteration = state["iteration"]
        self.pair, self.current = (tensors["images"].clone(), tensors["images"].clone()), 0
        self.begun, self.steps = tensors["begun"].clone(), tensors["steps"].clone()
        self.exp_avg, self.exp_avg_sq = tensors["exp_avg"].clone(), tensors["exp_avg_sq"].clone()
        self.importance = tensors.get("importance")
        self.losses[: self.iteration] = tensors["losses"]
        self.history = [Stage(*stage) for stage in state["history"]]
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self._keep_only(PackedTokens(None, tensors["positions"], tensors["cu_seqlens"], state["max_seqlen"]))
