"""The choice of the patches that go on when others stop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smi_fast.backbones.pruning import Mass, keep_highest
from smi_fast.packed import INTEGER_DTYPES, Keep, PackedTokens, all_patches
from smi_fast.seeds import batch_seed, seeded_generator

Scores = Callable[[Tensor, PackedTokens], Tensor]
STRATEGIES = ("attention", "random", "lowest")


def check_strategy(select: str | Scores) -> str | Scores:
    """Check that `select` is a strategy that `scores` knows or a function, and return it.

    Raises:
        ValueError: `select` is neither. The message names it.
    """
    if not callable(select) and select not in STRATEGIES:
        raise ValueError(f"select must be one of {', '.join(STRATEGIES)} or a function, got {select!r}")
    return select


def scores(
    select: str | Scores, importance: Tensor, keep: PackedTokens, stop: float | Mass, *, seed: int, iteration: int
) -> Tensor:
    """Return a score for each patch, (T,) float32. The patches with the highest scores go on.

    Args:
        select: "attention" (the patch's importance, as in Sparse Model Inversion, Sec. 4.2), "lowest" (its negative),
            "random", or a function of (importance, keep) that returns the scores.
        importance: (T,) float32, the importance of the kept patches.
        keep: the kept patches.
        stop: the fraction of the patches that stops, or the `Mass` of the scores that goes on.
        seed, iteration: decide the random scores.

    Raises:
        ValueError: the function does not return one finite number per patch, or returns negative numbers for a `Mass`.
    """
    if select == "attention":
        return importance
    if select == "lowest":
        return -importance
    if select == "random":
        generator = seeded_generator(batch_seed(seed, iteration))
        return torch.rand(len(importance), generator=generator).to(importance.device)
    chosen = select(importance, keep)
    if not isinstance(chosen, Tensor) or chosen.shape != importance.shape:
        found = tuple(chosen.shape) if isinstance(chosen, Tensor) else f"a {type(chosen).__name__}"
        raise ValueError(f"select returned {found}, expected a score for each patch, {tuple(importance.shape)}")
    chosen = chosen.detach().float()
    if chosen.isfinite().logical_not().any():
        raise ValueError("select returned scores that are NaN or infinite")
    if isinstance(stop, Mass) and (chosen < 0).any():
        raise ValueError(f"select returned negative scores, which {stop} does not allow")
    return chosen


def select_patches(
    attention: Tensor,
    keep: Keep | None = None,
    *,
    fraction: float | None = None,
    mass: float | None = None,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Select the patches with the highest importance (Sparse Model Inversion, Sec. 4.2).

    Args:
        attention: importance (B, K), aligned to `keep`, or packed (T,) if images keep different numbers, as
            `fast(images, keep=keep, return_attention=True)` returns it.
        keep: the patches that `attention` belongs to: (B, K), a list of B index tensors, or a result of `pack_keep`.
            None: patches 0 to K - 1.
        fraction: stop this fraction, in (0, 1), of an image's K patches: int(K * (1 - fraction)) are kept, at least
            one. Of patches with equal importance, the one that comes first in `keep` is kept first.
        mass: keep the fewest patches whose importance sums to at least this share, in (0, 1], of the image's total.
        backend: "auto", "triton" or "torch".

    Returns:
        The kept patches in the order of `keep`: (B, K') int64 if `attention` is (B, K) and `fraction` is given,
        otherwise a list of B tensors (K_b',) int64.

    Raises:
        ValueError: fraction and mass are both given, both missing or out of range, importance holds NaN, or `keep` does
            not fit `attention`.
    """
    if (fraction is None) == (mass is None):
        raise ValueError(f"give either fraction or mass, got fraction={fraction} and mass={mass}")
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if attention.ndim not in (1, 2):
        raise ValueError(f"attention has shape {tuple(attention.shape)}, expected (B, K) or packed (T,)")
    packed = _packed_keep(attention, keep)
    stop = Mass(mass) if fraction is None else fraction
    kept = keep_highest(packed, attention.flatten(), stop, backend=backend)
    if attention.ndim == 2 and fraction is not None:
        return kept.indices()
    return list(kept.positions.long().split(kept.lengths()))


def _packed_keep(attention: Tensor, keep: Keep | None) -> PackedTokens:
    """Return the patches that `attention` belongs to."""
    if attention.ndim == 1 and (keep is None or isinstance(keep, Tensor)):
        raise ValueError("packed attention (T,) needs keep as a list of index tensors, one an image")
    if keep is None:
        return all_patches(*attention.shape, attention.device)
    for row in () if isinstance(keep, PackedTokens) else [keep] if isinstance(keep, Tensor) else keep:
        if not isinstance(row, Tensor) or row.dtype not in INTEGER_DTYPES:
            found = row.dtype if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(f"keep holds {found}, expected patch indices of torch.int64 or torch.int32")
    if isinstance(keep, Tensor):
        if keep.shape != attention.shape:
            shape = tuple(keep.shape)
            raise ValueError(f"keep is {shape}, expected the shape of attention, {tuple(attention.shape)}")
        return PackedTokens.from_batch(None, keep)
    if not isinstance(keep, PackedTokens):
        lengths = [len(row) for row in keep]
        if 0 in lengths:
            raise ValueError(f"keep names no patch in row {lengths.index(0)}: an image needs at least one")
        keep = PackedTokens.from_sequences(None, keep) if lengths else all_patches(0, 1, attention.device)
    if attention.ndim == 2 and not (keep.is_uniform and (keep.batch_size, keep.max_seqlen) == attention.shape):
        raise ValueError(f"keep lists rows of other lengths than attention, {tuple(attention.shape)}")
    if len(keep.positions) != attention.numel():
        raise ValueError(f"keep lists {len(keep.positions)} patches, attention is of {attention.numel()}")
    return keep
