"""Parts that no model of timm's has by its name, and images of other sizes, are quantised as Eq. 5 has it."""

from functools import partial

import pytest
import torch
from backbone_cases import images, small_vit
from backbones.test_coverage import error, timm_on_tokens
from quantization_cases import on_real_numbers
from timm.layers import AttentionPoolLatent, DiffAttention, GluMlp, LayerNorm, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn

from smi_fast.backbones.readouts import ClassAndMean, CosineLogits
from smi_fast.quantization import QuantizedViT, quantize

PARTS = {
    "maximum": dict(global_pool="max"),
    "mean and maximum": dict(global_pool="avgmax", pool_include_prefix=True, reg_tokens=2),
    "no position embedding": dict(pos_embed="none"),
    "no bias": dict(qkv_bias=False, proj_bias=False, norm_layer=partial(nn.LayerNorm, bias=False)),
    "torch's RMSNorm without eps": dict(norm_layer=nn.RMSNorm),
    "norms within": dict(scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True),
    "gate last": dict(mlp_layer=GluMlp, act_layer=nn.Sigmoid),
    "SwiGLU with a norm": dict(mlp_layer=SwiGLU, act_layer="silu", scale_mlp_norm=True),
    "tanh": dict(act_layer=nn.Tanh),
    "one layer behind attention and MLP": dict(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True)),
    "differential attention in parallel": dict(block_fn=ParallelThingsBlock, attn_layer=DiffAttention, init_values=0.5),
    "two norms of differential attention": dict(attn_layer=DiffAttention, scale_attn_norm=True, qk_norm=True),
}


def built(**options) -> nn.Module:
    return small_vit(**{"norm_layer": LayerNorm} | options).eval()


def check(model: nn.Module) -> QuantizedViT:
    """Compare a model with timm's while it observes, and with Eq. 5 on real numbers afterwards."""
    calibration, x, keep = images(), images(batch=2), [torch.randperm(12)[:count] for count in (3, 7)]
    observing, quantized = QuantizedViT(model, 4, 6), quantize(model, calibration, 4, 6)
    alone = [timm_on_tokens(model, x[i : i + 1], keep[i][None]) for i in range(2)]
    assert error(observing(x), model(x)) < 1e-9
    assert error(observing(x, keep=keep), torch.cat(alone)) < 1e-9
    reference = on_real_numbers(quantized, observing)
    for kept in (None, keep):
        assert error(quantized(x, keep=kept), reference(x, keep=kept)) < 1e-9
    return quantized


@pytest.mark.parametrize("part", PARTS)
def test_parts_without_a_name_of_their_own(part, seed):
    check(built(**PARTS[part]))


@pytest.mark.parametrize("options", [dict(latent_len=3, pool_type="avg"), dict(q_proj=False, qk_norm=True)], ids=str)
def test_attention_pooling_with_several_queries_or_without_their_projection(options, seed):
    model = built(global_pool="map", class_token=False)
    model.attn_pool = AttentionPoolLatent(32, num_heads=2, norm_layer=LayerNorm, **options).double()
    for parameter in model.attn_pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    check(model)


def test_class_token_beside_the_mean(seed):
    """As `from_huggingface` builds DINOv2's classifier."""
    model = built(global_pool="map", pool_include_prefix=True, reg_tokens=2, fc_norm=False)
    model.attn_pool, model.head = ClassAndMean(3), nn.Linear(64, 5).double()
    x = images()
    observing, quantized = QuantizedViT(model, 4, 6), quantize(model, x, 4, 6)
    assert error(observing(x), model(x)) < 1e-9
    assert error(quantized(x), on_real_numbers(quantized, observing)(x)) < 1e-9


def texts() -> CosineLogits:
    scale, bias = torch.tensor(20.0).double(), torch.tensor(-3.0).double()
    return CosineLogits(torch.randn(6, 32).double(), scale, bias)


HEADS = {
    "no head": nn.Identity,
    "texts as classes": texts,
    "texts behind a projection": lambda: nn.Sequential(nn.Linear(32, 32, bias=False), texts()),
    "pooler": lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh()),
    "hidden layer": lambda: nn.Sequential(nn.Linear(32, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)),
    "two layers": lambda: nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 3)),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_other_libraries(head, seed, tmp_path):
    model = built()
    model.head = HEADS[head]().double().eval()
    quantized, x = check(model), images(batch=1)
    assert quantized.num_classes in (0, model(x).shape[1])
    quantized.save(tmp_path / "model.safetensors")
    assert torch.equal(
        QuantizedViT.load(tmp_path / "model.safetensors")(images(batch=1) * 0), quantized(images(batch=1) * 0)
    )


def test_no_pooling_gives_logits_of_every_token(seed):
    model = built(global_pool="", reg_tokens=1)
    x = images()
    observing, quantized = QuantizedViT(model, 4, 6), quantize(model, x, 4, 6)
    assert quantized(x).shape == (3, 2 + 12, 5)
    assert error(observing(x), model(x)) < 1e-9
    assert error(quantized(x), on_real_numbers(quantized, observing)(x)) < 1e-9
    with pytest.raises(ValueError, match="global_pool '' needs images that all keep the same number of patches"):
        quantized(x[:2], keep=[torch.arange(3), torch.arange(5)])


@pytest.mark.parametrize("options", [dict(), dict(no_embed_class=True, reg_tokens=2), dict(global_pool="avg")], ids=str)
def test_images_of_another_size_where_timm_takes_them(options, seed):
    model = built(dynamic_img_size=True, **options)
    observing, quantized = QuantizedViT(model, 4, 6), quantize(model, images(), 4, 6)
    for x in (images(20, 12), images()):
        assert error(observing(x), model(x)) < 1e-9
    reference = on_real_numbers(quantized, observing)
    for x in (images(20, 12), images()):
        assert error(quantized(x), reference(x)) < 1e-9
    with pytest.raises(ValueError, match="images of 21x12 pixels are not divided by patches of 4x4"):
        quantized(images(21, 12))
    with pytest.raises(ValueError, match=r"images are \(3, 3, 20, 12\)"):  # they would be read in the model's own grid
        quantize(model, images(20, 12))
    with pytest.raises(ValueError, match=r"images are \(3, 3, 20, 12\)"):
        quantize(built(**options), images())(images(20, 12))


def test_a_distilled_model_averages_its_two_heads_with_one_layer(model, images):
    distilled = VisionTransformerDistilled(32, 8, embed_dim=48, depth=1, num_heads=3, num_classes=7).double().eval()
    for parameter in distilled.parameters():
        nn.init.normal_(parameter, std=0.3)
    quantized = quantize(distilled, images, 8, 8)
    rows = torch.cat((distilled.head.weight, distilled.head_dist.weight), 1) / 2
    assert torch.equal(quantized.head.weight, (rows / (rows.abs().amax(1, keepdim=True) / 127)).round())
    assert (quantized(images) - distilled(images)).abs().max() < 0.2 * distilled(images).abs().max()


def test_patches_outside_of_the_grid_or_named_twice_are_refused(model, images):
    quantized = quantize(model, images)
    patches = quantized.patches(images)
    for position, message in ((16, "row 0 holds patch 16, outside"), (1, "row 0 names patch 1 twice")):
        wrong = patches.positions.clone()
        wrong[0] = position
        with pytest.raises(ValueError, match=message):
            quantized.forward_patches(type(patches)(patches.values, wrong, patches.cu_seqlens, patches.max_seqlen))


def test_the_exported_program_computes_other_parts_too(seed):
    options = dict(attn_layer=DiffAttention, mlp_layer=SwiGLU, act_layer="silu", norm_layer=RmsNorm, qk_norm=True)
    model = built(depth=1, global_pool="map", class_token=False, reg_tokens=2, init_values=0.5, **options)
    model.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), texts()).double()
    quantized, x = quantize(model, images(), 8, 8), images(batch=2)
    program, expected = quantized.export(), quantized(x)
    operators = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert operators <= {"aten", "quantized_decomposed", "<built-in function getitem>"}
    # float32 sums may round an activation to its neighbour, which later places see.
    assert (program.module()(x.float()) - expected).norm() < 0.05 * expected.norm()
