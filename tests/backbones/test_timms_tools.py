"""timm's methods and utilities give an accelerated model the answers that they give timm's own."""

import copy
import itertools

import pytest
import timm
import torch
from backbone_cases import assert_same, assert_trains_alike, images, pair, small_vit, train
from compatibility import NEITHER, OURS, REFUSED, TIMMS, Ran, tool
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Attention
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import AttentionExtract, ModelEmaV3, freeze
from torch import nn

import smi_fast

KEEP = torch.tensor([[7, 2, 5], [1, 8, 3], [11, 0, 4]])


@tool("`forward_features`, `forward_head(pre_logits=True)`", OURS)
def test_features_and_head(seed):
    fast, model = pair(reg_tokens=2)
    x = images()
    ours, theirs = (m.forward_features(x) for m in (fast, model))
    assert_same(ours, theirs)
    for pre_logits in (False, True):
        assert_same(*(m.forward_head(ours, pre_logits=pre_logits) for m in (fast, model)))


@tool("`forward_intermediates`", OURS, "`attn_mask` and `is_causal`: timm's speed")
def test_intermediates_with_all_options(seed):
    fast, model = pair(depth=3, reg_tokens=1, dynamic_img_size=True)
    flags = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
    for output_fmt, indices in (("NCHW", None), ("NLC", [0, 1]), ("NCHW", 1)):
        for values in itertools.product((False, True), repeat=len(flags)):
            options = dict(zip(flags, values, strict=True), indices=indices, output_fmt=output_fmt)
            x = images(8, 20, batch=2)
            assert_same(*(m.forward_intermediates(x, **options) for m in (fast, model)))
    mask = torch.randn(12, 12, dtype=torch.float64)
    assert_same(*(m.forward_intermediates(x, attn_mask=mask) for m in (fast, model)))


@tool("`get_intermediate_layers`", OURS)
def test_intermediate_layers(seed):
    fast, model = pair(depth=3)
    x = images().requires_grad_()
    options = {"n": 2, "reshape": True, "return_prefix_tokens": True, "norm": True}
    ours, theirs = (m.get_intermediate_layers(x, **options) for m in (fast, model))
    assert_same(ours, theirs)
    assert_same(*(torch.autograd.grad(layers[0][0].square().sum(), x)[0] for layers in (ours, theirs)))


@tool("`features_only=True`, `FeatureGetterNet`", OURS)
def test_features_only(seed):
    fast, model = pair(depth=4)
    ours, theirs = (FeatureGetterNet(m, out_indices=(0, 2), norm=True) for m in (fast, model))
    x = images()
    assert_same(ours(x), theirs(x))
    assert ours.feature_info.channels() == theirs.feature_info.channels()


@tool("`prune_intermediate_layers`", OURS)
def test_fewer_blocks(seed):
    fast, model = pair(depth=3)
    for m in (fast, model):
        m.prune_intermediate_layers([1], prune_norm=True)
    x = images()
    assert_same(fast(x), model(x))
    assert_same(*(m.forward_intermediates(x) for m in (fast, model)))


@tool("`reset_classifier`, `num_classes=0`", OURS)
def test_another_classifier(seed):
    fast, model = pair(num_classes=0)
    x = images()
    assert_same(fast(x), model(x))
    for pool in (None, "avg", ""):
        for m in (fast, model):
            m.reset_classifier(5, pool)
            m.double()  # timm 1.0.28 makes the classifier in float32
        model.load_state_dict(fast.state_dict())
        assert_same(fast(x), model(x))
    assert fast.num_classes == fast.model.num_classes == 5


@tool("`reset_classifier` of a model beside the one that was accelerated", NEITHER, "the original stays as it was")
def test_another_classifier_leaves_the_original_alone(seed):
    model = small_vit()
    fast, x = smi_fast.accelerate(model), images()
    before = model(x)
    fast.reset_classifier(7, "avg")
    fast.set_input_size((16, 16))
    assert model.num_classes == 5
    assert model.global_pool == "token"
    assert_same(model(x), before)


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", "map", ""])
@tool("every `global_pool`", OURS)
def test_pooling(seed, pool):
    fast, model = pair(global_pool=pool)
    assert_trains_alike(*((fast, model) if pool else (nn.Sequential(m, Mean()) for m in (fast, model))))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@tool("`dynamic_img_size`, `set_input_size`, images that are not square", OURS)
def test_other_sizes(seed):
    fast, model = pair(dynamic_img_size=True)
    for size in ((12, 16), (8, 24)):
        x = images(*size)
        assert_same(fast(x), model(x))
    for m in (fast, model):
        m.set_input_size(img_size=(20, 8))
    assert_same(*(m(torch.ones(2, 3, 20, 8, dtype=torch.float64)) for m in (fast, model)))
    assert fast.image_size == (20, 8)


@tool("`attn_mask`, `is_causal`", TIMMS)
def test_restricted_attention(seed):
    fast, model = pair()
    x, mask = images(), torch.rand(13, 13) < 0.7
    for options in ({"attn_mask": mask}, {"attn_mask": torch.randn(13, 13).double()}, {"is_causal": True}):
        assert_same(fast(x, **options), model(x, **options))
        assert_same(*(m.forward_features(x, **options) for m in (fast, model)))


@tool(
    "`attn_mask` or `is_causal` with `keep`",
    REFUSED,
    "attn_mask and is_causal are left to timm's own forward pass, which does not take keep",
)
def test_restricted_attention_of_kept_patches(seed):
    pair()[0](images(), is_causal=True, keep=KEEP)


@tool("`patch_drop_rate` while training", TIMMS)
def test_random_patches(seed):
    fast, model = pair(patch_drop_rate=0.5)
    x = images()
    torch.manual_seed(seed)
    ours = fast(x)
    torch.manual_seed(seed)
    assert_same(ours, model(x))


@tool(
    "dropout and stochastic depth while training",
    OURS,
    "`attn_drop_rate`: timm's speed; a last block of which only the class token is used draws numbers for it alone",
)
def test_dropout(seed):
    rates = {"drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}
    fast, model = pair(**rates, depth=3, class_token=False, global_pool="avg")
    x, results = images(), []
    for m in (fast, model):
        torch.manual_seed(seed)
        results.append(m(x))
    assert_same(*results)


@tool("`set_grad_checkpointing`", OURS, "activations are computed again in the backward pass")
def test_activations_are_recomputed(seed):
    fast, model = pair(depth=3)
    for m in (fast, model):
        m.set_grad_checkpointing()
    assert_trains_alike(fast, model)
    with Ran() as forward:
        loss = fast(images()).sum()
    with Ran() as backward:
        loss.backward()
    assert forward.count == backward.count == 3
    x = images().requires_grad_()
    layers = (m.get_intermediate_layers(x, n=2)[0].square().sum() for m in (fast, model))
    assert_same(*(torch.autograd.grad(layer, x)[0] for layer in layers))


@tool("`group_matcher`, `no_weight_decay`, `timm.optim`'s parameter groups", OURS)
def test_parameter_groups(seed):
    fast, model = pair()
    x, trained = images(), []
    for make in (
        lambda m: param_groups_weight_decay(m, 0.1, m.no_weight_decay()),
        lambda m: param_groups_layer_decay(m, 0.1, m.no_weight_decay(), layer_decay=0.5),
    ):
        groups = [[(len(g["params"]), g["weight_decay"], g.get("lr_scale")) for g in make(m)] for m in (fast, model)]
        assert groups[0] == groups[1]
        assert len(groups[0]) > 1
    for m in (fast, model):
        # The gradient of a key's bias is 0 to rounding, and Adam would scale the rounding up.
        optimizer = create_optimizer_v2(m, "sgd", lr=0.01, weight_decay=0.1, layer_decay=0.5)
        m(x).square().sum().backward()
        optimizer.step()
        trained.append(m.state_dict())
    assert_same(dict(trained[0]), dict(trained[1]))


@tool("`timm.data.resolve_model_data_config`", NEITHER)
def test_data_config(seed):
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    fast = smi_fast.accelerate(model)
    assert timm.data.resolve_model_data_config(fast) == timm.data.resolve_model_data_config(model)
    assert timm.data.resolve_data_config(model=fast) == timm.data.resolve_data_config(model=model)


@tool("`timm.utils.ModelEmaV3`", OURS)
def test_average_of_weights(seed):
    fast, model = pair()
    x, averages = images(), [ModelEmaV3(m, decay=0.5) for m in (fast, model)]
    for average, m in zip(averages, (fast, model), strict=True):
        train(m, list(m.parameters()), x)
        average.update(m)
    assert_same(averages[0](x), averages[1](x))
    assert not torch.allclose(averages[0](x), fast(x))


@tool("`timm.utils.freeze`", OURS)
def test_frozen_parts(seed):
    fast, model = pair()
    for m in (fast, model):
        freeze(m, ["patch_embed", "blocks.0"])
    assert_trains_alike(fast, model)
    assert not fast.blocks[0].attn.qkv.weight.requires_grad


@pytest.mark.parametrize("method", ["fx", "hook"])
@tool("`timm.utils.AttentionExtract`", TIMMS, "with `timm.layers.set_fused_attn(False)`, as timm needs it")
def test_attention_maps(seed, method):
    fast, model = pair()
    for block in (*fast.blocks, *model.blocks):
        block.attn.fused_attn = False
    x = images()
    ours, theirs = (AttentionExtract(m, method=method)(x) for m in (fast, model))
    assert list(ours) == list(theirs)
    assert len(ours) == 2
    assert_same(dict(ours), dict(theirs))


@tool("`accelerate(model, inplace=True)`, `restore`", OURS)
def test_in_place_and_back(seed):
    model, x = small_vit(), images()
    expected, before = model(x), set(vars(model))
    fast = smi_fast.accelerate(model, inplace=True)
    assert fast is model
    assert_same(fast(x), expected)
    assert smi_fast.restore(fast) is model
    assert type(model) is timm.models.VisionTransformer
    assert set(vars(model)) == before
    assert_same(model(x), expected)


@tool("a block or attention of another class", OURS, "that block runs at timm's speed")
def test_foreign_attention(seed):
    class Doubled(Attention):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    fast, model = pair()
    for m in (fast, model):
        m.blocks[0].attn.__class__ = Doubled
    assert_trains_alike(fast, model)
    assert copy.deepcopy(fast).blocks[0].attn.__class__ is Doubled


@tool(
    "heads whose size is no multiple of 8, or above 128",
    REFUSED,
    "blocks[0] has a head_dim of 4, not a multiple of 8 up to 128",
)
def test_small_heads(seed):
    pair(num_heads=8)


@tool(
    "`accelerate` of an accelerated model",
    REFUSED,
    "the model is accelerated already: for other settings, pass its .model",
)
def test_accelerated_models(seed):
    smi_fast.accelerate(pair()[0])


@tool(
    "a method of a timm class that is replaced",
    REFUSED,
    "timm.layers.attention.Attention.forward was replaced, and the fast forward pass bypasses it",
)
def test_replaced_methods(seed, monkeypatch):
    fast, original = pair()[0], Attention.forward
    monkeypatch.setattr(Attention, "forward", lambda self, x, *args, **kwargs: 2 * original(self, x, *args, **kwargs))
    fast(images())
