"""Every architecture that timm lists in its modules vision_transformer and deit is quantised as Eq. 5 has it.

The walk of a quantised model is checked before calibration ends, against timm's own modules. Afterwards its integers,
units and folded factors are checked against the same walk on real numbers that are rounded by Eq. 5 at every place.
"""

import pytest
import timm
import torch
from backbones.test_coverage import NAMES, error, timm_on_tokens
from quantization_cases import on_real_numbers
from torch import nn

from smi_fast.quantization import QuantizedViT, quantize


def small(name: str, **options) -> nn.Module:
    return timm.create_model(name, depth=1, embed_dim=32, num_heads=2, **options)


def architecture(name: str) -> tuple:
    """What the forward pass of a model depends on, apart from sizes."""
    with torch.device("meta"):
        model = small(name)
    modules = [(path, type(part), getattr(part, "approximate", None)) for path, part in model.named_modules()]
    attributes = ("global_pool", "pool_include_prefix", "no_embed_class", "has_class_token", "num_reg_tokens")
    return tuple(modules), *(getattr(model, name) for name in attributes), model.patch_embed.strict_img_size


@pytest.fixture(scope="module")
def names() -> dict[tuple, str]:
    """One name for each architecture."""
    return {architecture(name): name for name in reversed(NAMES)}


def random_model(name: str) -> nn.Module:
    """A small model with a grid of 3 x 4 patches, float64, every weight random."""
    with torch.device("meta"):
        height, width = small(name).patch_embed.patch_size
    model = small(name, img_size=(3 * height, 4 * width), num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


def test_every_architecture_is_timms_until_calibration_ends_and_eq_5_afterwards(names, seed, tmp_path):
    for name in names.values():
        print(name)
        model = random_model(name)
        images, keep = torch.randn(3, 3, *model.patch_embed.img_size).double(), [torch.randperm(12)[:n] for n in (3, 7)]
        observing = QuantizedViT(model, 4, 6)
        alone = torch.cat([timm_on_tokens(model, images[i : i + 1], keep[i][None]) for i in range(2)])
        assert error(observing(images), model(images)) < 1e-9, name
        assert error(observing(images[:2], keep=keep), alone) < 1e-9, name

        quantized = quantize(model, images, 4, 6)
        reference = on_real_numbers(quantized, QuantizedViT(model, 4, 6))
        for kept in (None, torch.stack([torch.randperm(12)[:5] for _ in range(2)]), keep):
            logits, expected = quantized(1.1 * images[:2], keep=kept), reference(1.1 * images[:2], keep=kept)
            assert error(logits, expected) < 1e-9, name
        quantized.save(tmp_path / "model.safetensors", overwrite=True)
        loaded = QuantizedViT.load(tmp_path / "model.safetensors")
        assert torch.equal(loaded(images[:2], keep=keep), quantized(images[:2], keep=keep)), name
