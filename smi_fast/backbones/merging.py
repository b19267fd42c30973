"""Token Merging (ToMe: Bolya et al., 2023, arXiv 2210.09461) on packed tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.backbones.dropping import require
from smi_fast.backbones.pruning import SIZE_CHANNELS, Merge
from smi_fast.kernels.rows import cumulative_lengths, gather_rows, padding, uniform_lengths
from smi_fast.packed import PackedTokens


def merge_patches(
    tokens: PackedTokens, keys: Tensor, sizes: Tensor | None, merge: Merge, *, number: int, num_prefix_tokens: int
) -> tuple[PackedTokens, Tensor | None]:
    """Merge the most similar patches of each sequence by bipartite soft matching (section 3).

    Each token in an even place of its sequence finds the most similar token in an odd place: the one whose key,
    averaged over heads, has the highest cosine similarity. The `merge.count` most similar pairs merge, but at most half
    of the patches. A merged token is the mean of its tokens, weighted by their sizes, at the position of the token in
    the odd place. Prefix tokens do not take part. The result has ToMe's order, on which the next merging depends:
    prefix tokens, the even tokens that are left, the odd tokens. Each group keeps its order. (ToMe's code leaves the
    even tokens in the order of their similarity if there is no class token.)

    Args:
        tokens: the sequences, with values (T, C).
        keys: (T, H, D), the keys of the block in which the tokens merge. They get no gradient.
        sizes: (T,) float32, how many patches were merged into each token, or None if none were.
        number: the block before which the tokens merge, for messages.

    Returns:
        The tokens that are left, and their sizes.

    Raises:
        ValueError: a key is NaN or infinite. On a GPU this is a device-side assertion.
    """

    def pairs(length: int) -> int:
        return min(merge.count, (length - num_prefix_tokens) // 2)

    _, most, merging = _slots(tokens, pairs)
    starts, longest, left = _slots(tokens, lambda length: length - pairs(length))
    if most == 0:
        return tokens, sizes
    require(keys.flatten(1).isfinite().all(1), tokens, f"keys must be finite to merge patches before block {number}")
    similarity, partner = _match(tokens, keys, num_prefix_tokens)  # [B, N / 2] each
    ranked = similarity.argsort(dim=1, descending=True, stable=True)[:, :most]  # the even tokens that merge come first
    first = tokens.cu_seqlens[:-1, None]
    source = (first + 2 * ranked).flatten()[merging]  # rows of the tokens that merge into others
    target = (first + 2 * partner.gather(1, ranked) + 1).flatten()[merging]  # rows of these others

    stays = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device).index_fill(0, source, False)
    stays, _ = tokens.pad(stays)  # [B, N]
    place = torch.arange(tokens.max_seqlen, device=keys.device)
    group = torch.where(place < num_prefix_tokens, 0, 1 + place % 2)  # prefix, even, odd
    order = group.expand(stays.shape).masked_fill(~stays, 3).argsort(dim=1, stable=True)
    rows = (first + order[:, :longest]).flatten()[left]
    slots = rows.new_zeros(keys.shape[0]).scatter(0, rows, torch.arange(rows.shape[0], device=keys.device))

    def merged(x: Tensor) -> Tensor:
        # On a GPU this sum does not depend on the order of its terms, as that of `index_add` does.
        return gather_rows(x, rows).index_put((slots[target],), gather_rows(x, source), accumulate=True)

    sizes = torch.ones(keys.shape[0], device=keys.device) if sizes is None else sizes
    exact = torch.promote_types(tokens.values.dtype, torch.float32)
    sums, sizes = merged(tokens.values.to(exact) * sizes[:, None]), merged(sizes)
    values = (sums / sizes[:, None]).to(tokens.values.dtype)
    return PackedTokens(values, tokens.positions[rows], starts, longest), sizes


def _slots(tokens: PackedTokens, length: Callable[[int], int]) -> tuple[Tensor, int, Tensor]:
    """Lay out sequences whose lengths follow from those of `tokens`: return their cu_seqlens and max_seqlen, and the
    place of each of their T' elements among the B * max_seqlen places of a padded batch, (T',) int64."""
    device = tokens.cu_seqlens.device
    if tokens.is_uniform:
        longest = length(tokens.max_seqlen)
        starts, total = uniform_lengths(tokens.batch_size, longest, device), tokens.batch_size * longest
    else:
        lengths = [length(each) for each in tokens.lengths()]
        starts, longest, total = cumulative_lengths(lengths, device), max(lengths), sum(lengths)
    return starts, longest, padding(starts, longest, total)[0]


def _match(tokens: PackedTokens, keys: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the highest similarity of each even token to an odd one, and which odd one it is, (B, N / 2) each. The
    similarity is -inf for prefix tokens."""
    keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    keys, present = tokens.pad(F.normalize(keys.mean(1), dim=-1))  # [B, N, D], [B, N]
    free = present & (torch.arange(tokens.max_seqlen, device=keys.device) >= num_prefix_tokens)
    with torch.autocast(keys.device.type, enabled=False):  # a rounded similarity would make ties
        similarity = keys[:, ::2] @ keys[:, 1::2].mT  # [B, N / 2, N / 2]
    pairs = free[:, ::2, None] & free[:, None, 1::2]
    return similarity.masked_fill(~pairs, float("-inf")).max(-1)


def size_channels(sizes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return channels (T, 3, 1, SIZE_CHANNELS) that are appended to the queries, keys and values of each head, so that
    the scores, scale * q k^T, gain the logarithm of the key's size: proportional attention (equation 1).

    The logarithm is the sum of two numbers, so that its rounding is that of a product and not of the dtype.
    """
    logarithm = sizes.double().log() / scale
    high = logarithm.to(dtype)
    channels = high.new_zeros(sizes.shape[0], 3, 1, SIZE_CHANNELS)
    channels[:, 0, :, :2] = 1
    channels[:, 1, :, 0] = high[:, None]
    channels[:, 1, :, 1] = (logarithm - high.double()).to(dtype)[:, None]
    return channels
