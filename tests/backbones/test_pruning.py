"""accelerate(prune=...): against timm's own blocks, image by image, on tokens gathered by timm's own attention."""

import pytest
import torch
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn
from torch.overrides import TorchFunctionMode

import smi_fast
from smi_fast import Mass
from smi_fast.models import cifar10_vit

PRUNES = [
    {1: 0.3, 3: 0.5},
    {1: 0.99},
    {2: Mass(0.6)},
    {1: 0.2, 2: Mass(0.7), 3: 0.3},
]


def build(**options) -> VisionTransformer:
    """Four blocks, 8x8 patches, two registers, float64, every weight random."""
    options = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "reg_tokens": 2, **options}
    model = cifar10_vit(pretrained=False, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model.double()


@pytest.fixture
def model(seed) -> VisionTransformer:
    return build()


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def some_keep(kind: str) -> list[torch.Tensor] | torch.Tensor | None:
    if kind == "ragged":
        return [torch.randperm(64)[:count] for count in (40, 1, 23)]
    return None if kind == "all" else torch.stack([torch.randperm(64)[:30] for _ in range(3)])


def stays(importance: torch.Tensor, share: float | Mass) -> torch.Tensor:
    """Indices, ascending, of the patches that stay."""
    order = importance.argsort(descending=True)
    if isinstance(share, Mass):
        count = int((importance[order].cumsum(0) < share.share * importance.sum()).sum()) + 1
    else:
        count = max(1, int(len(order) * (1 - share)))
    return order[:count].sort().values


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


def timm_pruned(model, image, keep, prune) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, num_classes) of an image (C, H, W), and the importance of its patches in the order of keep."""
    prefix = model.num_prefix_tokens
    x = model._pos_embed(model.patch_embed(image[None]))
    x = model.norm_pre(torch.cat((x[:, :prefix], x[:, prefix:][:, keep]), dim=1))
    left = torch.arange(len(keep))
    for number, block in enumerate(model.blocks):
        if number in prune:
            kept = stays(attention[prefix:], prune[number])  # noqa: F821, of the block before
            left = left[kept]
            x = torch.cat((x[:, :prefix], x[:, prefix:][:, kept]), dim=1)
        x, attention = class_attention_of(block, x)
    importance = torch.zeros(len(keep), dtype=torch.float64).index_copy(0, left, attention[prefix:])
    return model.forward_head(model.norm(x)), importance


def assert_as_timm(model, images, keep, prune) -> None:
    """Logits, importance and input gradients."""
    logits, importance = smi_fast.accelerate(model, prune=prune)(images, keep=keep, return_attention=True)
    rows = torch.arange(64).expand(len(images), -1) if keep is None else keep
    expected = [timm_pruned(model, image, row, prune) for image, row in zip(images, rows, strict=True)]
    assert importance.shape == (rows.shape if isinstance(rows, torch.Tensor) else (sum(map(len, rows)),))
    torch.testing.assert_close(importance.flatten().double(), torch.cat([e[1] for e in expected]), rtol=1e-5, atol=1e-7)
    expected = torch.cat([e[0] for e in expected])
    torch.testing.assert_close(logits, expected)
    weights = torch.randn_like(logits)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), images)[0] for y in (logits, expected))
    torch.testing.assert_close(ours, theirs)


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
    # two norms a block; the second of the last and the final one see only the class token
    assert mode.lengths == [3 + 64] * 2 + [3 + 44] * 4 + [3 + 22, 1, 1]


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


@pytest.mark.parametrize("prune", PRUNES, ids=str)
def test_the_triton_backend_prunes_as_plain_torch_does(model, images, device, prune):
    model, images = model.float().to(device), images.detach().float().to(device).requires_grad_()
    outputs = []
    for backend in ("torch", "triton"):
        fast = smi_fast.accelerate(model, dtype=torch.float32, backend=backend, prune=prune)
        logits, importance = fast(images, return_attention=True)
        outputs.append((logits, importance, *torch.autograd.grad(logits.square().sum(), images)))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


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
        ({1: 1.0}, r"block 1 must be a fraction in \(0, 1\) or a Mass, got 1.0"),
        ({2: 0}, "block 2 must be a fraction .* got 0"),
        ({2: "0.3"}, "block 2 must be a fraction .* got '0.3'"),
        ({3: {"mass": 0.5}}, "block 3 must be a fraction .* got {'mass': 0.5}"),
    ],
)
def test_a_wrong_prune_is_refused_with_its_block_and_value(model, prune, message):
    with pytest.raises(ValueError, match=message):
        smi_fast.accelerate(model, prune=prune)


def test_models_without_class_attention_are_refused(seed):
    with pytest.raises(smi_fast.UnsupportedModelError, match="no class token"):
        smi_fast.accelerate(build(class_token=False, global_pool="avg"), prune={1: 0.3})
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[1\] holds a DiffAttention.* before block 2"):
        smi_fast.accelerate(build(attn_layer="diff", embed_dim=96), prune={2: 0.3})
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[0\] holds a DiffParallelScalingBlock"):
        smi_fast.accelerate(build(block_fn=DiffParallelScalingBlock, embed_dim=96), prune={1: 0.3})


def test_ragged_images_are_dropped_whole_in_training(seed):
    """Blocks whose paths are dropped for certain in training add nothing to the tokens that pruning has left."""
    model = build(drop_path_rate=0.1).train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for block in model.blocks[1:]:  # timm drops nothing in the first
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    expected = model.forward_head(model.norm(model.blocks[0](model._pos_embed(model.patch_embed(images)))))
    torch.testing.assert_close(smi_fast.accelerate(model, prune={1: Mass(0.7)})(images), expected)
