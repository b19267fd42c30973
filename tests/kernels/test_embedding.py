"""Tokens out of embedded patches: against what is written out sequence by sequence, on both backends."""

import sys

import pytest
import torch
from kernel_cases import DeviceWork, canaries, cu_seqlens_of, poisoned_memory
from smi_fast.kernels import embed_tokens
from smi_fast.kernels.embedding import (
    embed_tokens_backward_op,
    embed_tokens_op,
    launch_embed_tokens,
    launch_embed_tokens_backward,
)
from smi_fast.kernels.norm import MAX_CHANNELS

BOTH = pytest.mark.parametrize("backend", ["torch", "triton"])
MODULE = sys.modules[embed_tokens.__module__]
SINGLE, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
CELLS = 5


def draw(lengths, channels, count, dtype, stored, device, embeds_prefix=True):
    """Patches, their positions and lengths, prefix tokens and position embeddings."""
    x = torch.randn(sum(lengths), channels, device=device).to(dtype)
    positions = torch.cat([torch.randperm(CELLS)[:n] for n in lengths]).int().to(device)
    prefix = torch.randn(count, channels, device=device).to(stored)
    pos_embed = torch.randn(CELLS + count * embeds_prefix, channels, device=device).to(stored)
    return x, positions, cu_seqlens_of(lengths, device), max(lengths), prefix, pos_embed


def written_out(x, positions, lengths, prefix, pos_embed, embeds_prefix):
    """The tokens and positions of each sequence, one after the other."""
    count, tokens, places = len(prefix), [], []
    first = count if embeds_prefix else 0
    for own, cells in zip(x.split(lengths), positions.split(lengths), strict=True):
        own, before = (own, prefix) if pos_embed is None else (own + pos_embed[first + cells], prefix)
        if pos_embed is not None and embeds_prefix:
            before = prefix + pos_embed[:count]
        tokens += [before, own] if count else [own]
        places += [*range(-count, 0), *cells.tolist()]
    return torch.cat(tokens), places


@BOTH
@pytest.mark.parametrize("embeds_prefix", [True, False, None], ids=["all", "patches", "none"])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("lengths", [(2, 2), (3, 1, 4)], ids=str)
def test_tokens_positions_and_gradients_are_those_written_out(lengths, count, embeds_prefix, backend, device, seed):
    """To the last bit, in every dtype: each element is one sum, rounded as torch rounds it."""
    for channels, dtype, stored in ((40, BF16, SINGLE), (33, SINGLE, SINGLE), (1, HALF, HALF), (8, SINGLE, BF16)):
        x, positions, cu_seqlens, longest, prefix, pos_embed = draw(
            lengths, channels, count, dtype, stored, device, embeds_prefix is not False
        )
        pos_embed, options = None if embeds_prefix is None else pos_embed, {"embeds_prefix": bool(embeds_prefix)}
        leaf, own = x.clone().requires_grad_(), x.clone().requires_grad_()
        with poisoned_memory():
            arguments = positions, cu_seqlens, longest, prefix, pos_embed
            tokens, places, starts = embed_tokens(leaf, *arguments, **options, backend=backend)
            wanted, wanted_places = written_out(own, positions, lengths, prefix, pos_embed, bool(embeds_prefix))
            grad = torch.randn(wanted.shape, device=device).to(wanted.dtype)
            (found,) = torch.autograd.grad(tokens, leaf, grad)
        assert (tokens.dtype, places.dtype, starts.dtype) == (wanted.dtype, torch.int32, torch.int32)
        assert torch.equal(tokens, wanted)
        assert places.tolist() == wanted_places
        assert torch.equal(starts, cu_seqlens_of([n + count for n in lengths], device))
        assert torch.equal(found, torch.autograd.grad(wanted, own, grad)[0])
        assert found.dtype == dtype
        with torch.no_grad():
            again = embed_tokens(x, *arguments, **options, backend=backend)
        assert all(map(torch.equal, again, (tokens, places, starts)))


@BOTH
def test_an_empty_batch_has_no_tokens(backend, device):
    x, positions, cu_seqlens, _, prefix, pos_embed = draw([0], 8, 1, BF16, SINGLE, device)
    tokens, places, starts = embed_tokens(x, positions, cu_seqlens[:1], 4, prefix, pos_embed, backend=backend)
    assert (tuple(tokens.shape), tuple(places.shape), starts.tolist()) == ((0, 8), (0,), [0])


@pytest.mark.parametrize("trained", ["prefix", "pos_embed"])
def test_prefix_and_position_embeddings_that_ask_for_gradients_get_them(trained, device, seed):
    lengths = [2, 5]
    x, positions, cu_seqlens, longest, prefix, pos_embed = draw(lengths, 8, 2, SINGLE, SINGLE, device)
    weights = {"prefix": prefix.requires_grad_(trained == "prefix"), "pos_embed": pos_embed}
    weights["pos_embed"].requires_grad_(trained == "pos_embed")
    tokens, *_ = embed_tokens(x, positions, cu_seqlens, longest, **weights, backend="triton")
    wanted, _ = written_out(x, positions, lengths, *weights.values(), True)
    found, exact = (torch.autograd.grad(t.square().sum(), weights[trained])[0] for t in (tokens, wanted))
    torch.testing.assert_close(found, exact)


@pytest.mark.cuda
@pytest.mark.parametrize("channels", [192, 768, 1408, MAX_CHANNELS])
@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF], ids=str)
def test_gpu_gives_the_bits_of_plain_torch_each_time(dtype, channels, device, seed):
    lengths = [5, 1, 3, 4] * 16
    x, *others = draw(lengths, channels, 2, dtype, SINGLE, device)
    grad = torch.randn(len(x) + 2 * len(lengths), channels, device=device)

    def both(backend):
        leaf = x.clone().requires_grad_()
        tokens, *rest = embed_tokens(leaf, *others, backend=backend)
        return tokens, *rest, *torch.autograd.grad(tokens, leaf, grad)

    for found in (both("triton"), both("triton")):
        assert all(map(torch.equal, found, both("torch")))


def test_one_launch_each_way_and_nothing_else(device, seed):
    (x, *others), grad = draw([2, 5], 8, 1, BF16, SINGLE, device), torch.randn(9, 8, device=device)
    with DeviceWork(MODULE) as work:
        tokens, *_ = embed_tokens(x.requires_grad_(), *others, backend="triton")
        torch.autograd.grad(tokens, x, grad)
    assert (work.launches, [name for name in work.operators if name != "empty_like"]) == (2, [])


def test_writes_stay_in_the_outputs(device, seed):
    x, positions, cu_seqlens, longest, prefix, pos_embed = draw([3, 1, 4], 40, 2, BF16, SINGLE, device)
    with canaries(MODULE, "_fake_embed_tokens"):
        tokens, *_ = launch_embed_tokens(x, positions, cu_seqlens, longest, prefix, pos_embed, True)
    with canaries(MODULE, "_fake_embed_tokens_backward"):
        launch_embed_tokens_backward(tokens, cu_seqlens, longest, len(x), 2, BF16)


def test_operators_pass_opcheck_and_compile(device, seed):
    x, *others = draw([3, 1, 4], 8, 1, BF16, SINGLE, device)
    tokens, *_ = embed_tokens_op(x, *others, True)
    torch.library.opcheck(embed_tokens_op, (x.clone().requires_grad_(), *others, True))
    torch.library.opcheck(embed_tokens_backward_op, (tokens, others[1], others[2], len(x), 1, BF16))

    def both(run):
        leaf = x.clone().requires_grad_()
        outputs = run(leaf, *others, backend="triton")
        return *outputs, torch.autograd.grad(outputs[0].sin().sum(), leaf)[0]

    compiled = torch.compile(embed_tokens, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(both(compiled), both(embed_tokens), strict=True):
        torch.testing.assert_close(found, wanted)


def test_wide_rows_are_computed_in_plain_torch_or_refused(device, seed):
    x, *others = draw([2, 2], MAX_CHANNELS + 1, 1, SINGLE, SINGLE, device)
    assert torch.equal(embed_tokens(x, *others)[0], embed_tokens(x, *others, backend="torch")[0])
    with pytest.raises(ValueError, match=str(MAX_CHANNELS + 1)):
        embed_tokens(x, *others, backend="triton")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\)"),
        ({"x": torch.zeros(3, 4).int()}, "x has dtype torch.int32"),
        ({"positions": torch.zeros(2).int()}, r"positions is \(2,\)"),
        ({"positions": torch.zeros(3)}, "torch.float32, not"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "torch.int64, not"),
        ({"prefix": torch.zeros(1, 5)}, r"prefix has shape \(1, 5\)"),
        ({"pos_embed": torch.zeros(9, 5)}, r"pos_embed has shape \(9, 5\)"),
        ({"prefix": torch.zeros(3, 4), "pos_embed": torch.zeros(2, 4)}, "has 2 rows, fewer than the 3"),
        ({"positions": torch.zeros(3, device="meta").int()}, "positions is on meta"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changed, message):
    usual = {"x": torch.zeros(3, 4), "positions": torch.arange(3).int(), "cu_seqlens": cu_seqlens_of([3])}
    usual |= {"max_seqlen": 3, "prefix": torch.zeros(1, 4), "pos_embed": torch.zeros(10, 4)}
    with pytest.raises(ValueError, match=message):
        embed_tokens(**usual | changed)
