"""How many of the most important patches go on, and which: shared by pruning within a model and by the loop."""

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


Prune = Mapping[int, float | Mass]  # block -> what is pruned before it


def kept_count(count: int, fraction: float) -> int:
    """Of `count` patches, how many are left when `fraction` of them is stopped (may be 0)."""
    return int(count * (1 - fraction))


def keep_highest(
    tokens: PackedTokens, importance: Tensor, stop: float | Mass, *, num_prefix_tokens: int = 0, backend: str = "auto"
) -> PackedTokens:
    """The most important patches of each sequence, in the order that they have.

    Args:
        tokens: with or without values; prefix tokens always stay.
        importance: (T,), or (heads, T) of which the mean counts.
        stop: a fraction in (0, 1), of which n patches leave int(n * (1 - fraction)), at least one; or `Mass(p)`. A tie
            goes to the patch that comes first. The host waits for the device where the counts are not known to it.
        num_prefix_tokens: the first tokens of each sequence that are no patches.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: importance that is NaN, or with `Mass` negative or infinite (on a GPU a device-side assertion).
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
    """`prune` for a supported model; raises as `accelerate` says."""
    if prune and not model.has_class_token:
        raise UnsupportedModelError("the model has no class token, by whose attention patches are pruned")
    checked, last = {}, len(model.blocks) - 1
    for number, stop in prune.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= last:
            raise ValueError(f"prune names block {number!r}: patches are pruned before one of blocks 1 to {last}")
        if not isinstance(stop, Mass) and not (isinstance(stop, (int, float)) and 0 < stop < 1):
            raise ValueError(f"prune before block {number} must be a fraction in (0, 1) or a Mass, got {stop!r}")
        for part in model.blocks[number - 1].modules():
            if isinstance(part, (DiffParallelScalingBlock, DiffAttention)):
                raise UnsupportedModelError(
                    f"blocks[{number - 1}] holds a {type(part).__name__}, whose difference of two attentions is no "
                    f"attention of the class token to prune by before block {number}"
                )
        checked[number] = stop
    return checked
