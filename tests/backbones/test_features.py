"""accelerate(model)(images, features=...): against forward hooks on timm's modules, image by image."""

import pytest
import torch
from pruning_cases import attention_of, build, embedded, rows_of, some_keep
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn

import smi_fast
from smi_fast import Drop, Mass, Merge

PARTS = {"block": "", "attn": ".attn", "heads": ".attn.heads", "keys": ".attn.keys", "mlp": ".mlp"}


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def hooked(model: nn.Module, image: torch.Tensor, keep: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the modules of timm's blocks return for the kept patches of an image, by the names of features, and the
    logits."""
    found, handles = {}, []
    for number, block in enumerate(model.blocks):
        modules = {"": block, ".attn": block.attn, ".mlp": block.mlp}
        for end, module in modules.items():
            name = f"blocks.{number}{end}"
            handles.append(module.register_forward_hook(lambda _, x, y, name=name: found.__setitem__(name, y[0])))

        def inner(attn, x, y, number=number):
            *_, heads, keys = attention_of(attn, x[0])
            found[f"blocks.{number}.attn.heads"] = heads.transpose(0, 1)
            found[f"blocks.{number}.attn.keys"] = keys.transpose(0, 1)

        handles.append(block.attn.register_forward_hook(inner))
    x = model.blocks(embedded(model, image, keep))
    for handle in handles:
        handle.remove()
    return found, model.forward_head(model.norm(x))


@pytest.mark.parametrize("kept", ["all", "uniform", "ragged"])
@pytest.mark.parametrize("options", [{"qk_norm": True, "init_values": 0.7}, {"block_fn": ResPostBlock}], ids=str)
def test_all_features_are_what_timms_modules_return(images, options, kept):
    model, keep = build(**options), some_keep(kept)
    logits, attention, features = smi_fast.accelerate(model)(
        images, keep=keep, features=tuple(PARTS), return_attention=True
    )
    expected = [hooked(model, image, row) for image, row in zip(images, rows_of(keep), strict=True)]
    torch.testing.assert_close(logits, torch.cat([e[1] for e in expected]), rtol=1e-9, atol=1e-9)
    assert attention.flatten().shape == (sum(map(len, rows_of(keep))),)
    assert features.keys() == expected[0][0].keys() == {f"blocks.{n}{end}" for n in range(4) for end in PARTS.values()}
    for name, tokens in features.items():
        torch.testing.assert_close(tokens.values, torch.cat([e[0][name] for e in expected]), rtol=1e-9, atol=1e-9)
        positions = [torch.cat((torch.arange(-3, 0), row)) for row in rows_of(keep)]
        assert torch.equal(tokens.positions, torch.cat(positions).int())


@pytest.mark.parametrize("kept", ["uniform", "ragged"])
@pytest.mark.parametrize("part", PARTS)
def test_a_loss_on_features_has_the_gradients_of_timm(images, part, kept):
    """Of pixels and of weights, together with the logits."""
    model, keep = build(), some_keep(kept)
    names = [f"blocks.{number}{PARTS[part]}" for number in (1, 3)]
    logits, features = smi_fast.accelerate(model)(images, keep=keep, features=names)
    expected = [hooked(model, image, row) for image, row in zip(images, rows_of(keep), strict=True)]
    ours, theirs = logits.square().sum(), torch.cat([e[1] for e in expected]).square().sum()
    for name in names:
        weights = torch.randn_like(features[name].values)
        ours = ours + (weights * features[name].values).sum()
        theirs = theirs + (weights * torch.cat([e[0][name] for e in expected])).sum()
    inputs = [images, model.blocks[1].attn.qkv.weight, model.blocks[3].attn.qkv.weight, model.blocks[1].mlp.fc2.weight]
    for got, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_features_that_are_not_asked_for_cost_nothing(images):
    """In the last block only the class token's row is computed, also if its keys are asked for."""
    model, lengths = build(), []
    norm = nn.functional.layer_norm

    def counting(x, *arguments):
        lengths.append(x.shape[-2])
        return norm(x, *arguments)

    fast, others = smi_fast.accelerate(model), ("blocks.0", "blocks.2.mlp", "blocks.1.attn.heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "layer_norm", counting)
        expected = fast(images)
        for names in ((), others, ("blocks.3.attn.keys",)):
            outputs = fast.outputs(patches_of(images), features=names)
            torch.testing.assert_close(outputs.logits, expected)
            assert outputs.features.keys() == set(names)
    assert lengths == [67, 67, 67, 67, 67, 67, 67, 1, 1] * 4


def patches_of(images: torch.Tensor) -> smi_fast.PackedTokens:
    return smi_fast.PackedTokens.from_batch(nn.functional.unfold(images, 4, stride=4).transpose(1, 2), torch.arange(64))


def test_features_of_a_block_that_prunes_are_what_it_computed(images):
    """Attention before the patches go; the MLP and the output, without the patches that went."""
    model, keep = build(), some_keep("ragged")
    prune = {1: Drop(0.4, fuse="sum"), 2: Merge(4), 3: Drop(Mass(0.5), scores=lambda tokens, _, importance: importance)}
    _, features = smi_fast.accelerate(model, prune=prune)(images, keep=keep, features=("block", "attn", "mlp", "keys"))
    lengths = {name: tokens.lengths() for name, tokens in features.items()}
    assert lengths["blocks.0.attn"] == lengths["blocks.0.attn.keys"] == [43, 4, 26]
    assert lengths["blocks.0.mlp"] == lengths["blocks.0"] == lengths["blocks.1.attn"] == [3 + 24 + 1, 4, 3 + 13 + 1]
    assert lengths["blocks.1.mlp"] == lengths["blocks.2.attn"] == lengths["blocks.2.mlp"] == [24, 4, 13]
    assert lengths["blocks.2"] == lengths["blocks.3.attn.keys"] == lengths["blocks.3"]
    assert all(few < many for few, many in zip(lengths["blocks.2"][::2], [24, 13], strict=True))
    fused = features["blocks.0"].positions == -4
    assert fused.sum() == 2
    x, block = features["blocks.1.attn"], model.blocks[1]  # what the attention returns for the tokens of block 0
    for tokens, out in zip(features["blocks.0"].sequences(), x.sequences(), strict=True):
        torch.testing.assert_close(out, block.attn(block.norm1(tokens[None]))[0])
    assert torch.equal(x.positions, features["blocks.0"].positions)


@pytest.mark.parametrize("kept", ["uniform", "ragged"])
def test_a_block_with_hooks_gives_its_output_and_refuses_the_rest(images, kept):
    model, keep = build(), some_keep(kept)
    handle = model.blocks[1].attn.register_forward_hook(lambda module, args, output: 2 * output)
    fast = smi_fast.accelerate(model)
    for part in ("attn", "heads", "keys", "mlp"):
        with pytest.raises(
            smi_fast.UnsupportedModelError, match=rf"'blocks.1{PARTS[part]}': blocks\[1\].attn has hooks"
        ):
            fast(images, keep=keep, features=(part,))
    _, features = fast(images, keep=keep, features=("block",))
    rows = rows_of(keep)
    x = [model.blocks[:2](embedded(model, image, row))[0] for image, row in zip(images, rows, strict=True)]
    torch.testing.assert_close(features["blocks.1"].values, torch.cat(x))
    handle.remove()
    model.blocks[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    _, features = fast(images, keep=keep, features=("mlp", "keys"))
    expected = [hooked(model, image, row)[0] for image, row in zip(images, rows, strict=True)]
    for name, tokens in features.items():
        torch.testing.assert_close(tokens.values, torch.cat([e[name] for e in expected]))


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"block_fn": ParallelScalingBlock}, ("attn", "mlp")),
        ({"block_fn": DiffParallelScalingBlock, "embed_dim": 96}, ("attn", "heads", "keys", "mlp")),
        ({"block_fn": ParallelThingsBlock}, ("attn", "heads", "keys", "mlp")),
        ({"attn_layer": "diff", "embed_dim": 96}, ("heads", "keys")),
    ],
    ids=str,
)
def test_blocks_without_a_part_refuse_it_by_name(images, options, missing):
    model = build(**options)
    fast = smi_fast.accelerate(model)
    for part in missing:
        with pytest.raises(smi_fast.UnsupportedModelError, match=rf"'blocks.0{PARTS[part]}': blocks\[0\] is a"):
            fast(images, features=(part,))
    _, features = fast(images, features=tuple(PARTS.keys() - set(missing)))
    assert features.keys() == {f"blocks.{n}{PARTS[part]}" for n in range(4) for part in PARTS.keys() - set(missing)}
    x = embedded(model, images[0], torch.arange(64))
    for number, block in enumerate(model.blocks):
        if "attn" not in missing:
            expected = block.attn(block.norm1(x))[0]
            torch.testing.assert_close(features[f"blocks.{number}.attn"].values[:67], expected)
        x = block(x)
        torch.testing.assert_close(features[f"blocks.{number}"].values[:67], x[0])


def test_parallel_blocks_give_the_heads_and_keys_of_their_attention(images):
    model = build(block_fn=ParallelScalingBlock, qk_norm=True)
    _, features = smi_fast.accelerate(model)(images, features=("blocks.0.attn.heads", "blocks.0.attn.keys"))
    block, x = model.blocks[0], embedded(model, images[1], torch.arange(64))
    _, q, k, v = block.in_proj(block.in_norm(x))[0].split(block.in_split, dim=-1)
    q, k, v = (part.unflatten(-1, (3, 16)).transpose(0, 1) for part in (q, k, v))
    q, k = block.q_norm(q), block.k_norm(k)
    torch.testing.assert_close(features["blocks.0.attn.keys"].values[67:134], k.transpose(0, 1))
    expected = (q @ k.mT / 4).softmax(-1) @ v
    torch.testing.assert_close(features["blocks.0.attn.heads"].values[67:134], expected.transpose(0, 1))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            ("blocks.4",),
            ValueError,
            "no feature 'blocks.4': .* blocks.N.attn.heads.* for N from 0 to 3, and block, attn",
        ),
        (("blocks.1.norm1",), ValueError, "no feature 'blocks.1.norm1'"),
        (("attn", "query"), ValueError, "no feature 'query'"),
        ("attn", TypeError, "a sequence of names, got 'attn'"),
    ],
)
def test_unknown_features_are_refused_with_those_that_exist(images, names, error, message):
    with pytest.raises(error, match=message):
        smi_fast.accelerate(build())(images, features=names)


def test_features_and_open_pruning_compile_to_one_graph(images):
    torch._dynamo.reset()
    model = build(depth=3)
    fast = smi_fast.accelerate(model, prune={1: Drop(0.3, round="ceil", fuse="sum"), 2: Merge(9)})
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    names, keep = ("blocks.1", "blocks.0.attn.keys"), some_keep("uniform")
    results = []
    for module in (compiled, fast):
        logits, attention, features = module(images, keep=keep, features=names, return_attention=True)
        loss = logits.square().sum() + sum(features[name].values.square().sum() for name in names)
        results.append(
            (logits, attention, *(features[name].positions for name in names), *torch.autograd.grad(loss, images))
        )
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
