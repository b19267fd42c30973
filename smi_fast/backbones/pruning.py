"""The choice of the most important patches, which pruning within a model and the inversion loop share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timm.layers import DiffAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, VisionTransformer
from torch import Tensor

from smi_fast import kernels
from smi_fast.backbones.support import UnsupportedModelError
from smi_fast.packed import PackedTokens


@dataclass(frozen=True)
class Mass:
    """Keep the fewest patches whose importance sums to at least this share, in (0, 1], of the image's total."""

    share: float

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of attention to keep must lie in (0, 1], got {self.share}")

    def __str__(self) -> str:
        return f"mass={self.share:g}"


Prune = Mapping[int, float | Mass]  # maps the number of a block to what is pruned before it


def kept_count(count: int, fraction: float) -> int:
    """Return how many of `count` patches are left when `fraction` of them stops. It may be 0."""
    return int(count * (1 - fraction))


def keep_highest(
    tokens: PackedTokens, importance: Tensor, stop: float | Mass, *, num_prefix_tokens: int = 0, backend: str = "auto"
) -> PackedTokens:
    """Keep the most important patches of each sequence, in their order.

    Args:
        tokens: the sequences, with or without values. Prefix tokens always stay.
        importance: (T,), or (heads, T), whose mean over the heads is the importance.
        stop: a fraction in (0, 1) that stops, so that int(n * (1 - fraction)) of n patches stay, at least one; or a
            `Mass` that stays. Of equal patches, the first one stays. The host waits if it does not know the counts.
        num_prefix_tokens: how many tokens at the start of each sequence are not patches.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: importance is NaN or, with `Mass`, negative or infinite. On a GPU this is a device-side assertion.
    """
    if isinstance(stop, Mass):
        how = {"mass": stop.share}
    elif tokens.is_uniform:
        how = {"k": max(1, kept_count(tokens.max_seqlen - num_prefix_tokens, stop))}
    else:
        how = {"k": [max(1, kept_count(length - num_prefix_tokens, stop)) for length in tokens.lengths()]}
    selected = kernels.select_tokens(
        importance,
        tokens.values,
        tokens.positions,
        num_prefix_tokens=num_prefix_tokens,
        cu_seqlens=tokens.cu_seqlens,
        max_seqlen=tokens.max_seqlen,
        backend=backend,
        **how,
    )
    return PackedTokens(*selected)


def check_prune(model: VisionTransformer, prune: Prune) -> dict[int, float | Mass]:
    """Check `prune` for a supported model, and return it as a dict. `accelerate` lists the errors."""
    if prune and not model.has_class_token:
        raise UnsupportedModelError("the model has no class token, whose attention decides which patches are pruned")
    checked, last = {}, len(model.blocks) - 1
    for number, stop in prune.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= last:
            raise ValueError(f"prune names block {number!r}: patches are pruned before one of blocks 1 to {last}")
        if not isinstance(stop, Mass) and not (isinstance(stop, (int, float)) and 0 < stop < 1):
            raise ValueError(f"prune before block {number} must be a fraction in (0, 1) or a Mass, got {stop!r}")
        for part in model.blocks[number - 1].modules():
            if isinstance(part, (DiffParallelScalingBlock, DiffAttention)):
                raise UnsupportedModelError(
                    f"blocks[{number - 1}] holds a {type(part).__name__}, whose attention is a difference of two and "
                    f"cannot decide what to prune before block {number}"
                )
        checked[number] = stop
    return checked
