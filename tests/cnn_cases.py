"""What the tests of CNNs share: models with statistics at random, images, and DeepInversion's loss written out."""

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.backbones.base import Outputs
from smi_fast.backbones.cnn import CNN
from smi_fast.grid import PatchGrid
from smi_fast.models import cifar10_resnet20
from smi_fast.packed import PackedTokens


def at_random(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model in evaluation mode without the time that its own initialisation takes, as if it had been trained."""
    with torch.device("meta"):
        model = build()
    model = model.to(dtype).to_empty(device="cpu").eval()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.num_batches_tracked.zero_()
            nn.init.uniform_(weight, 0.5, 1.5)
        elif weight is not None:
            nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model


def small_cnn(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A ResNet-8 with 10 classes. It takes images of any size that 4 divides."""
    return at_random(lambda: cifar10_resnet20(False, depth=8, **options), dtype)


def outputs(backbone: CNN, images: Tensor, features: tuple[str, ...] = ("batch_norm",)) -> Outputs:
    """The outputs for images (B, C, H, W), with what the inversion loop adds to them."""
    patches = PackedTokens.from_batch(images.flatten(1)[:, None], torch.zeros(1, device=images.device))
    found = backbone.outputs(patches, grid_size=(1, 1), features=features)
    grid = PatchGrid.of(images.shape[-2:], images.shape[-2:])
    return Outputs(found.logits, None, {}, found.backend, patches, grid, batch_norm=found.batch_norm)


def batch_norm_inputs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """The logits, and the input, running mean and running variance of each BatchNorm in the order of the calls. They
    are read where torch computes BatchNorm, without hooks."""
    found, batch_norm = [], F.batch_norm

    def spy(z, mean, var, *args, **kwargs):
        found.append((z, mean, var))
        return batch_norm(z, mean, var, *args, **kwargs)

    with mock.patch.object(F, "batch_norm", spy):
        return model(images), found


def statistics_distance(found: list[tuple[Tensor, Tensor, Tensor]], first: float) -> Tensor:
    """R = first * r_1 + r_2 + ..., where r = ||running variance - biased variance|| + ||running mean - mean||."""
    total = 0.0
    for number, (z, running_mean, running_var) in enumerate(found):
        values = z.transpose(0, 1).flatten(1)  # (C, B * H * W)
        mean = values.sum(1) / values.shape[1]
        var = (values - mean[:, None]).pow(2).sum(1) / values.shape[1]
        distance = ((running_var - var) ** 2).sum().sqrt() + ((running_mean - mean) ** 2).sum().sqrt()
        total = total + (first if number == 0 else 1.0) * distance
    return total


def neighbour_differences(images: Tensor) -> list[Tensor]:
    """The differences of neighbours: to the right, down, and along both diagonals."""
    right = images[..., 1:] - images[..., :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    return [right, down, images[..., 1:, 1:] - images[..., :-1, :-1], images[..., 1:, :-1] - images[..., :-1, 1:]]


def deep_inversion_loss(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    batch_norm: float = 0.01,
    first_batch_norm: float = 10.0,
    tv_l1: float = 0.0,
    tv_l2: float = 1e-4,
    l2: float = 1e-5,
    l2_norm: str = "image",
) -> Tensor:
    """DeepInversion's loss by its definition, of the images as the model sees them."""
    logits, found = batch_norm_inputs(model, images)
    loss = -logits.log_softmax(1)[torch.arange(len(images)), targets].mean()
    loss = loss + batch_norm * statistics_distance(found, first_batch_norm)
    for difference in neighbour_differences(images):
        loss = loss + tv_l2 * (difference**2).sum().sqrt() + tv_l1 * difference.abs().mean()
    norms = (images**2).sum((1, 2, 3))
    return loss + l2 * (norms.sqrt().mean() if l2_norm == "image" else norms.sum().sqrt())
