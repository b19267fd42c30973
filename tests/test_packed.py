"""PackedTokens and its helpers: round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fast.packed import PackedTokens, pack_keep

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def packed(lengths: list[int]) -> PackedTokens:
    return PackedTokens.from_sequences([torch.randn(n, 2) for n in lengths], [torch.randperm(n) for n in lengths])


@given(lengths)
def test_sequences_come_back_as_they_were_packed(lengths):
    values = [torch.randn(n, 2) for n in lengths]
    tokens = PackedTokens.from_sequences(values, [torch.arange(n) for n in lengths])
    assert tokens.batch_size == len(lengths)
    assert tokens.max_seqlen == max(lengths)
    assert tokens.is_uniform == (len(set(lengths)) == 1)
    assert all(torch.equal(a, b) for a, b in zip(tokens.sequences(), values, strict=True))


@given(st.integers(1, 5), st.integers(1, 9))
def test_a_uniform_batch_is_the_same_memory_packed_and_batched(batch, length):
    values = torch.randn(batch, length, 3)
    tokens = PackedTokens.from_batch(values, torch.arange(length))
    assert tokens.batch().data_ptr() == values.data_ptr()
    assert torch.equal(tokens.batch(), values)
    assert tokens.cu_seqlens.tolist() == [i * length for i in range(batch + 1)]


@pytest.mark.parametrize(
    ("rows", "message"), [([[1, 5], [2, 9]], "row 1 holds patch 9"), ([[1], [3, 2, 3]], "row 1 names patch 3 twice")]
)
def test_a_packed_keep_is_checked_too(rows, message):
    keep = PackedTokens.from_sequences(None, [torch.tensor(row) for row in rows])
    with pytest.raises(ValueError, match=message):
        pack_keep(keep, 2, 6, torch.device("cpu"))


def test_sequences_of_differing_length_have_no_batch():
    with pytest.raises(ValueError, match="differ in length"):
        packed([1, 2]).batch()


@given(lengths)
def test_padding_puts_each_token_at_its_slot_and_zeros_elsewhere(lengths):
    tokens = packed(lengths)
    padded, mask = tokens.pad(tokens.values)
    assert mask.sum(1).tolist() == lengths
    assert (padded[~mask] == 0).all()
    assert all(torch.equal(row[:n], s) for row, n, s in zip(padded, lengths, tokens.sequences(), strict=True))
    assert torch.equal(tokens.unpad(padded), tokens.values)


@given(lengths, st.integers(0, 3))
def test_prefix_tokens_stand_before_every_sequence(lengths, count):
    tokens, prefix = packed(lengths), torch.randn(count, 2)
    longer = tokens.prepend(prefix)
    for ours, sequence in zip(longer.sequences(), tokens.sequences(), strict=True):
        assert torch.equal(ours, torch.cat((prefix, sequence)))
    positions = longer.positions.split([n + count for n in lengths])
    for ours, theirs in zip(positions, tokens.positions.split(lengths), strict=True):
        assert ours.tolist() == [*range(-count, 0), *theirs.tolist()]
    assert longer.max_seqlen == max(lengths) + count
