"""What `keep` means: patch indices, a mask, or a list, checked once and packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smi_fast.tokens import uniform_cu_seqlens

INTEGER_DTYPES = (torch.int64, torch.int32)


class PackedKeep(NamedTuple):
    """Kept patches of B images laid end to end; made by `pack_keep`, and taken as it is wherever a `keep` is.

    `positions` (T,) int32 in the patch grid, `cu_seqlens` (B + 1,) int32, `max_seqlen` on the host.
    """

    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def batch_size(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def is_uniform(self) -> bool:
        return len(self.positions) == self.batch_size * self.max_seqlen

    def indices(self) -> Tensor:
        """The patches as (B, K) int64; only where all images keep the same number."""
        return self.positions.view(self.batch_size, self.max_seqlen).long()


Keep = Tensor | Sequence[Tensor] | PackedKeep


def pack_keep(keep: Keep | None, batch_size: int, num_patches: int, device: torch.device) -> PackedKeep:
    """Check `keep` and lay it end to end.

    Args:
        keep: patch indices (B, K) int64 or int32 in [0, num_patches), a boolean mask (B, num_patches), a list of B
            index tensors, or None for all patches. The order given is that of every output aligned to it.
        batch_size: B, the number of images.
        num_patches: patches in the grid, without prefix tokens.
        device: where the images are.

    On a GPU shape, dtype and device are checked on the host and values by a device-side assertion, so that nothing
    synchronises; only a mask has to be counted, which costs one synchronisation.

    Raises:
        ValueError: wrong shape, dtype or device; an empty row, an index out of range or named twice. The message names
            the row and the value.
    """
    if isinstance(keep, PackedKeep):
        if keep.batch_size != batch_size:
            raise ValueError(f"keep is for {keep.batch_size} images, the batch has {batch_size}")
        return keep
    if keep is None:
        return uniform_keep(torch.arange(num_patches, dtype=torch.int32, device=device).expand(batch_size, -1))
    if isinstance(keep, Tensor):
        if keep.ndim != 2 or len(keep) != batch_size:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}, expected ({batch_size}, K) or a list of {batch_size}"
            )
        _check_device(keep, device, "keep")
        if keep.dtype == torch.bool:
            return _pack_mask(keep, num_patches)
        _check_dtype(keep, "keep")
        if keep.shape[1] == 0 and batch_size:
            raise ValueError("keep names no patch in row 0: an image needs at least one")
        _check_values(keep, num_patches)
        return uniform_keep(keep)
    rows = list(keep)
    if len(rows) != batch_size:
        raise ValueError(f"keep lists {len(rows)} images, the batch has {batch_size}")
    for number, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.ndim != 1:
            shape = tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(f"keep row {number} is {shape}, expected a tensor of shape (K,)")
        _check_device(row, device, f"keep row {number}")
        _check_dtype(row, f"keep row {number}")
        if len(row) == 0:
            raise ValueError(f"keep names no patch in row {number}: an image needs at least one")
        _check_values(row[None], num_patches, first_row=number)
    cu_seqlens = torch.tensor([0] + [len(row) for row in rows], device=device).cumsum(0, dtype=torch.int32)
    return PackedKeep(torch.cat(rows).to(torch.int32), cu_seqlens, max(len(row) for row in rows))


def uniform_keep(indices: Tensor) -> PackedKeep:
    """Patch indices (B, K) that are known to be right, packed without a check."""
    batch_size, count = indices.shape
    cu_seqlens = uniform_cu_seqlens(batch_size, count, indices.device)
    return PackedKeep(indices.reshape(-1).to(torch.int32), cu_seqlens, count)


def _pack_mask(mask: Tensor, num_patches: int) -> PackedKeep:
    if mask.shape[1] != num_patches:
        raise ValueError(f"the keep mask has {mask.shape[1]} patches a row, the images have {num_patches}")
    counts = mask.sum(1)
    on_host = counts.tolist()
    if 0 in on_host:
        raise ValueError(f"keep names no patch in row {on_host.index(0)}: an image needs at least one")
    positions = mask.nonzero()[:, 1].to(torch.int32)
    cu_seqlens = torch.cat((counts.new_zeros(1), counts)).cumsum(0, dtype=torch.int32)
    return PackedKeep(positions, cu_seqlens, max(on_host))


def _check_device(tensor: Tensor, device: torch.device, name: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the images are on {device}")


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in INTEGER_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.int64, torch.int32 or a boolean mask")


def _check_values(keep: Tensor, num_patches: int, first_row: int = 0) -> None:
    """Each row (B, K) names patches of the grid, each once."""
    outside = (keep < 0) | (keep >= num_patches)
    ordered = keep.sort(dim=1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if keep.is_cuda or torch.compiler.is_compiling():  # a traced graph cannot branch on values
        torch._assert_async(~outside.any(), f"keep holds a patch index outside [0, {num_patches})")
        torch._assert_async(~repeated.any(), "keep names a patch twice in one row")
        return
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(f"keep row {first_row + row} holds patch {int(keep[row, column])}, outside [0, {num_patches})")
    if repeated.any():
        row, column = repeated.nonzero()[0].tolist()
        raise ValueError(f"keep row {first_row + row} names patch {int(ordered[row, column])} twice")
