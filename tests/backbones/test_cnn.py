"""CNN: any network of whole images as a backbone, and what Inverter makes of a model that it is given."""

from contextlib import suppress

import pytest
import timm
import torch
import torchvision
from cnn_cases import at_random, outputs, small_cnn
from torch import nn

from smi_fast import CNN, AcceleratedViT, Inverter, UnsupportedModelError
from smi_fast.backbones.base import Backbone
from smi_fast.backbones.conversion import as_backbone
from smi_fast.models import CIFAR10_MEAN, CIFAR10_STD
from smi_fast.packed import PackedTokens


@pytest.fixture
def model(seed) -> nn.Module:
    return small_cnn()


@pytest.mark.parametrize("image_size", [(8, 8), (16, 16)])
def test_logits_are_those_of_the_model(model, image_size):
    images = torch.randn(3, 3, *image_size, dtype=torch.float64)
    backbone = CNN(model, channels_last=False)
    assert torch.equal(outputs(backbone, images, ()).logits, model(images))
    assert torch.equal(backbone(images), model(images))


def test_images_that_are_not_square_keep_their_proportions(model):
    backbone, images = CNN(model, image_size=(8, 16)), torch.randn(2, 3, 16, 32, dtype=torch.float64)
    assert backbone.grid((16, 32)).image_size == (16, 32)
    torch.testing.assert_close(outputs(backbone, images, ()).logits, model(images))
    with pytest.raises(ValueError, match=r"32x16 pixels.* image_size=\(32, 16\)"):
        backbone.grid((32, 16))


def test_channels_last_changes_no_number(model):
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    seen = []
    hook = model.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    got = CNN(model)(images)
    hook.remove()
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, model(images))


def test_the_settings_of_the_data_are_the_models():
    with torch.device("meta"):
        timms, torchvisions = (
            timm.create_model("regnetx_002", num_classes=4),
            torchvision.models.resnet18(num_classes=4),
        )
    backbones = [CNN(small_cnn()), *(CNN(at_random(lambda m=m: m), image_size=(32, 32)) for m in (timms, torchvisions))]
    assert [(b.mean, b.std) for b in backbones] == [
        (CIFAR10_MEAN, CIFAR10_STD),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    assert [b.num_classes for b in backbones] == [10, 4, 4]
    assert backbones[0].image_size == (32, 32)
    assert CNN(at_random(lambda: torchvisions, torch.float32)).image_size == (224, 224)
    assert all(isinstance(backbone, Backbone) for backbone in backbones)


def test_a_model_of_other_channels_says_how_many():
    model = small_cnn(in_chans=5)
    assert CNN(model).num_channels == 5
    with pytest.raises(ValueError, match="mean has 3 values, the model has 5 channels"):
        Inverter(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_autocast(seed, dtype):
    model = small_cnn(torch.float32)
    backbone, images = CNN(model, dtype, channels_last=False), torch.randn(4, 3, 8, 8)
    found = outputs(backbone, images)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(found.logits, model(images))
    assert found.logits.dtype == dtype
    assert backbone.compute_dtype == dtype
    exact = outputs(CNN(model), images)
    for layer, expected in zip(found.batch_norm, exact.batch_norm, strict=True):
        assert layer.mean.dtype == layer.var.dtype == torch.float32
        torch.testing.assert_close(layer.mean, expected.mean, rtol=0.1, atol=0.05)
        torch.testing.assert_close(layer.var, expected.var, rtol=0.1, atol=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_inverter_takes_cnns_and_vits_and_refuses_the_rest(model):
    assert as_backbone(model).model is model
    assert isinstance(as_backbone(timm.create_model("test_vit")), AcceleratedViT)
    backbone = CNN(model)
    assert as_backbone(backbone) is backbone
    with torch.device("meta"):
        convnext = timm.create_model("convnext_atto")
    for other, name in ((convnext, "ConvNeXt"), (nn.Linear(3, 4), "Linear")):
        with pytest.raises(UnsupportedModelError, match=f"{name}, .*nor is it a CNN with BatchNorm2d"):
            Inverter(other)
    with pytest.raises(ValueError, match="bfloat16"):
        as_backbone(backbone, torch.bfloat16)


def test_a_model_without_batch_norm_is_wrapped_by_hand_and_has_no_statistics(seed):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    backbone, images = CNN(model, image_size=(8, 8)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(outputs(backbone, images, ()).logits, model(images))
    with pytest.raises(UnsupportedModelError, match="no BatchNorm2d"):
        outputs(backbone, images)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(x), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 4)), r"cannot run on an image of shape \(1, 3, 224, 224\): mat1"),
        (nn.Conv2d(3, 4, 3), r"to \(1, 4, 222, 222\), expected \(1, classes\)"),
        (TwoOutputs(), "to tuple, expected"),
        (nn.Flatten(), "Flatten without weights"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        CNN(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": torch.int8}, "torch.int8"), ({"dtype": torch.float32}, "float64"), ({"backend": "cuda"}, "cuda")],
)
def test_wrong_settings_are_refused_with_their_value(model, options, message):
    with pytest.raises(ValueError, match=message):
        CNN(model, **options)


def test_what_a_cnn_does_not_have_is_refused_by_name(model):
    backbone, images = CNN(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    patches = PackedTokens.from_batch(images.flatten(1)[:, None], torch.zeros(1))
    with pytest.raises(ValueError, match=r"'blocks\.0'"):
        backbone.outputs(patches, features=("blocks.0",))
    with pytest.raises(UnsupportedModelError, match="no attention"):
        backbone.outputs(patches, importance=True)
    two = PackedTokens.from_batch(images.flatten(1).view(2, 2, 96), torch.arange(2))
    with pytest.raises(ValueError, match="4 patches of 96 values are not 2 images"):
        backbone.outputs(two)


def test_cudnn_is_deterministic_and_exact_during_a_run_only(model, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)

    def settings():
        exact = cudnn.conv.fp32_precision == "ieee" if hasattr(cudnn, "conv") else not cudnn.allow_tf32
        return cudnn.deterministic, cudnn.benchmark, exact

    before = settings()
    with suppress(KeyboardInterrupt), CNN(model).cast_weights():
        assert settings() == (True, False, True)
        raise KeyboardInterrupt
    assert settings() == before == (False, True, False)


def test_modes_and_gradients_of_the_model_are_as_before(model):
    model.train()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Inverter(model, stopping="dense", iterations=2, image_size=(8, 8), progress=False).run([1, 2])
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
