"""Models that the scheme does not cover are refused, with the name of the part."""

import pytest
import torch
from timm.layers import AttentionPoolLatent, SimpleNorm
from torch import nn

from smi_fast import UnsupportedModelError, accelerate
from smi_fast.models import cifar10_vit
from smi_fast.quantization import check_supported, quantize


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda model: setattr(model.blocks[0], "norm1", SimpleNorm(24)), r"blocks\.0\.norm1 is a .*SimpleNorm"),
        (
            lambda model: setattr(model.blocks[0], "norm2", nn.LayerNorm(24, elementwise_affine=False)),
            "norm2 has no weight",
        ),
        (lambda model: setattr(model.blocks[0].mlp, "act", nn.ELU()), r"blocks\.0\.mlp\.act is a .*ELU"),
        (lambda model: setattr(model.blocks[0].mlp, "fc1", nn.Conv2d(24, 96, 1)), r"blocks\.0\.mlp\.fc1 is a .*Conv2d"),
        (lambda model: setattr(model.blocks[0].attn, "gate", nn.Linear(24, 24)), r"blocks\.0\.attn has a gate"),
        (
            lambda model: setattr(model, "head", nn.Sequential(nn.Linear(24, 10), nn.Softmax(-1))),
            r"head\.1 is a .*Softmax",
        ),
        (lambda model: setattr(model, "adapter", nn.Linear(24, 10)), "adapter is a .*Linear"),
        (lambda model: setattr(model.patch_embed, "img_size", None), "patch_embed has no img_size"),
        (lambda model: setattr(model.patch_embed, "dynamic_img_pad", True), "patch_embed pads images"),
        (lambda model: setattr(model, "pool", lambda x: x[:, 0]), "the model has a pool of its own"),
        (lambda model: model.blocks[0].mlp.register_forward_hook(print), r"blocks\.0\.mlp has hooks"),
    ],
)
def test_uncovered_part_is_named(change, part):
    model = cifar10_vit(pretrained=False, depth=1, embed_dim=24)
    check_supported(model)
    change(model)
    with pytest.raises(UnsupportedModelError, match=part):
        quantize(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "changes", [dict(pos_embed="abs", feat_size=16), dict(out_features=0), dict(pool_type="")], ids=lambda c: str([*c])
)
def test_attention_pooling_with_other_settings(changes):
    model = cifar10_vit(pretrained=False, depth=1, embed_dim=24, global_pool="map", class_token=False)
    check_supported(model)
    model.attn_pool = AttentionPoolLatent(24, num_heads=3, **changes)
    with pytest.raises(UnsupportedModelError, match="attn_pool has a pos_embed, no mlp, or pools"):
        check_supported(model)


def test_other_models():
    check_supported(cifar10_vit(pretrained=False))
    check_supported(cifar10_vit(pretrained=False, depth=1, embed_dim=60, num_heads=3))  # heads of any other width
    with pytest.raises(UnsupportedModelError, match=r"the model is a .*Linear"):
        quantize(nn.Linear(2, 2), torch.zeros(1, 3, 32, 32))
    with pytest.raises(UnsupportedModelError, match=r"AcceleratedViT, which cannot be quantised: pass its \.model"):
        check_supported(accelerate(cifar10_vit(pretrained=False)))
    with pytest.raises(UnsupportedModelError, match="the model has no blocks"):
        check_supported(cifar10_vit(pretrained=False, depth=0))
    with pytest.raises(UnsupportedModelError, match="a head_dim of 264"):
        check_supported(cifar10_vit(pretrained=False, depth=1, embed_dim=264, num_heads=1))
