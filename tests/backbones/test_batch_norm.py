"""Statistics of BatchNorm layers: their values, their gradients, and hooks that never stay."""

import pytest
import timm
import torch
from cnn_cases import batch_norm_inputs, outputs, small_cnn
from torch import nn

from smi_fast import CNN, UnsupportedModelError


@pytest.fixture
def model(seed) -> nn.Module:
    return small_cnn()


@pytest.fixture
def images(model) -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)


def hooks_of(model: nn.Module) -> list[int]:
    kinds = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_backward_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def test_statistics_are_those_of_every_layers_input(model, images):
    _, expected = batch_norm_inputs(model, images)
    found = outputs(CNN(model), images).batch_norm
    for layer, (z, running_mean, running_var) in zip(found, expected, strict=True):
        assert layer.running_mean is running_mean
        assert layer.running_var is running_var
        torch.testing.assert_close(layer.mean, z.mean((0, 2, 3)))
        torch.testing.assert_close(layer.var, z.transpose(0, 1).flatten(1).var(1, unbiased=False))
        assert model.get_submodule(layer.name).running_mean is running_mean


def test_gradients_of_both_orders_are_right(seed):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    backbone = CNN(model.eval(), image_size=(3, 3))

    def statistics(x):
        layers = outputs(backbone, x).batch_norm
        return sum((layer.mean.sin() * layer.var.cos()).sum() for layer in layers)

    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(statistics, x)
    assert torch.autograd.gradgradcheck(statistics, x)


def test_one_pass_is_exact_where_the_mean_is_large(seed):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = 1000 + torch.randn(4, 3, 8, 8)
    layer = outputs(CNN(model, image_size=(8, 8)), images).batch_norm[0]
    torch.testing.assert_close(layer.var, images.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)


class Reversed(nn.Module):
    """Layers that run in another order than they were made in, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.late, self.never, self.early = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.late(input=self.act(self.early(x))).mean((2, 3))


def test_layers_come_in_the_order_of_modules_and_those_never_reached_are_left_out(images):
    model = Reversed().double().eval()
    found = outputs(CNN(model, image_size=(8, 8)), images).batch_norm
    assert [layer.name for layer in found] == ["late", "early"]
    torch.testing.assert_close(found[1].mean, images.mean((0, 2, 3)))
    late = model.early(images).relu()
    torch.testing.assert_close(found[0].var, late.var((0, 2, 3), correction=0))


def test_the_input_counts_where_a_layer_does_more_than_normalise(seed):
    """timm's BatchNormAct2d applies its activation in place, and a hook of the user's changes what the layer gets."""
    layer = timm.layers.BatchNormAct2d(3).eval()
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(outputs(CNN(model, image_size=(8, 8)), x).batch_norm[0].mean, x.mean((0, 2, 3)))
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    torch.testing.assert_close(outputs(CNN(model, image_size=(8, 8)), x).batch_norm[0].mean, x.mean((0, 2, 3)) + 1)


def test_synchronised_batch_norm_counts_too(model, images):
    expected = outputs(CNN(model), images).batch_norm
    found = outputs(CNN(nn.SyncBatchNorm.convert_sync_batchnorm(model)), images).batch_norm
    for layer, same in zip(found, expected, strict=True):
        torch.testing.assert_close((layer.mean, layer.var), (same.mean, same.var))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_stays_whatever_happens(model, images, error):
    backbone, mine = CNN(model), []
    model.blocks[1].bn1.register_forward_pre_hook(lambda module, args: mine.append(1))
    before = hooks_of(model)
    outputs(backbone, images)
    assert hooks_of(model) == before
    assert len(mine) == 1

    def fail(module, args):
        raise error("stopped")

    handle = model.blocks[2].bn1.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stopped"):
        outputs(backbone, images)
    handle.remove()
    assert hooks_of(model) == before


def test_statistics_that_are_not_asked_for_need_no_hook(model, images):
    during = []
    model.conv1.register_forward_hook(lambda module, args, output: during.append(sum(hooks_of(model))))
    outputs(CNN(model), images, ())
    outputs(CNN(model), images)
    assert during[-1] - during[-2] == 2 * 7  # a hook and its mark on each BatchNorm layer


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.norm(x)).mean((2, 3))


class Detached(Twice):
    def forward(self, x):
        with torch.no_grad():
            return self.norm(x).mean((2, 3))


def pooled(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def checkpointed() -> nn.Module:
    model = timm.create_model("test_resnet", num_classes=4)
    model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pooled(nn.BatchNorm2d(3, track_running_stats=False)), "0 is a BatchNorm without running statistics"),
        (lambda: pooled(nn.BatchNorm2d(3)).train(), "0 is in training mode"),
        (Twice, "norm runs twice"),
        (Detached, "norm runs without gradients"),
        (checkpointed, "gradient checkpointing"),
    ],
)
def test_layers_without_statistics_of_their_own_are_refused_by_name(build, message):
    model = build().double()
    model = model if "training" in message else model.eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match=message):
        outputs(CNN(model, image_size=(32, 32)), images)
    assert not any(hooks_of(model))
