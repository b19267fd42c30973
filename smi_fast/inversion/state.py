"""InversionState: everything that an inversion carries from one iteration to the next, in a form that can be saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smi_fast import kernels
from smi_fast.backbones.pruning import Mass, keep_highest
from smi_fast.grid import PatchGrid
from smi_fast.inversion.checks import check_same_settings, check_same_targets, check_state
from smi_fast.inversion.scaling import LossScale
from smi_fast.inversion.schedule import Release
from smi_fast.kernels.rows import cumulative_lengths
from smi_fast.packed import PackedTokens, all_patches

VERSION = 3  # the version of the dicts that `state_dict` returns, here and in `Slots`
PARTS = ("positions", "cu_seqlens")  # the tensors of patches without values


@dataclass(frozen=True)
class Stage:
    """Iterations between two stoppings or changes of the resolution, which all have the same shapes."""

    start: int  # first iteration
    end: int  # the iteration after the last one
    patches: float | None  # kept patches per image, on average if images differ; None if a `Mass` is yet to decide
    tokens: float | None  # patches and prefix tokens per image
    pooling: int = 1  # the model sees means of squares of this many pixels a side


class InversionState:
    """The images under optimisation, Adam's memory of them, and the progress of the schedule.

    Two batches of images take turns: a step reads one and writes the pixels that move of the other. Stopped pixels are
    equal in both batches, and no step writes them, so they never change.

    Args:
        images: (B, C, H, W) float32, the images that the inversion starts from, in the model's normalised space.
        targets: (B,) int64, the classes, or (B, classes) float32, soft labels.
        views: (iterations, 3) or (iterations, B, 3) int32, the view (dy, dx, flip) of each iteration.
        grid: the patch grid of the images.
        mean, std: the model's normalisation, one number per channel.
        clamp: whether steps keep the pixels in the range of real images.
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
        clock: (1,) int64, `iteration` on the device.
        lr: the learning rate of the stage, or a schedule of learning rates by Adam's steps, as `kernels.pixel_step`
            takes it. The loop sets it.
        released: the patches that left as finished sparse images, for each `Release` that was reached.
        confident: for each image, the number of checks in a row in which the model was sure of its target.
        pooling: the model sees means of squares of this many pixels a side.
        numbers, ages: for each image, its number in the run, and the iterations that it has done.
        clocks: (B,) int64, `ages` on the device if the images have views of their own, otherwise None.
        importance: (T,) float32, the importance of the kept patches if the last iteration measured it, otherwise None.
        losses: (iterations,) float32 on the device.
        one: () float32, the number 1 on the device.
        history: the stages that have begun.
        verified: the records of the verifier, (iteration, accuracy).
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        views: Tensor,
        grid: PatchGrid,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        clamp: bool,
        iterations: int,
        seed: int,
        scales_loss: bool,
        all_move: bool = False,
        settings: Mapping[str, Any],
    ):
        (batch_size, channels), device = images.shape[:2], images.device
        self.grid, self.targets, self.seed, self.settings = grid, targets, seed, dict(settings)
        self.views, self.lr = views, 0.0
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.lowest, self.highest = (-self.mean / self.std).flatten(), ((1 - self.mean) / self.std).flatten()
        if not clamp:
            self.lowest, self.highest = self.lowest - math.inf, self.highest + math.inf
        self.iteration = 0
        self.pair = (images, images.clone())
        self.current = 0  # which of the pair the next step reads
        self.begun = images.clone()  # the images when the stage began, all of them finite
        moments = batch_size * grid.num_patches, channels * grid.patch_size[0] * grid.patch_size[1]
        self.exp_avg, self.exp_avg_sq = images.new_zeros(2, *moments)
        self.steps = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.importance: Tensor | None = None
        self.losses = torch.zeros(iterations, device=device)
        self.released: list[PackedTokens] = []
        self.confident = [0] * batch_size
        self.pooling = 1
        self.numbers, self.ages = list(range(batch_size)), [0] * batch_size
        self.clocks: Tensor | None = None
        self.one = torch.ones((), device=device)
        self.history: list[Stage] = []
        self.verified: list[tuple[int, float]] = []
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
        self.mask = self.grid.mask(patches).contiguous()  # `put` writes it

    @property
    def batch_size(self) -> int:
        return len(self.targets)

    @property
    def patches(self) -> float:
        """Kept patches per image, on average if images differ."""
        return self.keep.max_seqlen if self.keep.is_uniform else len(self.keep.positions) / self.batch_size

    def view(self) -> Tensor:
        """Return the view of this iteration, (3,) or (B, 3) int32, read on the device."""
        if self.clocks is None:
            return self.views.index_select(0, self.clock)[0]
        rows = self.clocks.clamp(max=len(self.views) - 1)  # images whose iterations are over wait for the next check
        return self.views.gather(0, rows.view(1, -1, 1).expand(1, -1, 3))[0]

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
    def results(self) -> Tensor:
        """Return the images (B, C, H, W) in [0, 1], with stopped patches black. Those that `released` holds come first:
        ((releases + 1) * B, C, H, W)."""
        pixels = self.whole_results()
        return torch.cat([torch.where(self.grid.mask(keep), pixels, 0.0) for keep in (*self.released, self.keep)])

    def kept(self) -> Tensor | list[Tensor]:
        """Return the patches of `results`: (N, K) int64, or a list of N index tensors if images differ."""
        rows = [row for keep in (*self.released, self.keep) for row in keep.indices()]
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows

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
            lr=self.lr,
            **how,
        )

    @torch.no_grad()
    def stop(self, scores: Tensor, stop: float | Mass | Release, backend: str) -> None:
        """Go on with the patches of the highest scores (T,). The other patches never change again, unless all patches
        move. At a `Release`, the patches of the highest scores are the ones that leave."""
        every = torch.arange(len(self.keep.positions), dtype=torch.int32, device=self.sites.device)
        if isinstance(stop, Release):
            chosen = self._release(every, scores, stop, backend)
        else:
            chosen = keep_highest(replace(self.keep, positions=every), scores, stop, backend=backend)
        rows = chosen.positions.long()
        if not self.all_move:
            self.exp_avg, self.exp_avg_sq = self.exp_avg[rows], self.exp_avg_sq[rows]
        self.pair[1 - self.current].copy_(self.images())  # stopped pixels are one step behind there
        self.begun = self.finite_images()
        self.importance = None
        self._keep_only(replace(chosen, positions=self.keep.positions[rows]))

    def _release(self, every: Tensor, scores: Tensor, release: Release, backend: str) -> PackedTokens:
        """Let the patches of the highest scores leave as finished images. Return the rows of the patches that stay."""
        counts = [release.leaving(count) for count in self.keep.lengths()]
        leaving = PackedTokens(
            *kernels.select_tokens(
                scores, None, every, cu_seqlens=self.keep.cu_seqlens, max_seqlen=self.keep.max_seqlen, k=counts,
                backend=backend,
            )
        )  # fmt: skip
        rows = leaving.positions.long()
        self.released.append(replace(leaving, positions=self.keep.positions[rows]))
        lengths = [length - count for length, count in zip(self.keep.lengths(), counts, strict=True)]
        # The host knows how many stay, and would wait for the device to count the elements of a mask.
        stays = torch.zeros_like(every).index_fill_(0, rows, 1).argsort(stable=True)[: sum(lengths)]
        return PackedTokens(None, stays.int(), cumulative_lengths(lengths, every.device), max(lengths))

    def restart(self) -> None:
        """Forget Adam's moments and steps."""
        for tensor in (self.exp_avg, self.exp_avg_sq, self.steps):
            tensor.zero_()
        self.begun = self.finite_images()

    def record(self, loss: Tensor) -> None:
        """Keep the scalar loss of this iteration, and let the clock go on."""
        self.losses.index_copy_(0, self.clock, loss.to(self.losses.dtype).view(1))
        self.clock.add_(1)
        if self.clocks is not None:
            self.clocks.add_(1)

    def advance(self) -> None:
        """Count a step as done. The next step reads the images that it has written."""
        self.iteration += 1
        self.current = 1 - self.current
        self.ages = [age + 1 for age in self.ages]

    def take(self, images: Sequence[int]) -> InversionState:
        """Return a state of some of the images, all of which keep equally many patches."""
        taken, rows = copy.copy(self), torch.tensor(list(images), dtype=torch.int64, device=self.targets.device)
        taken.pair = tuple(batch[rows] for batch in self.pair)
        taken.views = self.views[:, rows]
        for name in ("begun", "targets", "steps", "clocks"):
            setattr(taken, name, getattr(self, name)[rows])
        for name in ("exp_avg", "exp_avg_sq"):
            setattr(taken, name, self._by_image(getattr(self, name))[rows].flatten(0, 1))
        for name in ("numbers", "ages", "confident"):
            setattr(taken, name, [getattr(self, name)[image] for image in images])
        taken.released = [PackedTokens.from_batch(None, keep.indices()[rows]) for keep in self.released]
        taken._keep_only(PackedTokens.from_batch(None, self.keep.indices()[rows]))
        return taken

    def put(self, slot: int, other: InversionState, image: int) -> None:
        """Put an image of another state, with the same numbers of patches, in the place of one of these, in the same
        memory."""
        for batch in self.pair:
            batch[slot] = other.images()[image]
        self.views[:, slot] = other.views[:, image]
        for name in ("begun", "targets", "steps", "clocks"):
            getattr(self, name)[slot] = getattr(other, name)[image]
        for name in ("exp_avg", "exp_avg_sq"):
            self._by_image(getattr(self, name))[slot] = other._by_image(getattr(other, name))[image]
        for name in ("numbers", "ages", "confident"):
            getattr(self, name)[slot] = getattr(other, name)[image]
        for ours, theirs in zip((*self.released, self.keep), (*other.released, other.keep), strict=True):
            self._by_image(ours.positions)[slot] = other._by_image(theirs.positions)[image]
        self.sites.copy_(self.grid.sites(self.keep))
        self.mask.copy_(self.grid.mask(self.keep))

    def _by_image(self, packed: Tensor) -> Tensor:
        """View (B * K, ...) as (B, K, ...)."""
        return packed.view(self.batch_size, len(packed) // max(self.batch_size, 1), *packed.shape[1:])

    @property
    def kind(self) -> str:
        """Whose state this is: that of a run, or of the images in the slots of a stream."""
        return "run" if self.clocks is None else "slots"

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that an inversion needs to go on: tensors on their device, numbers, texts, None,
        lists and dicts, so that `torch.load(..., weights_only=True)` can read it. The views are drawn again from the
        seed and are not part of it."""
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
            **{f"released_{n}_{name}": getattr(keep, name) for n, keep in enumerate(self.released) for name in PARTS},
        }
        return {
            "version": VERSION,
            "kind": self.kind,
            "settings": dict(self.settings),
            "seed": self.seed,
            "iteration": self.iteration,
            "max_seqlen": self.keep.max_seqlen,
            "released": [keep.max_seqlen for keep in self.released],
            "numbers": list(self.numbers),
            "ages": list(self.ages),
            "confident": list(self.confident),
            "history": [list(astuple(stage)) for stage in self.history],
            "verified": [list(record) for record in self.verified],
            "importance": None if self.importance is None else self.importance.clone(),
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state_dict(),
            **{name: tensor.detach().clone() for name, tensor in tensors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, on the device of this state.

        Raises:
            TypeError, ValueError: this is no state, a state of another kind or version, or one of other targets,
                another seed or other settings. The message names the difference, and this state is unchanged.
        """
        check_state(state, self.kind, VERSION)
        device = self.targets.device
        tensors = {name: value.to(device, copy=True) for name, value in state.items() if isinstance(value, Tensor)}
        check_same_settings(self.settings | {"seed": self.seed}, state["settings"] | {"seed": state["seed"]})
        check_same_targets(self.targets, tensors["targets"])
        self.iteration = state["iteration"]
        self.pair, self.current = (tensors["images"], tensors["images"].clone()), 0
        for name in ("begun", "steps", "exp_avg", "exp_avg_sq"):
            setattr(self, name, tensors[name])
        self.importance = tensors.get("importance")
        self.losses[: self.iteration] = tensors["losses"]
        self.clock.fill_(self.iteration)
        self.ages, self.confident = list(state["ages"]), list(state["confident"])
        if self.clocks is not None:
            self.clocks = torch.tensor(self.ages, device=device)
        self.released = [
            PackedTokens(None, *(tensors[f"released_{n}_{name}"] for name in PARTS), longest)
            for n, longest in enumerate(state["released"])
        ]
        self.history = [Stage(*stage) for stage in state["history"]]
        self.verified = [tuple(record) for record in state["verified"]]
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(state["loss_scale"])
        self._keep_only(PackedTokens(None, tensors["positions"], tensors["cu_seqlens"], state["max_seqlen"]))
