"""Objectives and priors: whatever form a loss has, it goes through the same loop."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from inversion_cases import small_model
from torch import nn

from smi_fast import Inverter, deep_inversion
from smi_fast.backbones.base import Outputs
from smi_fast.inversion.priors import ImagePrior, l2_norm, total_variation
from smi_fast.inversion.views import apply_view, random_views

OPTIONS = {"stopping": {3: 0.3}, "iterations": 6, "lr": 0.05, "progress": False, "dtype": torch.float32}


@pytest.fixture
def model(seed) -> nn.Module:
    return small_model()


def cross_entropy(logits, images, targets):
    return F.cross_entropy(logits, targets)


def with_priors(logits, images, targets):
    """What `deep_inversion(1e-2, 1e-3)` is before anything is stopped, as a function of a user's."""
    return F.cross_entropy(logits, targets) + 1e-2 * total_variation(images) + 1e-3 * l2_norm(images)


@dataclass(frozen=True)
class Smoothed(deep_inversion):
    """A subclass, whose targets are smoothed."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs.logits, targets, label_smoothing=0.2)


class OfFeatures:
    """An objective that reads a place within the model, and has a prior of its own."""

    features = ("blocks.0",)
    prior = ImagePrior(1e-2)

    def loss(self, outputs, targets):
        tokens = outputs.features["blocks.0"]
        assert tokens.positions[:2].tolist() == [-1, 0]
        return tokens.values.square().mean() + F.cross_entropy(outputs.logits, targets)


def run(model, seed, **options):
    return Inverter(model, **OPTIONS | options).run([0, 3, 1], seed)


def assert_same(result, expected, exactly=False):
    assert torch.equal(result.keep, expected.keep)
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(result.losses, expected.losses, **tolerance)


def test_a_users_loss_with_the_prior_is_deep_inversion(model, seed):
    expected = run(model, seed, objective=deep_inversion(1e-2, 1e-3))
    assert_same(run(model, seed, objective=cross_entropy, prior=ImagePrior(1e-2, 1e-3)), expected, exactly=True)
    dense = {"stopping": "dense", "objective": deep_inversion(1e-2, 1e-3)}
    assert_same(run(model, seed, objective=with_priors, stopping="dense"), run(model, seed, **dense))


def test_a_prior_of_the_users_sees_the_kept_pixels(model, seed):
    def prior(images, kept):
        return 1e-2 * total_variation(images, kept) + 1e-3 * l2_norm(images, kept)

    expected = run(model, seed, objective=deep_inversion(1e-2, 1e-3))
    assert_same(run(model, seed, objective=cross_entropy, prior=prior), expected)


def test_a_subclass_decides_the_loss_and_keeps_the_prior(model, seed):
    def smoothed(logits, images, targets):
        return F.cross_entropy(logits, targets, label_smoothing=0.2)

    expected = run(model, seed, objective=smoothed, prior=ImagePrior(1e-2))
    assert_same(run(model, seed, objective=Smoothed(1e-2)), expected, exactly=True)
    assert not torch.equal(expected.losses, run(model, seed, objective=deep_inversion(1e-2)).losses)


def test_an_objective_reads_features_with_their_gradient(model, seed):
    images = []

    def note(step):
        images.append(step.state_dict()["images"])

    Inverter(model, objective=OfFeatures(), **OPTIONS | {"stopping": "dense", "jitter": 0, "flip": 0}).run(
        [0, 3], seed, note
    )
    x = images[0].requires_grad_()
    first = []
    hook = model.blocks[0].register_forward_hook(lambda module, args, output: first.append(output))
    loss = F.cross_entropy(model(x), torch.tensor([0, 3])) + first[0].square().mean() + 1e-2 * total_variation(x)
    hook.remove()
    expected = torch.autograd.grad(loss, x)[0]
    # Adam's second step goes along the mean of two gradients, so its direction tells the second one's sign where it is
    # as large as the first; a loss without the features' gradient has other signs at a quarter of the pixels.
    moved = images[1] - images[0].detach()
    large = expected.abs() > expected.abs().quantile(0.9)
    assert (moved[large].sign() == -expected[large].sign()).float().mean() > 0.9


def test_each_images_own_loss_does_not_depend_on_its_batch(model, seed):
    options = {"objective": deep_inversion(1e-2, 1e-3, norm="image"), "jitter": 0, "flip": 0, "stopping": "dense"}
    together = Inverter(model, **OPTIONS | options)
    state = {}
    result = together.run([0, 3, 1], seed, lambda step: state.setdefault(step.iteration, step.state_dict()))
    for image, target in enumerate([0, 3, 1]):
        own = dict(state[0], targets=torch.tensor([target]), cu_seqlens=torch.tensor([0, 16]).int())
        for name in ("images", "begun", "steps"):
            own[name] = state[0][name][image : image + 1]
        for name in ("exp_avg", "exp_avg_sq", "positions"):
            own[name] = state[0][name][16 * image : 16 * (image + 1)]
        alone = Inverter(model, **OPTIONS | options).run([target], seed, state=own).images[0]
        difference = (alone - result.images[image]).abs()
        assert difference.mean() < 1e-4
        assert difference.median() < 1e-6


def test_more_classes_than_the_kernels_compute_have_a_loss_too(seed):
    logits, targets = torch.randn(2, 21841), torch.tensor([3, 21840])
    loss = deep_inversion().loss(Outputs(logits, backend="triton"), targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))


def test_what_is_no_objective_or_prior_is_refused(model):
    with pytest.raises(TypeError, match="42"):
        Inverter(model, objective=42)
    with pytest.raises(TypeError, match="43"):
        Inverter(model, prior=43)


def test_an_objective_sees_the_images_as_the_model_does(model, seed):
    """The expected images are rolled and mirrored whole, and blacked out where no patch is kept."""
    found = []

    class OfSeen:
        def loss(self, outputs, targets):
            images, kept = outputs.seen()
            found.append((images.detach(), kept))
            return total_variation(images, kept) + 0 * outputs.logits.sum()

    options = OPTIONS | {"stopping": {2: 0.5}, "jitter": 1 / 2, "flip": 0.5, "iterations": 5}
    steps = []
    Inverter(model, objective=OfSeen(), prior=None, **options).run(
        [0, 1], seed, callback=lambda step: steps.append(step.state_dict())
    )
    generator = torch.Generator().manual_seed(seed)
    views = random_views(5, (8, 8), jitter=1 / 2, flip=0.5, generator=generator)
    (images, kept), before = found[0], torch.randn(2, 3, 8, 8, generator=generator)
    assert kept.all()
    assert torch.equal(images, apply_view(before, views[0].tolist()))
    images, kept = found[4]
    assert kept.float().mean() == 0.5
    seen = apply_view(steps[3]["images"], views[4].tolist())
    assert torch.equal(images, torch.where(kept, seen, 0.0))
