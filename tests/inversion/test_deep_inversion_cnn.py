"""DeepInversion's loss of CNNs, against its definition and, where there is one, the published code."""

import ast
import os
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from cnn_cases import at_random, deep_inversion_loss, outputs, small_cnn
from torch import nn
from torchvision import models as torchvisions

from smi_fast import CNN, Inverter, UnsupportedModelError, deep_inversion_cnn
from smi_fast.backbones.base import frozen
from smi_fast.inversion.views import apply_view, random_views

IMAGENET = {"tv_l1": 1e-2}
CIFAR10 = dict(batch_norm=10.0, first_batch_norm=1.0, tv_l2=2.5e-5, l2=1e-3, l2_norm="batch")
CHECKOUT = os.environ.get("SMI_FAST_DEEP_INVERSION")  # a work tree of the authors' code


def vgg() -> nn.Module:
    model = torchvisions.vgg11_bn(num_classes=5)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 5)  # without 100 M parameters
    return model


def regnet() -> nn.Module:
    with torch.device("cpu"):  # it computes its widths with tensors
        return torchvisions.regnet_y_400mf(num_classes=5)


class Unreached(nn.Module):
    """A model whose BatchNorm layer is never called."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(192, 5), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.fc(x.flatten(1))


def timms(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=5)


MODELS = {
    **{f"timm {name}": partial(timms, name) for name in ("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0")},
    "timm regnetx_002": partial(timms, "regnetx_002"),
    "torchvision vgg11_bn": vgg,
    **{
        f"torchvision {name}": partial(getattr(torchvisions, name), num_classes=5)
        for name in ("resnet18", "mobilenet_v2", "efficientnet_b0")
    },
    "torchvision regnet_y_400mf": regnet,
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_the_definition(seed, name):
    model = at_random(MODELS[name])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, 1])
    backbone = CNN(model, image_size=(32, 32))
    with frozen(backbone):
        for settings in (IMAGENET, CIFAR10):
            loss = deep_inversion_cnn(**settings).loss(outputs(backbone, images), targets)
            expected = deep_inversion_loss(model, images, targets, **settings)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(*(torch.autograd.grad(value, images)[0] for value in (loss, expected)))


def test_soft_labels_are_the_mean_over_classes_of_their_losses(seed):
    backbone, images = CNN(small_cnn()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    soft = torch.rand(2, 10).double().softmax(1)
    found, objective = outputs(backbone, images), deep_inversion_cnn()
    got = objective.loss(found, soft)
    hard = [objective.loss(found, torch.full((2,), label)) for label in range(10)]
    entropy = -(soft * found.logits.log_softmax(1)).sum(1).mean()
    rest = hard[0] - nn.functional.cross_entropy(found.logits, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(got, entropy + rest)


def test_gradients_of_the_second_order_are_right(seed):
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    backbone, objective = CNN(model.eval(), image_size=(3, 3)), deep_inversion_cnn(batch_norm=1, tv_l2=0.1, l2=0.1)
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: objective.loss(outputs(backbone, x), torch.tensor([2, 0])), x)


def test_a_run_equals_a_loop_with_torchs_adam(seed):
    model, targets = small_cnn(torch.float32), torch.tensor([3, 1])
    options = {"iterations": 8, "lr": 0.05, "betas": (0.5, 0.9), "jitter": 1 / 4, "image_size": (8, 8)}
    objective = deep_inversion_cnn(**CIFAR10)
    result = Inverter(model, objective=objective, stopping="dense", progress=False, **options).run(targets, seed)

    generator = torch.Generator().manual_seed(seed)
    views = random_views(8, (8, 8), jitter=1 / 4, generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
    optimizer, losses = torch.optim.Adam([images], lr=0.05, betas=(0.5, 0.9)), []
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with frozen(model):
        for view in views.tolist():
            loss = deep_inversion_loss(model, apply_view(images, view), targets, **CIFAR10)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            images.data = torch.minimum(torch.maximum(images.data, -mean / std), (1 - mean) / std)
            losses.append(loss.item())
    torch.testing.assert_close(result.losses, torch.tensor(losses), rtol=1e-4, atol=1e-4)
    # Where a gradient is all but zero, rounding decides Adam's first steps.
    assert ((result.images - (images.detach() * std + mean)).abs() > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_seed_gives_the_same_bits_also_after_a_resume(seed, dtype):
    inverter = Inverter(
        small_cnn(torch.float32),
        objective=deep_inversion_cnn(batch_norm=1),
        stopping="dense",
        iterations=6,
        image_size=(8, 8),
        dtype=dtype,
        progress=False,
    )
    states = {}
    first = inverter.run([3, 1], seed, lambda step: states.setdefault(step.iteration, step.state_dict()))
    assert first.losses.isfinite().all()
    for again in (inverter.run([3, 1], seed), inverter.run([3, 1], seed, state=states[2])):
        assert torch.equal(again.images, first.images)
        assert torch.equal(again.losses, first.losses)


def test_priors_see_the_images_before_they_are_rounded(seed):
    found = []

    class OfPrior:
        def loss(self, outputs, targets):
            found.append(outputs.seen()[0].detach())
            return outputs.logits.float().sum()

    options = {"stopping": "dense", "iterations": 1, "image_size": (8, 8), "progress": False}
    Inverter(small_cnn(torch.float32), objective=OfPrior(), dtype=torch.bfloat16, **options).run([1], seed)
    generator = torch.Generator().manual_seed(seed)
    view = random_views(1, (8, 8), generator=generator)[0].tolist()
    assert torch.equal(found[0], apply_view(torch.randn(1, 3, 8, 8, generator=generator), view))


def test_half_precision_gives_nearly_the_same_loss_and_gradient(seed):
    model, images = small_cnn(torch.float32), torch.randn(4, 3, 8, 8)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = images.clone().requires_grad_()
        loss = deep_inversion_cnn(batch_norm=1).loss(outputs(CNN(model, dtype), x), torch.arange(4))
        found[dtype] = loss.detach(), torch.autograd.grad(loss, x)[0]
    (loss, grad), (half, half_grad) = found.values()
    torch.testing.assert_close(half, loss, rtol=2e-2, atol=0)
    assert torch.cosine_similarity(grad.flatten(), half_grad.flatten(), dim=0) > 0.99


def test_without_its_term_no_statistics_are_asked_for(seed):
    assert deep_inversion_cnn(batch_norm=0).features == ()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model, targets = small_cnn(), torch.tensor([4, 1])
    loss = deep_inversion_cnn(batch_norm=0).loss(outputs(CNN(model), images, ()), targets)
    torch.testing.assert_close(loss, deep_inversion_loss(model, images, targets, batch_norm=0))


def test_models_without_statistics_are_refused(seed):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    options = {"objective": deep_inversion_cnn(), "stopping": "dense", "iterations": 2, "progress": False}
    with pytest.raises(UnsupportedModelError, match="no BatchNorm2d"):
        Inverter(CNN(model, image_size=(8, 8)), **options).run([1])
    with pytest.raises(ValueError, match="'batch_norm'"):
        Inverter(timm.create_model("test_vit"), **options).run([1])
    with pytest.raises(ValueError, match="reaches no BatchNorm2d"):
        Inverter(CNN(Unreached(), image_size=(8, 8)), **options).run([1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": -1.0}, "batch_norm must be at least 0 and finite, got -1"),
        ({"first_batch_norm": float("nan")}, "first_batch_norm"),
        ({"tv_l1": float("inf")}, "tv_l1"),
        ({"l2_norm": "pixel"}, "'pixel'"),
    ],
)
def test_wrong_settings_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        deep_inversion_cnn(**options)


def published(path: Path, *names: str) -> list:
    """Functions and classes of a published file, without what its import needs."""
    found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
    scope = {"torch": torch, "nn": nn}
    exec(compile(ast.Module(found, []), str(path), "exec"), scope)
    return [scope[name] for name in names]


@pytest.mark.skipif(CHECKOUT is None, reason="needs SMI_FAST_DEEP_INVERSION, a work tree of the published code")
@pytest.mark.parametrize("name", ["timm resnet18", "torchvision mobilenet_v2"])
def test_the_published_hook_and_priors_give_the_same_loss_and_gradient(seed, name):
    path = Path(CHECKOUT) / "deepinversion.py"
    hook_class, priors = published(path, "DeepInversionFeatureHook", "get_image_prior_losses")
    model, targets = at_random(MODELS[name]), torch.tensor([4, 1, 0])
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    ours = deep_inversion_cnn(tv_l1=1e-2).loss(outputs(CNN(model, image_size=(32, 32)), images), targets)
    hooks = [hook_class(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    loss = nn.functional.cross_entropy(model(images), targets)
    tv_l1, tv_l2 = priors(images)
    r = sum((10 if number == 0 else 1) * hook.r_feature for number, hook in enumerate(hooks))
    l2 = torch.norm(images.view(3, -1), dim=1).mean()
    theirs = loss + 1e-4 * tv_l2 + 1e-2 * tv_l1 + 0.01 * r + 1e-5 * l2
    for hook in hooks:
        hook.close()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, images)[0] for value in (ours, theirs)))


def test_adam_begins_anew_only_where_the_resolution_changes(seed):
    given = Inverter(small_cnn(torch.float32), pooling={0: 1, 2: 1, 4: 2, 5: 2}, iterations=6, progress=False)
    assert [(stage.start, stage.pooling) for stage in given.stages] == [(0, 1), (4, 2)]
    assert given.pooling == {4: 2}


def test_a_resolution_too_low_for_the_model_is_refused_before_the_run(seed):
    layers = nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = CNN(nn.Sequential(*layers), image_size=(16, 16))
    with pytest.raises(UnsupportedModelError, match=r"cannot run on an image of shape \(1, 3, 4, 4\)"):
        Inverter(model, pooling={0: 4, 2: 1}, iterations=4)
    assert Inverter(model, pooling={0: 2, 2: 1}, iterations=4).pooling == {0: 2, 2: 1}
