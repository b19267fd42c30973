"""PackedTokens, the one type for sequences of different lengths, laid end to end, and the meaning of `keep`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smi_fast.kernels.rows import cumulative_lengths, padding, prepend, sequence_of_tokens, uniform_lengths

INTEGER_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class PackedTokens:
    """B sequences laid end to end, without padding.

    The names `cu_seqlens` and `max_seqlen` are FlashAttention's, so that a packed batch can be handed to its kernels.
    The kept patches of B images are also stored in this type, without values; see `pack_keep`.

    Args:
        values: (T, ...) tokens, or None where only their positions are known.
        positions: (T,) int32, the index of each token in the patch grid, row-major from 0. A prefix token (class,
            distillation, register) has a negative index.
        cu_seqlens: (B + 1,) int32, cumulative lengths: sequence b is `values[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: the length of the longest sequence, known on the host.
    """

    values: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def from_batch(values: Tensor | None, positions: Tensor) -> PackedTokens:
        """Pack equally long sequences (B, N, ...) at positions (B, N) or (N,). Contiguous values are not copied.

        Without values, positions must be (B, N).
        """
        batch, length = (positions if values is None else values).shape[:2]
        return PackedTokens(
            values=None if values is None else values.reshape(batch * length, *values.shape[2:]),
            positions=positions.to(torch.int32).expand(batch, length).reshape(-1),
            cu_seqlens=uniform_lengths(batch, length, positions.device),
            max_seqlen=length,
        )

    @staticmethod
    def from_sequences(values: Sequence[Tensor] | None, positions: Sequence[Tensor]) -> PackedTokens:
        """Pack one or more sequences of shapes (N_b, ...) at positions (N_b,)."""
        lengths = [len(row) for row in positions]
        return PackedTokens(
            values=None if values is None else torch.cat(tuple(values)),
            positions=torch.cat(tuple(positions)).to(torch.int32),
            cu_seqlens=cumulative_lengths(lengths, positions[0].device),
            max_seqlen=max(lengths),
        )

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length. The host decides this from shapes, without waiting."""
        return self.positions.shape[0] == self.batch_size * self.max_seqlen

    def lengths(self) -> list[int]:
        """Return the length of each sequence. The host waits for the device if the lengths differ."""
        if self.is_uniform:
            return [self.max_seqlen] * self.batch_size
        return self.cu_seqlens.diff().tolist()

    def batch(self) -> Tensor:
        """Return the tokens as a view (B, N, ...).

        Raises:
            ValueError: the sequences differ in length.
        """
        if not self.is_uniform:
            raise ValueError(
                f"{self.batch_size} sequences of up to {self.max_seqlen} tokens, {len(self.values)} in all, "
                "differ in length and have no (B, N, C) view; use sequences()"
            )
        return self.values.view(self.batch_size, self.max_seqlen, *self.values.shape[1:])

    def batch_or_values(self) -> Tensor:
        """Return a view (B, N, ...) of the tokens if the sequences are equally long, otherwise the packed (T, ...)."""
        return self.batch() if self.is_uniform else self.values

    def sequences(self) -> list[Tensor]:
        """Return a list of B tensors (N_b, ...), one for each sequence. The host waits if the lengths differ."""
        return list(self.values.split(self.lengths()))

    def indices(self) -> Tensor | list[Tensor]:
        """Return the positions as int64: (B, N) if the sequences are equally long, otherwise a list of tensors (N_b,),
        for which the host waits for the device."""
        positions = self.positions.long()
        if self.is_uniform:
            return positions.view(self.batch_size, self.max_seqlen)
        return list(positions.split(self.lengths()))

    def owners(self) -> Tensor:
        """Return the sequence that each token belongs to, (T,) int64, without waiting for the device."""
        return sequence_of_tokens(self.cu_seqlens, self.positions.shape[0])

    def to(self, device: torch.device | str) -> PackedTokens:
        """Return the same batch on a device."""
        values = None if self.values is None else self.values.to(device)
        return PackedTokens(values, self.positions.to(device), self.cu_seqlens.to(device), self.max_seqlen)

    def groups(self, size: int) -> Iterator[PackedTokens]:
        """Yield the sequences in groups of `size`, the last of which may be smaller. The host waits for the device."""
        lengths = self.lengths()
        if len(lengths) <= size:
            yield self
            return
        starts = self.cu_seqlens.tolist()
        for first in range(0, len(lengths), size):
            cu_seqlens = self.cu_seqlens[first : first + size + 1]
            rows = slice(starts[first], starts[first + len(cu_seqlens) - 1])
            values = None if self.values is None else self.values[rows]
            longest = max(lengths[first : first + size])
            yield PackedTokens(values, self.positions[rows], cu_seqlens - starts[first], longest)

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pad packed tokens x (T, ...) to (B, max_seqlen, ...), with zeros behind short sequences. Also return the mask
        (B, max_seqlen) of the places that hold a token."""
        slots, mask = padding(self.cu_seqlens, self.max_seqlen, x.shape[0])
        if x.shape[0] < mask.numel():
            x = x.new_zeros(mask.numel(), *x.shape[1:]).index_copy(0, slots, x)
        return x.unflatten(0, mask.shape), mask

    def unpad(self, x: Tensor) -> Tensor:
        """Undo `pad`: return the packed tokens (T, ...) of x (B, max_seqlen, ...)."""
        return x.flatten(0, 1)[padding(self.cu_seqlens, self.max_seqlen, self.positions.shape[0])[0]]

    def prepend(self, prefix: Tensor) -> PackedTokens:
        """Return the batch with P prefix tokens before each sequence, at positions -P to -1: (P, C), the same for all
        sequences, or (B, P, C)."""
        values, positions, cu_seqlens = prepend(self.values, self.positions, self.cu_seqlens, self.max_seqlen, prefix)
        return PackedTokens(values, positions, cu_seqlens, self.max_seqlen + prefix.shape[-2])


Keep = Tensor | Sequence[Tensor] | PackedTokens


def pack_keep(keep: Keep | None, batch_size: int, num_patches: int, device: torch.device) -> PackedTokens:
    """Check which patches of a batch of images are kept, and lay their indices end to end.

    On a GPU, shape, dtype and device are checked on the host and values by a device-side assertion, so that nothing
    synchronises. Only a mask costs one synchronisation, because its entries have to be counted.

    Args:
        keep: patch indices (B, K) int64 or int32 in [0, num_patches), a boolean mask (B, num_patches), a list of B
            index tensors, or None for all patches. Outputs that are aligned to `keep` have its order. A result of
            this function is a `keep` too.
        batch_size: B, the number of images.
        num_patches: the number of patches in the grid, without prefix tokens.
        device: the device of the images.

    Returns:
        The kept patches, without values.

    Raises:
        ValueError: the shape, dtype or device is wrong, a row is empty, or an index is out of range or named twice.
            The message names the row and the value.
    """
    if isinstance(keep, PackedTokens):
        if keep.batch_size != batch_size:
            raise ValueError(f"keep is for {keep.batch_size} images, the batch has {batch_size}")
        _check_device(keep.positions, device, "keep")
        check_patches(keep, keep.positions, num_patches)
        return replace(keep, values=None)
    if keep is None:
        return all_patches(batch_size, num_patches, device)
    if isinstance(keep, Tensor):
        if keep.ndim != 2 or keep.shape[0] != batch_size:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}, expected ({batch_size}, K) or a list of {batch_size}"
            )
        _check_device(keep, device, "keep")
        if keep.dtype == torch.bool:
            return _pack_mask(keep, num_patches)
        _check_dtype(keep, "keep")
        if keep.shape[1] == 0 and batch_size:
            raise ValueError("keep names no patch in row 0: an image needs at least one")
        packed = PackedTokens.from_batch(None, keep)
        check_patches(packed, keep, num_patches)
        return packed
    if not isinstance(keep, Sequence):
        raise ValueError(f"keep is a {type(keep).__name__}, expected a tensor or a list of tensors")
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
    if not rows:
        return all_patches(0, num_patches, device)
    packed = PackedTokens.from_sequences(None, rows)
    check_patches(packed, torch.cat(rows), num_patches)
    return packed


def all_patches(batch_size: int, num_patches: int, device: torch.device) -> PackedTokens:
    """Return all patches of each of B images, without values."""
    patches = torch.arange(num_patches, dtype=torch.int32, device=device)
    return PackedTokens.from_batch(None, patches.expand(batch_size, -1))


def _pack_mask(mask: Tensor, num_patches: int) -> PackedTokens:
    if mask.shape[1] != num_patches:
        raise ValueError(f"the keep mask has {mask.shape[1]} patches a row, the images have {num_patches}")
    counts = mask.sum(1)
    on_host = counts.tolist()
    if 0 in on_host:
        raise ValueError(f"keep names no patch in row {on_host.index(0)}: an image needs at least one")
    positions = mask.nonzero()[:, 1].to(torch.int32)
    return PackedTokens(None, positions, cumulative_lengths(counts), max(on_host))


def _check_device(tensor: Tensor, device: torch.device, name: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the images are on {device}")


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in INTEGER_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected torch.int64, torch.int32 or a boolean mask")


def check_patches(packed: PackedTokens, patches: Tensor, num_patches: int) -> None:
    """Check that each sequence names patches of the grid, and names no patch twice.

    Args:
        packed: says which sequence each index belongs to.
        patches: (T,) or (B, K), the indices as they were given; int64 ones may not fit into the positions of `packed`.
    """
    outside = patches // num_patches  # not 0 for an index outside of the grid
    if packed.is_uniform:
        ordered = patches.view(packed.batch_size, packed.max_seqlen).sort(1).values
    else:
        ordered = (packed.owners() * num_patches + patches).sort().values
    steps = ordered.diff(dim=-1)
    if patches.is_cuda or torch.compiler.is_compiling():  # a traced graph cannot branch on values
        torch._assert_async(~outside.any(), f"keep holds a patch index outside [0, {num_patches})")
        torch._assert_async(steps.all(), "keep names a patch twice in one row")
        return
    if outside.any():
        first = int(outside.flatten().nonzero()[0])
        row, patch = int(packed.owners()[first]), int(patches.flatten()[first])
        raise ValueError(f"keep row {row} holds patch {patch}, outside [0, {num_patches})")
    if not steps.all():
        *row, column = (steps == 0).nonzero()[0].tolist()
        repeated = int(ordered[(*row, column)])
        row, patch = (*row, repeated) if row else divmod(repeated, num_patches)
        raise ValueError(f"keep row {row} names patch {patch} twice")
