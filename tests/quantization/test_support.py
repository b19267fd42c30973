"""Models that the scheme does not cover are refused, with the name of the part."""

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from smi_fast import UnsupportedModelError
from smi_fast.models import cifar10_vit
from smi_fast.quantization import check_supported, quantize


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (dict(class_token=False, global_pool="avg"), "fc_norm"),
        (dict(global_pool="avg", fc_norm=False), "global_pool='avg'"),
        (dict(reg_tokens=2), "reg_token"),
        (dict(pre_norm=True), "norm_pre"),
        (dict(no_embed_class=True), "no_embed_class=True"),
        (dict(pos_embed="none"), "pos_embed"),
        (dict(qk_norm=True), r"blocks\[0\].attn.q_norm"),
        (dict(scale_mlp_norm=True), r"blocks\[0\].mlp.norm"),
        (dict(act_layer="relu"), r"blocks\[0\].mlp.act is a ReLU"),
        (dict(act_layer="gelu_tanh"), r"blocks\[0\].mlp.act"),
        (dict(norm_layer="rmsnorm"), "LayerNorm"),
        (dict(num_classes=0), "head is a Identity"),
        (dict(block_fn=ResPostBlock), r"blocks\[0\] is a ResPostBlock"),
    ],
)
def test_uncovered_part_is_named(seed, options, part):
    model = cifar10_vit(pretrained=False, depth=1, embed_dim=24, **options)
    with pytest.raises(UnsupportedModelError, match=part):
        quantize(model, torch.zeros(1, 3, 32, 32))


def test_other_models():
    check_supported(cifar10_vit(pretrained=False))
    with pytest.raises(UnsupportedModelError, match="the model is a Linear"):
        quantize(nn.Linear(2, 2), torch.zeros(1, 3, 32, 32))
    with pytest.raises(UnsupportedModelError, match="the model has no blocks"):
        check_supported(cifar10_vit(pretrained=False, depth=0))
    with pytest.raises(UnsupportedModelError, match="a head_dim of 264, more than 256"):
        check_supported(cifar10_vit(pretrained=False, depth=1, embed_dim=264, num_heads=1))
