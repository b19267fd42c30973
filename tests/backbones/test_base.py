"""The protocol of a backbone: any model that fulfils it is inverted by the same loop."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smi_fast import Inverter, deep_inversion
from smi_fast.backbones.base import Backbone, Outputs, frozen
from smi_fast.grid import PatchGrid
from smi_fast.inversion.meter import confidences, iteration_flops
from smi_fast.inversion.priors import total_variation
from smi_fast.inversion.views import apply_view, random_views


class SmallCNN(nn.Module):
    """A CNN with BatchNorm: an image is one patch of its grid, so that it arrives whole, jittered and mirrored."""

    device, compute_dtype, patch_dtype, backend = torch.device("cpu"), torch.float32, torch.float32, "auto"
    num_channels, image_size, num_classes, num_prefix_tokens = 3, (8, 8), 4, 0
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4)
        )

    def grid(self, image_size):
        return PatchGrid.of(image_size, image_size)

    def outputs(self, patches, *, grid_size=None, importance=False, features=()):
        return Outputs(self.layers(patches.values.view(-1, 3, 8, 8)))

    def cast_weights(self, *, pack=True):
        return nullcontext()


def test_a_cnn_is_inverted_as_by_a_loop_of_its_own(seed):
    model = SmallCNN()
    assert isinstance(model, Backbone)
    options = {"stopping": "dense", "iterations": 8, "lr": 0.05, "betas": (0.5, 0.9), "jitter": 1 / 4}
    result = Inverter(model, objective=deep_inversion(1e-2), progress=False, **options).run([3, 1], seed)

    generator = torch.Generator().manual_seed(seed)
    views = random_views(8, (8, 8), jitter=1 / 4, generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
    optimizer, losses = torch.optim.Adam([images], lr=0.05, betas=(0.5, 0.9)), []
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    with frozen(model):
        for view in views.tolist():
            logits = model.layers(apply_view(images, view))
            loss = F.cross_entropy(logits, torch.tensor([3, 1])) + 1e-2 * total_variation(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images.data = torch.minimum(torch.maximum(images.data, -mean / std), (1 - mean) / std)
            losses.append(loss.item())
    torch.testing.assert_close(result.losses, torch.tensor(losses), rtol=1e-4, atol=1e-4)
    # Where a gradient is all but zero, rounding decides Adam's first steps.
    assert ((result.images - (images.detach() * std + mean)).abs() > 1e-3).float().mean() < 0.01


def test_a_cnn_is_measured_as_any_backbone(seed):
    model = SmallCNN()
    inverter = Inverter(model, stopping="dense", iterations=2, progress=False)
    result = inverter.run([3, 1], seed)
    products = 64 * 8 * 27 + 8 * 64 * 4  # multiply-adds of the convolution and of the Linear
    assert iteration_flops(inverter, result.history[0], batch_size=2) == 2 * 2 * 2 * products
    got, predicted = confidences(model, result.images, result.keep, result.targets, model.mean, model.std)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        expected = model.eval().layers((result.images - mean) / std).softmax(1)
    torch.testing.assert_close(got, expected[[0, 1], [3, 1]])
    assert torch.equal(predicted, expected.argmax(1))


def test_a_backbone_that_measures_no_importance_stops_nothing(seed):
    with pytest.raises(ValueError, match="leaves no patch"):
        Inverter(SmallCNN(), stopping={2: 0.3}, iterations=4, progress=False)
