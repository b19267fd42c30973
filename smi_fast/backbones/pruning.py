"""The values that `accelerate(prune=...)` accepts, and the choice of the most important patches, which pruning within a
model and the inversion loop share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass

from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.backbones.support import UnsupportedModelError
from smi_fast.packed import PackedTokens

SIZE_CHANNELS = 8  # head channels that carry the sizes of merged patches; head_dim stays a multiple of 8


@dataclass(frozen=True)
class Mass:
    """Keep the fewest patches whose importance sums to at least this share, in (0, 1], of the image's total."""

    share: float

    def __post_init__(self):
        is_number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not (is_number and 0 < self.share <= 1):
            raise ValueError(f"the share of attention to keep must lie in (0, 1], got {self.share!r}")

    def __str__(self) -> str:
        return f"mass={self.share:g}"


Scores = Callable[[PackedTokens, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Drop:
    """Drop the patches with the lowest scores: by default those to which the class token attends least.

    Args:
        amount: a fraction in (0, 1) of the patches, which goes; a count from 1 on of the patches that stay (all of
            them, if there are fewer); a `Mass` of the scores that stays; or None, so that the patches with a positive
            score stay, or only the first of the best if there is none. At least one patch stays.
        scores: a function of (tokens, positions, importance) that returns the scores (T,), any floating dtype, which
            are compared in float32. Its arguments describe the patches that enter the next block, without prefix
            tokens: a `PackedTokens` with values (T, C), its positions (T,), and the attention (T,) float32 that the
            class token paid to them. It runs without gradients, because a choice has none: train a learned scorer by a
            relaxation of its own, as DynamicViT does (Rao et al., 2021). A module among such functions is not a part of
            the model, so it is moved and saved separately.
        round: how the number of patches that stay is rounded if the amount is a fraction. "floor" keeps
            int(n * (1 - amount)) of n patches, "ceil" rounds up, as EViT does (Liang et al., 2022).
        fuse: adds one more token behind the patches that stay, made of the patches x_i that go and the class token's
            attention a_i to them, averaged over heads. "sum" is sum(a_i x_i), as EViT's published code computes it,
            "mean" is sum(a_i x_i) / sum(a_i). Images that lose no patch get no such token. It counts as a patch when
            patches are chosen later, but it has no place in the grid: in a model with P prefix tokens its position is
            -P - 1.

    EViT that keeps a rate k of the patches in block b is `{b + 1: Drop(1 - k, round="ceil", fuse="sum")}`.

    Raises:
        ValueError: an argument is out of range, or `fuse` comes with `scores`.
    """

    amount: float | int | Mass | None = None
    _: KW_ONLY
    scores: Scores | None = None
    round: str = "floor"
    fuse: str | None = None

    def __post_init__(self):
        amount = self.amount
        # torch.compile makes a number that differs between models a variable of its graph, and a text never.
        object.__setattr__(self, "_text", str(amount))
        if amount is None and self.scores is None:
            raise ValueError("a Drop needs an amount or a function of scores")
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not (amount is None or isinstance(amount, Mass) or (is_number and (0 < amount < 1 or self._is_count))):
            raise ValueError(
                "the amount must be a fraction in (0, 1) that goes, a count from 1 on or a Mass that stays, got "
                f"{amount!r}"
            )
        if self.scores is not None and not _is_function(self.scores):
            raise ValueError(f"scores must be a function of (tokens, positions, importance), got {self.scores!r}")
        if self.round not in ("floor", "ceil"):
            raise ValueError(f'round must be "floor" or "ceil", got {self.round!r}')
        if self.fuse not in (None, "mean", "sum"):
            raise ValueError(f'fuse must be None, "mean" or "sum", got {self.fuse!r}')
        if self.fuse is not None and self.scores is not None:
            raise ValueError(f"fuse={self.fuse!r} weighs patches by the class token's attention, so it takes no scores")

    @property
    def _is_count(self) -> bool:
        return isinstance(self.amount, int) and self.amount >= 1

    @property
    def equal_counts(self) -> bool:
        """Whether equally many patches of each image stay if the images have equally many."""
        return not (self.amount is None or isinstance(self.amount, Mass))

    def kept(self, count: int) -> int:
        """Return how many of `count` patches stay, for an amount that is a fraction or a count."""
        if self._is_count:
            return min(self.amount, count)
        fraction = float(self._text)
        if self.round == "ceil":
            return math.ceil(count * round(1 - fraction, 12))  # 1 - 0.7 is a little more than 0.3
        return max(1, kept_count(count, fraction))


@dataclass(frozen=True)
class Merge:
    """Merge `count` patches of each image into patches with similar keys (ToMe: Bolya et al., 2023, section 3).

    At most half of an image's patches merge, as in ToMe, so images with fewer than twice `count` merge that half. In
    the blocks that follow, a merged patch gets attention in proportion to its size. Average pooling counts it once, as
    in ToMe's patch for timm. ToMe with r = 8 is `{b: Merge(8) for b in range(1, depth)}`, without the merging within
    the last block, which a class token does not see.

    Raises:
        ValueError: the count is not an integer of at least 1.
    """

    count: int

    def __post_init__(self):
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"the number of patches to merge must be an integer from 1 on, got {self.count!r}")


# Maps the number of a block to what is pruned before it. A number, a Mass or a function is short for a Drop.
Prune = Mapping[int, float | int | Mass | Scores | Drop | Merge]


def kept_count(count: int, fraction: float) -> int:
    """Return how many of `count` patches are left when `fraction` of them stops. It may be 0."""
    return int(count * (1 - fraction))


def keep_highest(
    tokens: PackedTokens,
    importance: Tensor,
    stop: float | Mass | Drop,
    *,
    num_prefix_tokens: int = 0,
    backend: str = "auto",
) -> PackedTokens:
    """Keep the most important patches of each sequence, in their order.

    Args:
        tokens: the sequences, with or without values. Prefix tokens always stay.
        importance: (T,), or (heads, T), whose mean over the heads is the importance.
        stop: a fraction in (0, 1) that stops, so that int(n * (1 - fraction)) of n patches stay, at least one; a `Mass`
            that stays; or a `Drop`, which says how many stay. Of equal patches, the first one stays. The host waits if
            it does not know the counts.
        num_prefix_tokens: how many tokens at the start of each sequence are not patches.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: importance is NaN or, with `Mass`, negative or infinite. On a GPU this is a device-side assertion.
    """
    drop = stop if isinstance(stop, Drop) else Drop(stop)
    if isinstance(drop.amount, Mass):
        how = {"mass": drop.amount.share}
    elif drop.amount is None:
        positive, _ = tokens.pad((importance if importance.ndim == 1 else importance.mean(0)) > 0)  # (B, N)
        how = {"k": [max(1, count) for count in positive[:, num_prefix_tokens:].sum(1).tolist()]}
    elif tokens.is_uniform:
        how = {"k": drop.kept(tokens.max_seqlen - num_prefix_tokens)}
    else:
        how = {"k": [drop.kept(length - num_prefix_tokens) for length in tokens.lengths()]}
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


def check_prune(model: VisionTransformer, prune: Prune) -> dict[int, Drop | Merge]:
    """Check `prune` for a supported model, and write it as a dict. `accelerate` lists the errors."""
    if not isinstance(prune, Mapping):
        raise TypeError(f"prune must map numbers of blocks to what is pruned before them, got {prune!r}")
    checked, last = {}, len(model.blocks) - 1
    for number, value in prune.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= last:
            raise ValueError(f"prune names block {number!r}: patches are pruned before one of blocks 1 to {last}")
        checked[number] = how = _as_drop_or_merge(number, value)
        if isinstance(how, Drop) and not model.has_class_token:
            raise UnsupportedModelError(
                "the model has no class token, whose attention decides which patches are pruned"
            )
        check_prunes(model.blocks[number - 1], number - 1, how)
        if isinstance(how, Merge):
            for place in range(number, last + 1):
                check_takes_sizes(model.blocks[place], place)
    return checked


def check_prunes(block: nn.Module, number: int, how: Drop | Merge) -> None:
    """Raise UnsupportedModelError if block `number` cannot do what is pruned before the next one."""
    kind = _difference(block)
    if kind is not None and isinstance(how, Drop):
        raise UnsupportedModelError(
            f"blocks[{number}] holds a {kind}, whose attention is a difference of two and cannot decide what to "
            f"prune before block {number + 1}"
        )
    if type(block) is Block and type(block.attn) is Attention:
        return
    if isinstance(how, Merge) or how.fuse:
        holds = f" with a {type(block.attn).__name__}" if type(block) is Block else ""
        raise UnsupportedModelError(
            f"blocks[{number}] is a {type(block).__name__}{holds}, but {how!r} before block {number + 1} acts between "
            "the attention and the MLP of a Block with an Attention"
        )


def check_takes_sizes(block: nn.Module, number: int) -> None:
    """Raise UnsupportedModelError if block `number` cannot take the sizes of merged patches into account."""
    kind = _difference(block)
    if kind is not None:
        raise UnsupportedModelError(
            f"blocks[{number}] holds a {kind}, whose attention is a difference of two and cannot take the sizes of "
            "merged patches into account"
        )
    for part in block.modules():
        if getattr(part, "head_dim", 0) + SIZE_CHANNELS > kernels.MAX_HEAD_DIM:
            raise UnsupportedModelError(
                f"blocks[{number}] has a head_dim of {part.head_dim}, but the sizes of merged patches need "
                f"{SIZE_CHANNELS} of the kernels' {kernels.MAX_HEAD_DIM} channels"
            )


def _difference(block: nn.Module) -> str | None:
    """Return the name of a part whose attention is a difference of two, or None if there is none."""
    parts = (DiffParallelScalingBlock, DiffAttention)
    return next((type(part).__name__ for part in block.modules() if isinstance(part, parts)), None)


def _as_drop_or_merge(number: int, value: object) -> Drop | Merge:
    if isinstance(value, (Drop, Merge)):
        return value
    if _is_function(value):
        return Drop(scores=value)
    try:
        return Drop(value)
    except ValueError:
        raise ValueError(
            f"prune before block {number} must be a fraction in (0, 1), a count from 1 on, a Mass, a function of "
            f"scores, a Drop or a Merge, got {value!r}"
        ) from None


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)
