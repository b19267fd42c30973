"""accelerate(prune=...): against timm's own blocks, image by image, on tokens gathered by timm's own attention."""

import math

import pytest
import torch
from pruning_cases import assert_as_by_image, attention_of, build, embedded, some_keep
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import smi_fast
from smi_fast import Drop, Mass, Merge

PRUNES = [
    {1: 0.3, 3: 0.5},
    {1: 0.99},
    {2: Mass(0.6)},
    {1: 0.2, 2: Mass(0.7), 3: 12},
    {1: Drop(0.3, round="ceil"), 3: 1000},
]


@pytest.fixture
def model(seed) -> VisionTransformer:
    return build()


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def stays(importance: torch.Tensor, how: float | int | Mass | Drop) -> torch.Tensor:
    """Indices, ascending, of the patches that stay."""
    how = how if isinstance(how, Drop) else Drop(how)
    order, amount = importance.argsort(descending=True), how.amount
    if amount is None:
        count = int((importance > 0).sum())
    elif isinstance(amount, Mass):
        count = int((importance[order].cumsum(0) < amount.share * importance.sum()).sum()) + 1
    elif isinstance(amount, int):
        count = amount
    else:
        count = math.ceil(len(order) * (1 - amount) - 1e-9) if how.round == "ceil" else int(len(order) * (1 - amount))
    return order[: max(1, count)].sort().values


def class_attention_of(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What timm's block makes of (1, N, C), and the class token's softmax row (N,), averaged over heads."""
    rows, handles = [], []
    for module in block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the formula, softmax(scale q k^T), goes through attn_drop
            hook = module.attn_drop.register_forward_pre_hook(lambda _, attention: rows.append(attention[0][0, :, 0]))
            handles.append(hook)
    x = block(x)
    for handle in handles:
        handle.remove()
    return x, torch.cat(rows).mean(0).detach()


def timm_pruned(model, image, keep, prune, scorer=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, num_classes) of an image (C, H, W), and the importance of its patches in the order of keep. `scorer`
    is a function of (N, C) that decides instead of the attention."""
    prefix, x = model.num_prefix_tokens, embedded(model, image, keep)
    left = torch.arange(len(keep))
    for number, block in enumerate(model.blocks):
        if number in prune:
            scores = attention[prefix:] if scorer is None else scorer(x[0, prefix:])  # noqa: F821, of the block before
            kept = stays(scores, prune[number])
            left = left[kept]
            x = torch.cat((x[:, :prefix], x[:, prefix:][:, kept]), dim=1)
        x, attention = class_attention_of(block, x)
    importance = torch.zeros(len(keep), dtype=torch.float64).index_copy(0, left, attention[prefix:])
    return model.forward_head(model.norm(x)), importance


def assert_as_timm(model, images, keep, prune) -> None:
    """Logits, importance and input gradients."""
    fast = smi_fast.accelerate(model, prune=prune)
    assert_as_by_image(fast, images, keep, lambda image, row: timm_pruned(model, image, row, prune))


@pytest.mark.parametrize("kept", ["all", "uniform", "ragged"])
@pytest.mark.parametrize("prune", PRUNES, ids=str)
def test_pruning_equals_timms_blocks_on_the_kept_patches(model, images, prune, kept):
    assert_as_timm(model, images, some_keep(kept), prune)


@pytest.mark.parametrize("block", [ResPostBlock, ParallelScalingBlock, ParallelThingsBlock])
def test_every_kind_of_block_prunes_by_its_mean_over_heads(images, block):
    assert_as_timm(build(block_fn=block), images, some_keep("uniform"), {1: 0.3, 2: Mass(0.8)})


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"global_pool": "map"}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("share", [0.4, Mass(0.7)], ids=str)
def test_heads_pool_over_the_patches_that_are_left(images, options, share):
    assert_as_timm(build(**options), images, None, {2: share})


def evit(model, image, keep, prune) -> tuple[torch.Tensor, torch.Tensor]:
    """EViT's forward pass (Liang et al., 2022), in whose blocks the patches are chosen between attention and MLP."""
    prefix, x = model.num_prefix_tokens, embedded(model, image, keep)
    left = torch.arange(len(keep))  # -1 stands for a fused token
    for number, block in enumerate(model.blocks):
        out, softmax, *_ = attention_of(block.attn, block.norm1(x))
        x, attention = x + block.ls1(out), softmax.mean(0)[0, prefix:]
        how = prune.get(number + 1)
        kept = torch.arange(len(left)) if how is None else stays(attention.detach(), how)
        if len(kept) < len(left):
            gone = torch.ones(len(left), dtype=torch.bool).index_fill(0, kept, False)
            fused = (attention[gone] @ x[0, prefix:][gone]) / (attention[gone].sum() if how.fuse == "mean" else 1)
            x = torch.cat((x[:, :prefix], x[:, prefix:][:, kept], fused[None, None]), dim=1)
            left = torch.cat((left[kept], torch.tensor([-1])))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    importance = torch.zeros(len(keep), dtype=torch.float64)
    importance[left[left >= 0]] = attention[left >= 0].detach()
    return model.forward_head(model.norm(x)), importance


@pytest.mark.parametrize("kept", ["all", "uniform", "ragged"])
@pytest.mark.parametrize("fuse", ["sum", "mean"])
@pytest.mark.parametrize("amounts", [(0.3, 0.3, 0.3), (0.01, 20, 0.6), (Mass(0.9), 0.4, Mass(0.5))], ids=str)
def test_the_fused_token_equals_evits_with_its_gradient(images, amounts, fuse, kept):
    model = build(init_values=0.7)
    prune = {b: Drop(amount, round="ceil", fuse=fuse) for b, amount in enumerate(amounts, start=1)}
    fast = smi_fast.accelerate(model, prune=prune)
    assert_as_by_image(fast, images, some_keep(kept), lambda image, row: evit(model, image, row, prune))


@pytest.mark.parametrize("kept", ["uniform", "ragged"])
def test_a_hooked_mlp_sees_the_fused_token(model, images, kept):
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: output * torch.arange(1, 49))
    prune = {2: Drop(0.3, round="ceil", fuse="sum")}
    fast = smi_fast.accelerate(model, prune=prune)
    assert_as_by_image(fast, images, some_keep(kept), lambda image, row: evit(model, image, row, prune))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_ceil_keeps_as_many_patches_as_evit(rate):
    drop = Drop(1 - rate, round="ceil")
    assert [drop.kept(n) for n in range(1, 600)] == [math.ceil(rate * n) for n in range(1, 600)]


class Scorer(nn.Module):
    """DynamicViT's scorer (Rao et al., 2021, section 3.2) in small: half of the channels are the patch's own, the other
    half are averaged over the patches of its image."""

    def __init__(self):
        super().__init__()
        self.embed, self.score = nn.Linear(48, 16), nn.Linear(16, 1)

    def of_image(self, x: torch.Tensor) -> torch.Tensor:
        local, shared = self.embed(x).tanh().chunk(2, dim=-1)
        return self.score(torch.cat((local, shared.mean(0).expand_as(local)), dim=-1))[:, 0].detach()

    def forward(self, tokens, positions, importance):
        local, shared = self.embed(tokens.values).tanh().chunk(2, dim=-1)
        sums = shared.new_zeros(tokens.batch_size, 8).index_add(0, tokens.owners(), shared)
        means = sums / tokens.cu_seqlens.diff()[:, None]
        return self.score(torch.cat((local, means[tokens.owners()]), dim=-1))[:, 0]


@pytest.mark.parametrize("kept", ["uniform", "ragged"])
@pytest.mark.parametrize("how", [lambda f: f, lambda f: Drop(0.4, scores=f), lambda f: Drop(11, scores=f)])
def test_a_learned_scorer_decides_by_the_patches_that_enter_the_block(model, images, how, kept):
    scorer = Scorer().double()
    prune = {2: how(scorer)}
    fast = smi_fast.accelerate(model, prune=prune)
    expected = {2: Drop(None if prune[2] is scorer else prune[2].amount, scores=scorer)}
    assert_as_by_image(
        fast, images, some_keep(kept), lambda image, row: timm_pruned(model, image, row, expected, scorer.of_image)
    )


def test_a_function_gets_the_patches_that_are_left_with_their_attention(model, images):
    keep, seen = some_keep("ragged"), []

    def scores(tokens, positions, importance):
        seen.append((tokens, positions, importance))
        return importance

    fast = smi_fast.accelerate(model, prune={1: 0.5, 2: Drop(Mass(0.7), scores=scores), 3: Drop(0.3, fuse="sum")})
    got = fast(images, keep=keep, return_attention=True)
    tokens, positions, importance = seen[0]
    _, left = smi_fast.accelerate(model, prune={1: 0.5})(images, keep=keep, return_attention=True)
    expected = torch.cat(keep)[left > 0]
    assert torch.equal(positions, expected.int())
    assert torch.equal(tokens.positions, positions)
    assert tokens.values.shape == (*positions.shape, 48)
    assert not tokens.values.requires_grad
    assert importance.dtype == torch.float32
    fast = smi_fast.accelerate(model, prune={1: 0.5, 2: Mass(0.7), 3: Drop(0.3, fuse="sum")})
    for ours, by_attention in zip(got, fast(images, keep=keep, return_attention=True), strict=True):
        torch.testing.assert_close(ours, by_attention)


@pytest.mark.parametrize(
    ("amount", "scores", "message"),
    [
        (
            0.3,
            lambda tokens, *_: tokens.values,
            r"before block 2 returned \(192, 48\) torch.float64, expected .* \(192,\)",
        ),
        (0.3, lambda tokens, positions, _: positions, r"before block 2 returned \(192,\) torch.int32"),
        (0.3, lambda *_: None, "before block 2 returned a NoneType"),
        (0.3, lambda tokens, *_: torch.where(tokens.owners() == 1, torch.nan, 1.0), "2 must not .* fails in row 1"),
        (Mass(0.5), lambda tokens, _, importance: importance - 1.0 * (tokens.owners() == 2), "0 on .* fails in row 2"),
    ],
    ids=["shape", "dtype", "none", "nan", "negative"],
)
def test_wrong_scores_are_refused_by_block_and_image(model, images, amount, scores, message):
    with pytest.raises(ValueError, match=message):
        smi_fast.accelerate(model, prune={2: Drop(amount, scores=scores)})(images)


@pytest.mark.parametrize("prune", PRUNES, ids=str)
def test_an_image_alone_gives_what_it_gives_in_a_batch(model, images, prune):
    fast = smi_fast.accelerate(model, prune=prune)
    logits, importance = fast(images, return_attention=True)
    for number in range(3):
        alone, alone_importance = fast(images[number : number + 1], return_attention=True)
        torch.testing.assert_close(alone[0], logits[number])
        torch.testing.assert_close(alone_importance[0], importance[number])


class NormalisedLengths(TorchFunctionMode):
    """Remembers how many tokens an image has in each LayerNorm."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.layer_norm:
            self.lengths.append(args[0].shape[-2])
        return function(*args, **(kwargs or {}))


def test_blocks_move_only_the_tokens_that_are_left(model, images):
    fast = smi_fast.accelerate(model, prune={1: 0.3, 3: 0.5})
    with NormalisedLengths() as mode:
        fast(images)
    # two norms a block, between which patches go; the second of the last and the final one see only the class token
    assert mode.lengths == [3 + 64] + [3 + 44] * 4 + [3 + 22] * 2 + [1, 1]


def test_hooks_in_the_last_block_see_all_tokens_that_are_left(model, images):
    lengths = []
    for block in model.blocks:
        block.norm2.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[-2]))
    smi_fast.accelerate(model, prune={1: 0.3, 3: 0.5})(images)
    assert lengths == [3 + 64, 3 + 44, 3 + 44, 3 + 22]


def test_ties_go_to_the_patch_that_comes_first_in_keep(model, images):
    nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    nn.init.zeros_(model.blocks[0].attn.qkv.bias)  # attends to all alike
    _, importance = smi_fast.accelerate(model, prune={1: 0.5})(images, keep=some_keep("uniform"), return_attention=True)
    assert (importance[:, :15] > 0).all()
    assert (importance[:, 15:] == 0).all()


def test_select_patches_finds_only_patches_that_are_left(model, images):
    keep = some_keep("uniform")
    _, importance = smi_fast.accelerate(model, prune={2: 0.5})(images, keep=keep, return_attention=True)
    assert ((importance > 0).sum(1) == 15).all()
    chosen = smi_fast.select_patches(importance, keep, fraction=0.5)
    assert torch.equal(chosen, keep[importance > 0].view(3, 15))
    chosen = smi_fast.select_patches(importance, keep, mass=1.0)
    assert torch.equal(torch.stack(chosen), keep[importance > 0].view(3, 15))


def test_a_view_keeps_the_importance_in_the_order_of_keep(model, images):
    keep, fast = some_keep("uniform"), smi_fast.accelerate(model, prune={2: Mass(0.7)})
    view = torch.tensor([4, -8, 0])  # whole patches
    _, importance = fast(images, keep=keep, view=view, return_attention=True)
    rows, columns = keep // 8, keep % 8
    moved = (rows + 1) % 8 * 8 + (columns - 2) % 8
    _, expected = fast(images.roll((4, -8), (2, 3)), keep=moved, return_attention=True)
    torch.testing.assert_close(importance, expected)


@pytest.mark.parametrize(
    "prune", [{1: 0.2, 2: Mass(0.7), 3: Drop(0.3, fuse="mean")}, {1: 20, 2: Merge(5), 3: 0.3}], ids=str
)
def test_the_triton_backend_prunes_as_plain_torch_does(seed, device, prune):
    model = build(img_size=20).float().to(device)  # 25 patches
    images = torch.randn(2, 3, 20, 20, device=device, requires_grad=True)
    outputs = []
    for backend in ("torch", "triton"):
        fast = smi_fast.accelerate(model, dtype=torch.float32, backend=backend, prune=prune)
        logits, importance = fast(images, return_attention=True)
        outputs.append((logits, importance, *torch.autograd.grad(logits.square().sum(), images)))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


def test_pruning_by_known_counts_reads_nothing_back_from_the_device(seed):
    """A GPU's fake tensors have no values, so that reading one fails, as it does for a `Mass`."""
    model, counts = (
        build().float(),
        {1: Drop(0.3, fuse="mean"), 2: Merge(4), 3: Drop(9, scores=lambda *given: given[2])},
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, images = model.to("cuda"), torch.randn(3, 3, 32, 32, device="cuda")
        for prune, keep in ((counts, None), (counts, torch.zeros(3, 20, dtype=torch.long, device="cuda"))):
            fast = smi_fast.accelerate(model, dtype=torch.float32, backend="torch", prune=prune)
            logits, importance = fast(images, keep=keep, return_attention=True)
            assert logits.is_cuda
            assert importance.shape == (3, 64 if keep is None else 20)
        with pytest.raises(DataDependentOutputException):
            smi_fast.accelerate(model, dtype=torch.float32, backend="torch", prune={1: Mass(0.5)})(images)


def test_bfloat16_prunes_as_many_patches_as_float64(model, images):
    fast = smi_fast.accelerate(model.float(), dtype=torch.bfloat16, prune={1: 0.3, 3: 0.5})
    logits, importance = fast(images.float(), return_attention=True)
    assert logits.isfinite().all()
    assert ((importance > 0).sum(1) == 22).all()


def test_nan_importance_is_an_error_that_names_the_image(model, images):
    with torch.no_grad():
        images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.*row 1"):
        smi_fast.accelerate(model, prune={1: 0.3})(images)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({0: 0.3}, "block 0: .* blocks 1 to 3"),
        ({4: 0.3}, "block 4: .* blocks 1 to 3"),
        ({"1": 0.3}, "block '1'"),
        ({1: 1.0}, r"block 1 must be a fraction in \(0, 1\), a count from 1 on, a Mass, .* got 1.0"),
        ({1: True}, "block 1 must be a fraction .* got True"),
        ({1: -3}, "block 1 must be a fraction .* got -3"),
        ({1: 46.0}, "block 1 must be a fraction .* got 46.0"),
        ({1: Mass}, "block 1 must be a fraction .* got <class"),
        ({1: None}, "block 1 must be a fraction .* got None"),
        ({2: 0}, "block 2 must be a fraction .* got 0"),
        ({2: "0.3"}, "block 2 must be a fraction .* got '0.3'"),
        ({3: {"mass": 0.5}}, "block 3 must be a fraction .* got {'mass': 0.5}"),
    ],
)
def test_a_wrong_prune_is_refused_with_its_block_and_value(model, prune, message):
    with pytest.raises(ValueError, match=message):
        smi_fast.accelerate(model, prune=prune)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "an amount or a function"),
        ({"amount": 0.0}, "got 0.0"),
        ({"amount": 0}, "got 0"),
        ({"amount": 0.3, "round": "up"}, "'up'"),
        ({"amount": 0.3, "fuse": True}, "got True"),
        ({"amount": 0.3, "scores": 3}, "got 3"),
        ({"amount": 0.3, "scores": print, "fuse": "sum"}, "fuse='sum' weighs"),
    ],
    ids=str,
)
def test_a_wrong_drop_is_refused_with_its_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Drop(**arguments)


def test_models_without_class_attention_are_refused(seed):
    with pytest.raises(smi_fast.UnsupportedModelError, match="no class token"):
        smi_fast.accelerate(build(class_token=False, global_pool="avg"), prune={1: 0.3})
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[1\] holds a DiffAttention.* before block 2"):
        smi_fast.accelerate(build(attn_layer="diff", embed_dim=96), prune={2: 0.3})
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[0\] holds a DiffParallelScalingBlock"):
        smi_fast.accelerate(build(block_fn=DiffParallelScalingBlock, embed_dim=96), prune={1: 0.3})
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[1\] is a ResPostBlock, but Drop"):
        smi_fast.accelerate(build(block_fn=ResPostBlock), prune={2: Drop(0.3, fuse="sum")})


def test_ragged_images_are_dropped_whole_in_training(seed):
    """Blocks whose paths are dropped for certain in training add nothing to the tokens that pruning has left."""
    model = build(drop_path_rate=0.1).train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for block in model.blocks[1:]:  # timm drops nothing in the first
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    expected = model.forward_head(model.norm(model.blocks[0](model._pos_embed(model.patch_embed(images)))))
    torch.testing.assert_close(smi_fast.accelerate(model, prune={1: Mass(0.7)})(images), expected)
