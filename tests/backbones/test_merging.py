"""Merge: against ToMe (Bolya et al., 2023) written out on timm's modules, pair by pair and image by image."""

import pytest
import torch
from pruning_cases import assert_as_by_image, attention_of, build, embedded, randomised, some_keep
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

import smi_fast
from smi_fast import Drop, Merge
from smi_fast.backbones.merging import size_channels

PRUNES = [{2: Merge(8)}, {1: Merge(9), 2: Merge(9), 3: Merge(9)}, {1: Merge(1000)}]


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def pairs_of(keys: torch.Tensor, count: int, prefix: int) -> dict[int, int]:
    """Which token merges into which: keys (N, D), averaged over heads."""
    odd = range(1 + prefix // 2 * 2, len(keys), 2)
    found = []
    for even in range((prefix + 1) // 2 * 2, len(keys), 2):
        similarities = [float(torch.cosine_similarity(keys[even], keys[other], dim=0)) for other in odd]
        found += [(max(similarities), even, odd[similarities.index(max(similarities))])] if similarities else []
    found = sorted(found, reverse=True)[: min(count, (len(keys) - prefix) // 2)]
    return {even: other for _, even, other in found}


def tome(model: VisionTransformer, image: torch.Tensor, keep: torch.Tensor, prune: dict[int, Merge]):
    """Logits (1, num_classes) of an image (C, H, W), and the importance of its patches in the order of keep."""
    prefix = model.num_prefix_tokens
    x = embedded(model, image, keep)
    sizes, left = torch.ones(x.shape[1]).double(), list(range(-prefix, len(keep)))
    for number, block in enumerate(model.blocks):
        out, softmax, _, keys = attention_of(block.attn, block.norm1(x), sizes)
        x = x + block.ls1(out)
        if number + 1 in prune:
            into = pairs_of(keys.mean(0).detach(), prune[number + 1].count, prefix)
            free = [n for n in range(prefix, len(left)) if n not in into]
            order = [*range(prefix), *(n for n in free if n % 2 == 0), *(n for n in free if n % 2)]
            groups = [[n, *(even for even, other in into.items() if other == n)] for n in order]
            x = torch.stack([(x[0, g] * sizes[g, None]).sum(0) / sizes[g].sum() for g in groups])[None]
            sizes, left = torch.stack([sizes[g].sum() for g in groups]), [left[n] for n in order]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    received = softmax.mean(0)[0] if model.has_class_token else softmax.mean((0, 1))
    importance = torch.zeros(len(keep)).double()
    importance[left[prefix:]] = received[prefix:].detach()
    return model.forward_head(model.norm(x)), importance


def assert_as_tome(model, images, keep, prune) -> None:
    fast = smi_fast.accelerate(model, prune=prune)
    assert_as_by_image(fast, images, keep, lambda image, row: tome(model, image, row, prune))


@pytest.mark.parametrize("kept", ["all", "uniform", "ragged"])
@pytest.mark.parametrize("prune", PRUNES, ids=str)
def test_merging_equals_tome_on_timms_blocks(images, prune, kept):
    assert_as_tome(build(), images, some_keep(kept), prune)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "init_values": 0.5},
        {"reg_tokens": 0},
        {"reg_tokens": 1, "global_pool": "avg"},
        {"class_token": False, "reg_tokens": 0, "global_pool": "avg"},
    ],
    ids=str,
)
def test_prefix_tokens_never_merge(images, options):
    # without a class token ToMe's own code has another order after the first merging
    prune = {1: Merge(12), 3: Merge(12)} if options.get("class_token", True) else {2: Merge(20)}
    assert_as_tome(build(**options), images, some_keep("uniform"), prune)


def test_both_tokens_of_a_distilled_model_heed_the_sizes(images):
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    model = randomised(VisionTransformerDistilled(**options))
    for kept in ("uniform", "ragged"):
        assert_as_tome(model, images, some_keep(kept), {1: Merge(10), 2: Merge(5)})


def test_dropping_and_fusing_keep_the_sizes_of_what_is_left(images):
    """Against the same patches merged, then dropped by the class token's proportional attention."""
    model, keep = build(), some_keep("uniform")
    both = smi_fast.accelerate(model, prune={1: Merge(9), 3: Drop(8, fuse="mean")})

    def by_image(image, row):
        x, sizes, left = embedded(model, image, row), torch.ones(33).double(), list(range(-3, 30))
        for number, block in enumerate(model.blocks):
            out, softmax, _, keys = attention_of(block.attn, block.norm1(x), sizes)
            x = x + out
            received = softmax.mean(0)[0]
            if number == 0:
                into = pairs_of(keys.mean(0).detach(), 9, 3)
                order = sorted(set(range(33)) - set(into), key=lambda n: (n >= 3, n >= 3 and n % 2, n))
                groups = [[n, *(even for even, other in into.items() if other == n)] for n in order]
                sizes, left = torch.tensor([float(len(g)) for g in groups]).double(), [left[n] for n in order]
                x = torch.stack([x[0, g].mean(0) for g in groups])[None]
            if number == 2:
                ranked = received[3:].argsort(descending=True) + 3
                stay, go = torch.cat((torch.arange(3), ranked[:8].sort().values)), ranked[8:]
                fused = (received[go, None] * x[0, go]).sum(0) / received[go].sum()
                x = torch.cat((x[:, stay], fused[None, None]), dim=1)
                sizes, left = torch.cat((sizes[stay], torch.ones(1))), [left[n] for n in stay]
            x = x + block.mlp(block.norm2(x))
        importance = torch.zeros(30).double()
        importance[left[3:]] = received[3:-1].detach()
        return model.forward_head(model.norm(x)), importance

    assert_as_by_image(both, images, keep, by_image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scores_gain_the_logarithm_of_the_sizes_beyond_the_dtypes_precision(dtype):
    sizes, scale = torch.arange(1.0, 1000.0), 32**-0.5
    q, k, v = size_channels(sizes, scale, dtype).double()[:, :, 0].unbind(1)
    error = scale * (q * k).sum(-1) - sizes.double().log()
    assert (error.abs() <= torch.finfo(dtype).eps ** 2 * sizes.double().log() + 1e-12).all()
    assert not v.any()


def test_an_empty_batch_merges_nothing(images):
    logits, importance = smi_fast.accelerate(build(), prune={1: Merge(3)})(images[:0], return_attention=True)
    assert logits.shape == (0, 7)
    assert importance.shape == (0, 64)


def test_keys_that_are_not_finite_are_an_error_that_names_the_block_and_the_image(images):
    with torch.no_grad():
        images[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"keys must be finite .* before block 2, which fails in row 2"):
        smi_fast.accelerate(build(), prune={2: Merge(3)})(images)


@pytest.mark.parametrize("count", [0, -1, True, 2.0, None], ids=str)
def test_a_wrong_count_to_merge_is_refused_with_its_value(count):
    with pytest.raises(ValueError, match=f"integer from 1 on, got {count}"):
        Merge(count)


def test_models_that_cannot_heed_sizes_are_refused_by_block(images):
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[1\] is a ParallelScalingBlock, but Merge"):
        smi_fast.accelerate(build(block_fn=ParallelScalingBlock), prune={2: Merge(3)})
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[2\] has a head_dim of 128"):
        smi_fast.accelerate(build(embed_dim=128, num_heads=1), prune={2: Merge(3)})
    model, other = build(embed_dim=96), build(embed_dim=96, attn_layer="diff")
    fast = smi_fast.accelerate(model, prune={2: Merge(3)})
    for number, message in ((1, r"is a Block with a DiffAttention, but Merge"), (3, "holds a DiffAttention, .* sizes")):
        plain, model.blocks[number].attn = model.blocks[number].attn, other.blocks[number].attn
        for run in (lambda: fast(images), lambda: smi_fast.accelerate(model, prune={2: Merge(3)})):
            with pytest.raises(smi_fast.UnsupportedModelError, match=rf"blocks\[{number}\] {message}"):
                run()
        model.blocks[number].attn = plain
    for number in (1, 2, 3):
        handle = model.blocks[number].attn.register_forward_hook(lambda *_: None)
        with pytest.raises(smi_fast.UnsupportedModelError, match=rf"blocks\[{number}\].attn has hooks, so it can nei"):
            fast(images)
        handle.remove()
