"""Forward passes of whole models, and what they cost with their backward pass, dense and on kept patches, against
timm."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from duel import OURS
from plain_loop import forward_flops
from torch import Tensor, nn

from smi_fast import accelerate

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Pass:
    """A forward pass of a model of random weights in one dtype, and its backward pass if gradients are named."""

    model: str
    batch: int
    dtype: torch.dtype
    kept: int | None = None  # of 196 patches; None: all
    gradients: str | None = None  # "images" with frozen weights, or "weights"

    def __str__(self) -> str:
        kept = "all" if self.kept is None else f"{self.kept} of 196"
        gradients = "" if self.gradients is None else f", gradients of {self.gradients}"
        return f"{self.model}, batch {self.batch}, {kept} patches, {str(self.dtype).removeprefix('torch.')}{gradients}"

    def setup(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor | None]:
        """The model, images and kept patches that all contestants share. Weights are in the compute dtype, which costs
        none of them a cast on the way."""
        model = timm.create_model(self.model).eval().to(device, self.dtype)
        model.requires_grad_(self.gradients == "weights")
        images = torch.randn(self.batch, 3, 224, 224, device=device, dtype=self.dtype)
        images.requires_grad_(self.gradients == "images")
        keep = None if self.kept is None else torch.rand(self.batch, 196, device=device).argsort(1)[:, : self.kept]
        return model, images, keep


def cases(
    models: tuple[str, ...], batch: int, kept: tuple[int | None, ...], gradients: tuple[str | None, ...] = (None,)
) -> list[Pass]:
    dtypes = (torch.float32, torch.bfloat16)
    return [Pass(*case) for case in product(models, (batch,), dtypes, kept, gradients)]


TINY, BASE = "deit_tiny_patch16_224", "deit_base_patch16_224"


def run(model: nn.Module, *args) -> Tensor:
    with torch.no_grad():
        return model(*args)


def run_with_gradients(model: nn.Module, inputs: list[Tensor], *args) -> tuple[Tensor, ...]:
    """Return the logits, and the gradient of the first of the inputs for which gradients are computed."""
    logits = model(*args)
    return logits, torch.autograd.grad(logits.float().square().sum(), inputs)[0]


ALL_GRADIENTS = (None, "images", "weights")


def passes(case: Pass, forms: dict[str, Callable], model: nn.Module, *args: Tensor) -> dict[str, Callable]:
    """A round of each form of the model: the forward pass, with the backward pass that the case asks for."""
    if case.gradients is None:
        return {name: partial(run, form, *args) for name, form in forms.items()}
    inputs = [args[0]] if case.gradients == "images" else list(model.parameters())
    return {name: partial(run_with_gradients, form, inputs, *args) for name, form in forms.items()}


@pytest.mark.contest(
    contestants=[OURS, "timm", "timm, torch.compile"],
    cpu=cases((TINY, BASE), 8, (None,), ALL_GRADIENTS),
    cuda=cases((TINY, BASE), 128, (None,), ALL_GRADIENTS),
)
def test_dense(case, device, enter):
    def contestants():
        model, images, _ = case.setup(device)
        forms = {OURS: accelerate(model), "timm": model}
        if device.type == "cuda":
            forms["timm, torch.compile"] = torch.compile(model)
        return passes(case, forms, model, images)

    enter("dense forward", contestants, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(
    contestants=[OURS, "timm's blocks", "timm's blocks, torch.compile"],
    cpu=cases((TINY, BASE), 8, (46,), ALL_GRADIENTS),
    cuda=cases((TINY, BASE), 128, (137, 95, 66, 46), ALL_GRADIENTS),
)
def test_sparse(case, device, enter):
    """Against timm's own modules run on the tokens of the same patches, gathered behind the position embedding."""

    def contestants():
        model, images, keep = case.setup(device)
        fast = accelerate(model)

        def ours(images: Tensor, keep: Tensor) -> Tensor:
            return fast(images, keep=keep)

        def gathered(images: Tensor, keep: Tensor) -> Tensor:
            x = model._pos_embed(model.patch_embed(images))
            rows = torch.cat((keep.new_zeros(len(keep), 1), keep + 1), dim=1)
            x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
            return model.forward_head(model.norm(model.blocks(model.norm_pre(x))))

        forms = {OURS: ours, "timm's blocks": gathered}
        if device.type == "cuda":
            forms["timm's blocks, torch.compile"] = torch.compile(gathered)
        return passes(case, forms, model, images, keep)

    enter("sparse forward", contestants, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(
    contestants=[OURS, "timm dense", "timm dense, torch.compile"],
    cpu=cases((TINY, BASE), 8, (46,)),
    cuda=[Pass(model, 128, torch.bfloat16, 46) for model in (TINY, BASE)],
)
def test_what_sparsity_gains(case, device, enter):
    """46 patches against all of them, to set beside the ratio of operations. Outputs differ and are not compared."""

    def contestants():
        model, images, keep = case.setup(device)
        fast = accelerate(model)
        forms = {OURS: partial(run, lambda images, keep: fast(images, keep=keep), images, keep)}
        forms["timm dense"] = partial(run, model, images)
        if device.type == "cuda":
            forms["timm dense, torch.compile"] = partial(run, torch.compile(model), images)
        return forms

    with torch.device("meta"):
        width = timm.create_model(case.model).embed_dim
    flops, dense_flops = (case.batch * forward_flops(1 + kept, width) for kept in (case.kept, 196))
    facts = {"floor_flops": flops, "floor_bytes": 0, "dense_flops": dense_flops}
    enter("sparse forward beside dense", contestants, facts)


TOME_REDUCTION = 16


@pytest.mark.contest(
    contestants=[OURS, "ToMe"],
    cpu=cases((TINY,), 8, (104,)),
    cuda=cases((TINY, BASE), 128, (104,)),
)
def test_tome(case, device, enter, request):
    """Against token merging with r = 16, whose blocks see as many tokens in the mean as ours of 104 kept patches do
    (105). The two compute different things: speed is compared here, not accuracy."""
    checkout: Path | None = request.config.option.tome_checkout

    def contestants():
        model, images, keep = case.setup(device)
        sys.path.insert(0, str(checkout))
        try:
            tome = importlib.import_module("tome")
        finally:
            sys.path.remove(str(checkout))
        merging = timm.create_model(case.model).eval().to(device, case.dtype)
        merging.load_state_dict(model.state_dict())
        tome.patch.timm(merging)
        merging.r = TOME_REDUCTION
        fast = accelerate(model)
        ours = partial(run, lambda images, keep: fast(images, keep=keep), images, keep)
        return {OURS: ours, "ToMe": partial(run, merging, images)}

    if checkout is None:
        pytest.skip("needs --tome-checkout")
    enter("forward of 105 tokens in the mean", contestants)
