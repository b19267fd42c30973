"""SMIAdaptor: the published calling convention, against timm's own blocks and, where there is one, a checkout."""

import copy
import pickle
import random
from collections.abc import Iterator

import pytest
import timm
import torch
from published_cases import needs_checkout, published_model, published_synthesis, with_weights_at_random
from torch import nn

from smi_fast import UnsupportedModelError, accelerate
from smi_fast.backbones.published import SMIAdaptor
from smi_fast.models import cifar10_vit


def small_model(**overrides) -> nn.Module:
    """Two blocks, 8x8 patches, float64."""
    arguments = {"pretrained": False, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7} | overrides
    return with_weights_at_random(cifar10_vit(**arguments).double())


@pytest.fixture
def model(seed) -> nn.Module:
    return small_model()


@pytest.fixture
def images(model) -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)


def plain(model: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and last attention (B, H, Q, Q) of the tokens (B, Q), class token 0 included, one image at a time."""
    logits, attentions = [], []
    for image, row in zip(images, tokens, strict=True):
        x = model._pos_embed(model.patch_embed(image[None]))[:, row]
        for block in model.blocks[:-1]:
            x = block(x)
        last = model.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, last.attn.num_heads, last.attn.head_dim))
        q, k, _ = qkv[0].permute(1, 2, 0, 3)
        attentions.append((q @ k.mT / last.attn.head_dim**0.5).softmax(-1))
        logits.append(model.forward_head(model.norm(last(x)))[0])
    return torch.stack(logits), torch.stack(attentions)


def every_token(batch_size: int, patches: int) -> torch.Tensor:
    return torch.arange(patches + 1).repeat(batch_size, 1)


def columns_to_keep(attention: torch.Tensor, count: int) -> torch.Tensor:
    """The class token's column, then those of the patches with the most attention: (B, H, Q, Q) -> (B, count + 1)."""
    importance = attention.mean(1)[:, 0]
    importance[:, 0] = torch.inf
    return importance.argsort(1, descending=True)[:, : count + 1]


def test_two_stoppings_equal_timms_blocks_on_gathered_tokens(model, images):
    adaptor = SMIAdaptor(model)
    index, columns, attentions = every_token(3, 64), every_token(3, 64), None
    tokens, expected_attention = every_token(3, 64), None
    for count in (64, 44, 44, 30, 30):  # an iteration that stops, and one that goes on with what is left
        if count < index.shape[1] - 1:
            columns = columns_to_keep(attentions[-1], count)
            tokens = tokens.gather(1, columns_to_keep(expected_attention, count))
        logits, attentions, index = adaptor(images, index, columns)
        expected, expected_attention = plain(model, images, tokens)
        torch.testing.assert_close(logits, expected)
        assert attentions[-1].shape == (3, 1, 1, count + 1)
        row = expected_attention.mean(1)[:, 0].float()
        torch.testing.assert_close(attentions[-1][:, 0, 0, 1:], row[:, 1:], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(attentions[-1][:, 0, 0, 0], row[:, 0], rtol=0, atol=1e-6)
        assert index.dtype == torch.int64
        assert torch.equal(index, tokens)


def test_the_gradient_of_the_images_is_that_of_timms_blocks(model, images):
    images.requires_grad_()
    tokens = torch.cat((torch.zeros(3, 1, dtype=torch.int64), 1 + torch.rand(3, 64).argsort(1)[:, :20]), 1)
    weights = torch.randn(3, 7, dtype=torch.float64)
    logits, attentions, _ = SMIAdaptor(model)(images, every_token(3, 64), tokens)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), images)
    (expected,) = torch.autograd.grad((plain(model, images, tokens)[0] * weights).sum(), images)
    torch.testing.assert_close(gradient, expected)
    assert not attentions[-1].requires_grad


def test_equally_many_columns_stop_nothing_whatever_they_hold(model, images):
    tokens = torch.tensor([[0, 5, 64, 1], [0, 2, 3, 9], [0, 40, 41, 7]])
    adaptor = SMIAdaptor(model)
    logits, _, index = adaptor(images, tokens, torch.tensor([[0, 60, 61, 62]]).expand(3, -1))
    assert torch.equal(index, tokens)
    assert torch.equal(logits, adaptor(images, tokens, tokens)[0])
    torch.testing.assert_close(logits, plain(model, images, tokens)[0])


def test_without_indices_every_token_is_in_use(model, images):
    logits, attentions, index = SMIAdaptor(model)(images)
    torch.testing.assert_close(logits, model(images))
    assert torch.equal(index, every_token(3, 64))
    assert attentions[-1].shape == (3, 1, 1, 65)


def test_only_the_last_blocks_entry_holds_attention(model, images):
    _, attentions, _ = SMIAdaptor(model)(images)
    assert len(attentions) == len(model.blocks)
    assert attentions[:-1] == [None]


def test_indices_as_keywords_and_as_int32_are_the_same(model, images):
    adaptor, tokens = SMIAdaptor(model), torch.tensor([[0, 5, 64]]).expand(3, -1)
    first = adaptor(images, every_token(3, 64), tokens)
    second = adaptor(images, next_relative_index=tokens.int(), current_abs_index=every_token(3, 64).int())
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])
    assert second[2].dtype == torch.int64


def test_an_accelerated_model_is_taken_as_it_is(model, images):
    fast = accelerate(model, backend="torch")
    adaptor = SMIAdaptor(fast)
    assert adaptor.fast is fast
    assert torch.equal(adaptor(images)[0], fast(images))
    with pytest.raises(ValueError, match="accelerated already: dtype=None and backend='torch'"):
        SMIAdaptor(fast, backend="torch")


def test_a_frozen_adaptor_follows_its_own_weights_only(model, images):
    """Its weights are cast and laid out once, and again after they were written to, replaced or moved."""
    frozen, shared = (SMIAdaptor(model.float(), dtype=torch.bfloat16, freeze=freeze) for freeze in (True, False))
    images, expected = images.detach().float().requires_grad_(), shared(images.float())[0]

    def gradients(adaptor):
        return torch.autograd.grad(adaptor(images)[0].square().sum(), images)[0]

    torch.testing.assert_close(gradients(frozen), gradients(shared))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(-3)
    assert torch.equal(frozen(images)[0], expected)
    assert all(weight.requires_grad for weight in model.parameters())
    changes = (
        lambda fast: fast.load_state_dict(model.state_dict()),
        lambda fast: setattr(fast.blocks[1].attn.qkv, "weight", nn.Parameter(-model.blocks[1].attn.qkv.weight)),
        lambda fast: fast.double().float(),
        lambda fast: fast.head.bias.detach().add_(1),
        lambda fast: fast.prune_intermediate_layers([0], prune_head=False),
    )
    for change in changes:
        before = frozen(images)[0]
        change(frozen.fast)
        expected = SMIAdaptor(copy.deepcopy(frozen.fast.model), dtype=torch.bfloat16)(images)[0]
        torch.testing.assert_close(frozen.fast(images).float(), expected)
        torch.testing.assert_close(frozen(images)[0], expected)
        assert change is changes[2] or not torch.allclose(before, expected)
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        copied.fast.head.bias.data.add_(1)
        assert copied.fast.head._cast_weights is not frozen.fast.head._cast_weights
        copied.fast.head.bias.data.sub_(1)
        torch.testing.assert_close(copied(images)[0], expected)


def test_logits_have_the_dtype_of_the_images(model):
    adaptor = SMIAdaptor(model.float(), dtype=torch.bfloat16)
    logits, attentions, _ = adaptor(torch.randn(2, 3, 32, 32))
    assert logits.dtype == attentions[-1].dtype == torch.float32
    torch.testing.assert_close(attentions[-1].sum(3), torch.ones(2, 1, 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "need a class token, the model has none"),
        ({"reg_tokens": 2}, "no place for prefix tokens but the class token: 2 more"),
        ({"global_pool": "map"}, "the model's head is an attention pooling"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "the model's is a ParallelScalingBlock"),
        ({"attn_layer": timm.layers.DiffAttention}, "the model's is a DiffAttention"),
    ],
)
def test_a_model_without_the_conventions_attention_is_refused(seed, overrides, message):
    with pytest.raises(UnsupportedModelError, match=message):
        SMIAdaptor(cifar10_vit(False, depth=1, embed_dim=48, num_heads=3, **overrides))


def changed(row: int, column: int, value: int) -> torch.Tensor:
    index = every_token(3, 64)
    index[row, column] = value
    return index


@pytest.mark.parametrize(
    ("current", "following", "message"),
    [
        (None, every_token(3, 64), "current_abs_index is None and the other index is not"),
        (every_token(3, 64), None, "next_relative_index is None and the other index is not"),
        ([[0, 1]], every_token(3, 64), "current_abs_index is a list, expected a tensor"),
        (every_token(2, 64), every_token(3, 64), r"current_abs_index has shape \(2, 65\), expected \(3, tokens\)"),
        (every_token(3, 64), torch.arange(4), r"next_relative_index has shape \(4,\), expected \(3, tokens\)"),
        (every_token(3, 64), every_token(3, 0), "next_relative_index has 1 columns, expected the class token and"),
        (every_token(3, 64).float(), every_token(3, 64), "current_abs_index has dtype torch.float32"),
        (every_token(3, 64), every_token(3, 4).bool(), "next_relative_index has dtype torch.bool"),
        (every_token(3, 64).to("meta"), every_token(3, 64), "current_abs_index is on meta, the images are on cpu"),
        (every_token(3, 64) + 1, every_token(3, 64), "current_abs_index row 0 starts with 1, expected 0"),
        (changed(2, 4, 65), every_token(3, 64), r"current_abs_index row 2 holds 65, outside \[0, 65\)"),
        (changed(1, 4, -1), every_token(3, 64), r"current_abs_index row 1 holds -1, outside \[0, 65\)"),
        (changed(1, 4, 9), every_token(3, 64), "current_abs_index row 1 names 9 twice"),
        (changed(1, 4, 0), every_token(3, 64), "current_abs_index row 1 names 0 twice"),
        (every_token(3, 64), every_token(3, 4) + 1, "next_relative_index row 0 starts with 1, expected 0"),
        (every_token(3, 3), every_token(3, 4), r"next_relative_index row 0 holds 4, outside \[0, 4\)"),
    ],
)
def test_indices_that_do_not_fit_are_named(model, images, current, following, message):
    with pytest.raises(ValueError, match=message):
        SMIAdaptor(model)(images, current, following)


def test_images_that_do_not_fit_are_named(model):
    with pytest.raises(ValueError, match=r"images have shape \(3, 32, 32\), expected \(B, C, H, W\)"):
        SMIAdaptor(model)(torch.zeros(3, 32, 32))


@pytest.fixture
def both(seed, monkeypatch) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The published model and ours, 224x224 pixels, 7x7 patches, the same weights, all in float64."""

    torch.set_default_dtype(torch.float64)
    ours = with_weights_at_random(
        timm.models.VisionTransformer(img_size=224, patch_size=32, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    )
    theirs = published_model(ours, monkeypatch)
    yield theirs, SMIAdaptor(ours)
    torch.set_default_dtype(torch.float32)


def importance_as_they_read_it(attentions: list[torch.Tensor]) -> torch.Tensor:
    return attentions[-1].mean(dim=1)[:, 0, :][:, 1:].float()


@needs_checkout
def test_the_published_model_gives_the_same_over_two_stoppings(both):
    theirs, ours = both
    images, index, columns, their_attentions = torch.randn(2, 3, 224, 224), every_token(2, 49), every_token(2, 49), None
    their_index = index
    for count in (49, 34, 34, 23, 23):
        if count < index.shape[1] - 1:
            columns = columns_to_keep(their_attentions[-1].detach(), count)
        logits, attentions, index = ours(images, index, columns)
        their_logits, their_attentions, their_index = theirs(images, their_index, columns)
        torch.testing.assert_close(logits, their_logits)
        expected = importance_as_they_read_it(their_attentions)
        torch.testing.assert_close(importance_as_they_read_it(attentions), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            attentions[-1].mean(1)[:, 0], their_attentions[-1].mean(1)[:, 0].float(), atol=1e-6, rtol=0
        )
        assert len(attentions) == len(their_attentions)
        assert torch.equal(index, their_index)
        assert index.dtype == their_index.dtype


@needs_checkout
def test_the_published_loop_makes_the_same_images(both, seed, tmp_path):
    results, tokens = [], []
    for name, teacher in zip(("theirs", "ours"), both, strict=True):
        seen = []
        teacher.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[2]))
        random.seed(seed)
        torch.manual_seed(seed)
        synthesis = published_synthesis(
            teacher, tmp_path / name, mean=(0.5,) * 3, std=(0.25,) * 3, patch_size=32, iterations=9
        )
        results.append(synthesis.synthesize(torch.tensor([1, 4]), 50, prune_it=[3, 6], prune_ratio=[0.3, 0.4]))
        tokens.append(seen)
    assert [index.shape[1] for index in tokens[1]] == [50] * 3 + [35] * 3 + [21] * 3 + [50]
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*tokens, strict=True))
    for name in ("synthetic", "masked_synthetic"):
        torch.testing.assert_close(results[1][name], results[0][name], rtol=0, atol=1e-6)
