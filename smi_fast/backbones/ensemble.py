"""Ensemble: several ViTs that are inverted, and teach, as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from smi_fast.backbones.base import Outputs
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.grid import PatchGrid
from smi_fast.packed import Keep, PackedTokens

# What all members must have in common, and the ensemble has too.
COMMON = (
    "num_classes", "num_channels", "image_size", "mean", "std", "num_prefix_tokens", "device", "compute_dtype",
    "patch_dtype", "backend",
)  # fmt: skip


class Ensemble(nn.Module):
    """Several ViTs as one model, which `Inverter` and `distill` take.

    Its logits are the mean of the members' logits, as in one-shot federated learning (Zhang et al., NeurIPS 2022, Eq. 1
    with equal weights). The importance of a patch is the mean of its importance for the members, so that a patch goes
    on if it matters to the members together.

    Args:
        models: timm models that `accelerate` takes, or `AcceleratedViT`s. Their weights are shared, not copied.
        dtype, backend: see `accelerate`. They cannot be given with models that are accelerated already.

    Raises:
        TypeError: a model is given in the place of a list.
        ValueError: there is no model, or the models differ in their classes, patches, images or normalisation. The
            message names what differs. Or see `accelerate`.
        UnsupportedModelError: see `accelerate`.
    """

    def __init__(self, models: Sequence[nn.Module], dtype: torch.dtype | None = None, backend: str = "auto"):
        super().__init__()
        if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
            raise TypeError(f"an ensemble takes a list of models, got a {type(models).__name__}")
        models = list(models)
        if not models:
            raise ValueError("an ensemble needs at least one model")
        if (dtype is not None or backend != "auto") and any(isinstance(model, AcceleratedViT) for model in models):
            raise ValueError(f"a model is accelerated already: dtype={dtype} and backend={backend!r} come too late")
        self.members = nn.ModuleList(
            model if isinstance(model, AcceleratedViT) else accelerate(model, dtype, backend) for model in models
        )
        first = self.members[0]
        for member in self.members[1:]:
            for name in COMMON:
                if getattr(member, name) != getattr(first, name):
                    raise ValueError(
                        f"the models differ in {name}: one has {getattr(first, name)}, another {getattr(member, name)}"
                    )
            ours, theirs = (model.grid(first.image_size).patch_size for model in (first, member))
            if ours != theirs:
                raise ValueError(f"the models differ in patch_size: one has {ours}, another {theirs}")
        named = [names for member in self.members if (names := _label_names(member)) is not None]
        for names in named[1:]:
            if names != named[0]:
                raise ValueError(f"the models differ in their classes: one has {named[0]}, another {names}")

    def __getattr__(self, name: str):
        # Modules may move after this, so what they have in common is asked of them each time.
        return getattr(self.members[0], name) if name in COMMON else super().__getattr__(name)

    def grid(self, image_size: Sequence[int]) -> PatchGrid:
        """Return the patch grid of images of (H, W) pixels.

        Raises:
            ValueError: a member does not take images of this size.
        """
        grid, *_ = (member.grid(image_size) for member in self.members)
        return grid

    def forward(self, images: Tensor, keep: Keep | None = None) -> Tensor:
        """Map normalised images (B, C, H, W), or their kept patches, to the mean of the members' logits (B, classes).

        `keep` is as for `AcceleratedViT.forward`.
        """
        return torch.stack([member(images, keep=keep) for member in self.members]).mean(0)

    def outputs(
        self,
        patches: PackedTokens,
        *,
        grid_size: tuple[int, int] | None = None,
        importance: bool = False,
        features: Sequence[str] = (),
    ) -> Outputs:
        """Run all members on patches, as the `Backbone` protocol asks.

        Raises:
            ValueError: features are asked for, which an ensemble has none of; or see `AcceleratedViT.outputs`.
        """
        if features:
            raise ValueError(f"an ensemble has no features, and {', '.join(features)} were asked for")
        found = [member.outputs(patches, grid_size=grid_size, importance=importance) for member in self.members]
        return Outputs(
            torch.stack([outputs.logits for outputs in found]).mean(0),
            torch.stack([outputs.importance for outputs in found]).mean(0) if importance else None,
            backend=self.backend,
        )

    @contextmanager
    def cast_weights(self, *, pack: bool = True) -> Iterator[None]:
        """Return a context in which the weights of all members are cast and laid out only once."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.cast_weights(pack=pack))
            yield


def _label_names(model: AcceleratedViT) -> list[str] | None:
    """Return the names of a model's classes, in the order of its logits, or None if it does not know them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return None if names is None else list(names)
