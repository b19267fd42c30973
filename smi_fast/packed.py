"""PackedTokens, the one ragged type: sequences of different lengths laid end to end; and what `keep` means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smi_fast.kernels.rows import cumulative_lengths, padding, sequence_of_tokens, uniform_lengths

INTEGER_DTYPES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class PackedTokens:
    """B sequences laid end to end, without padding.

    The names `cu_seqlens` and `max_seqlen` are FlashAttention's, so that a packed batch can be handed to its kernels.
    The patches that are kept of B images are of this type too, without values; see `pack_keep`.

    Args:
        values: (T, ...) tokens, or None where only their positions are known.
        positions: (T,) int32, the token's index in the patch grid, row-major from 0; a prefix token (class,
            distillation, register) has a negative one.
        cu_seqlens: (B + 1,) int32, cumulative lengths: sequence b is `values[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: length of the longest sequence, known on the host.
    """

    values: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def from_batch(values: Tensor | None, positions: Tensor) -> PackedTokens:
        """Equally long sequences (B, N, ...) at positions (B, N) or (N,), as a packed batch of the same memory.

        Without values, positions are (B, N).
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
        """At least one sequence, of shapes (N_b, ...) at positions (N_b,), laid end to end."""
        lengths = [len(row) for row in positions]
        return PackedTokens(
            values=None if values is None else torch.cat(tuple(values)),
            positions=torch.cat(tuple(positions)).to(torch.int32),
            cu_seqlens=cumulative_lengths(lengths, positions[0].device),
            max_seqlen=max(lengths),
        )

    @property
    def batch_size(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length (decided on the host, from shapes alone)."""
        return len(self.positions) == self.batch_size * self.max_seqlen

    def lengths(self) -> list[int]:
        """The length of each sequence. The host waits for the device where they differ."""
        if self.is_uniform:
            return [self.max_seqlen] * self.batch_size
        return self.cu_seqlens.diff().tolist()

    def batch(self) -> Tensor:
        """The tokens as (B, N, ...), the same memory.

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
        """The tokens as (B, N, ...) where the sequences are equally long, else packed (T, ...): the same memory."""
        return self.batch() if self.is_uniform else self.values

    def sequences(self) -> list[Tensor]:
        """The sequences as a list of B tensors (N_b, ...). The host waits for the device where lengths differ."""
        return list(self.values.split(self.lengths()))

    def indices(self) -> Tensor | list[Tensor]:
        """The positions, int64: (B, N) where the sequences are equally long, else a list of B tensors (N_b,), for which
        the host waits for the device."""
        positions = self.positions.long()
        if self.is_uniform:
            return positions.view(self.batch_size, self.max_seqlen)
        return list(positions.split(self.lengths()))

    def owners(self) -> Tensor:
        """The sequence that each token belongs to, (T,) int64. Nothing waits."""
        return sequence_of_tokens(self.cu_seqlens, len(self.positions))

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same batch on a device."""
        values = None if self.values is None else self.values.to(device)
        return PackedTokens(values, self.positions.to(device), self.cu_seqlens.to(device), self.max_seqlen)

    def groups(self, size: int) -> Iterator[PackedTokens]:
        """The sequences in groups of `size`, of which the last may be smaller. The host waits for the device."""
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
        """Packed (T, ...) of this batch -> (B, max_seqlen, ...) with zeros behind short sequences, and the mask
        (B, max_seqlen) of the places that hold a token."""
        slots, mask = padding(self.cu_seqlens, self.max_seqlen, len(x))
        if len(x) < mask.numel():
            x = x.new_zeros(mask.numel(), *x.shape[1:]).index_copy(0, slots, x)
        return x.unflatten(0, mask.shape), mask

    def unpad(self, x: Tensor) -> Tensor:
        """The packed tokens (T, ...) of what `pad` gave, (B, max_seqlen, ...)."""
        return x.flatten(0, 1)[padding(self.cu_seqlens, self.max_seqlen, len(self.positions))[0]]

    def prepend(self, prefix: Tensor) -> PackedTokens:
        """The batch with the same P prefix tokens (P, C) before each sequence; their positions are -P to -1."""
        count, batch_size = len(prefix), self.batch_size
        if count == 0:
            return self
        positions = torch.arange(-count, 0, dtype=torch.int32, device=prefix.device)
        if self.is_uniform:
            values = self.batch()  # (B, N, C)
            positions = torch.cat((positions.expand(batch_size, -1), self.positions.view(values.shape[:2])), dim=1)
            return PackedTokens.from_batch(torch.cat((prefix.expand(batch_size, -1, -1), values), dim=1), positions)
        rows = self._rows_behind_prefix(count)
        heads = (self.cu_seqlens[:-1, None] + count * torch.arange(batch_size, device=rows.device)[:, None]
                 + torch.arange(count, device=rows.device)).flatten()  # fmt: skip
        total = len(self.values) + batch_size * count
        values = self.values.new_zeros(total, self.values.shape[1])
        values = values.index_copy(0, rows, self.values)
        values = values.index_copy(0, heads, prefix.to(values.dtype).repeat(batch_size, 1))
        all_positions = positions.new_zeros(total).index_copy(0, rows, self.positions)
        all_positions = all_positions.index_copy(0, heads, positions.repeat(batch_size))
        cu_seqlens = self.cu_seqlens + uniform_lengths(batch_size, count, rows.device)
        return PackedTokens(values, all_positions, cu_seqlens, self.max_seqlen + count)

    def _rows_behind_prefix(self, count: int) -> Tensor:
        """Where the T tokens lie once `count` prefix tokens stand before each sequence: (T,) int64."""
        return torch.arange(len(self.positions), device=self.cu_seqlens.device) + count * (self.owners() + 1)


Keep = Tensor | Sequence[Tensor] | PackedTokens


def pack_keep(keep: Keep | None, batch_size: int, num_patches: int, device: torch.device) -> PackedTokens:
    """Check which patches of a batch of images are kept, and lay their indices end to end.

    Args:
        keep: patch indices (B, K) int64 or int32 in [0, num_patches), a boolean mask (B, num_patches), a list of B
            index tensors, or None for all patches. The order given is that of every output aligned to it. What this
            function has returned is taken as it is.
        batch_size: B, the number of images.
        num_patches: patches in the grid, without prefix tokens.
        device: where the images are.

    Returns:
        The kept patches, without values.

    On a GPU shape, dtype and device are checked on the host and values by a device-side assertion, so that nothing
    synchronises; only a mask has to be counted, which costs one synchronisation.

    Raises:
        ValueError: wrong shape, dtype or device; an empty row, an index out of range or named twice. The message names
            the row and the value.
    """
    if isinstance(keep, PackedTokens):
        if keep.batch_size != batch_size:
            raise ValueError(f"keep is for {keep.batch_size} images, the batch has {batch_size}")
        return replace(keep, values=None)
    if keep is None:
        return all_patches(batch_size, num_patches, device)
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
        return PackedTokens.from_batch(None, keep)
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
    if not rows:
        return all_patches(0, num_patches, device)
    return PackedTokens.from_sequences(None, rows)


def all_patches(batch_size: int, num_patches: int, device: torch.device) -> PackedTokens:
    """All patches of each of B images, without values."""
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


def _check_values(keep: Tensor, num_patches: int, first_row: int = 0) -> None:
    """Check that each row of (B, K) names patches of the grid, each once."""
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
