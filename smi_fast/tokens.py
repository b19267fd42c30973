"""PackedTokens: the one data structure, sequences of differing length laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.kernels.rows import padding, sequence_of_tokens


@dataclass(frozen=True)
class PackedTokens:
    """B sequences laid end to end, without padding.

    The names `cu_seqlens` and `max_seqlen` are FlashAttention's, so that a packed batch can be handed to its kernels.

    Args:
        values: (T, C) tokens.
        positions: (T,) int32, the token's index in the patch grid, row-major from 0; a prefix token (class,
            distillation, register) has a negative one.
        cu_seqlens: (B + 1,) int32, cumulative lengths: sequence b is `values[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: length of the longest sequence, known on the host.
    """

    values: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @staticmethod
    def from_batch(values: Tensor, positions: Tensor) -> PackedTokens:
        """Equally long sequences (B, N, C) at positions (B, N) or (N,), as a packed batch of the same memory."""
        batch, length, channels = values.shape
        return PackedTokens(
            values=values.reshape(batch * length, channels),
            positions=positions.to(torch.int32).expand(batch, length).reshape(-1),
            cu_seqlens=uniform_cu_seqlens(batch, length, values.device),
            max_seqlen=length,
        )

    @staticmethod
    def from_sequences(values: list[Tensor], positions: list[Tensor]) -> PackedTokens:
        """Sequences of shapes (N_b, C) at positions (N_b,), laid end to end."""
        lengths = [len(v) for v in values]
        cu_seqlens = torch.tensor([0, *lengths], device=values[0].device).cumsum(0, dtype=torch.int32)
        return PackedTokens(torch.cat(values), torch.cat(positions).to(torch.int32), cu_seqlens, max(lengths))

    @property
    def batch_size(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length (decided on the host, from shapes alone)."""
        return len(self.values) == self.batch_size * self.max_seqlen

    def batch(self) -> Tensor:
        """The tokens as (B, N, C), the same memory.

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
        """The tokens as (B, N, C) where the sequences are equally long, else packed (T, C): the same memory."""
        return self.batch() if self.is_uniform else self.values

    def sequences(self) -> list[Tensor]:
        """The sequences as a list of B tensors (N_b, C); reads their lengths on the host."""
        return list(self.values.split(self.cu_seqlens.diff().tolist()))


def uniform_cu_seqlens(batch: int, length: int, device: torch.device | str) -> Tensor:
    """Cumulative lengths (B + 1,) int32 of `batch` sequences of `length` tokens each."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)[: batch + 1]


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Packed (T, ...) -> (B, max_seqlen, ...), zeros behind short sequences, and the mask (B, max_seqlen) of tokens."""
    slots, mask = padding(cu_seqlens, max_seqlen, len(x))
    if len(x) < mask.numel():
        x = x.new_zeros(mask.numel(), *x.shape[1:]).index_copy(0, slots, x)
    return x.unflatten(0, mask.shape), mask


def unpad(x: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The T packed tokens (T, ...) of what `pad` gave, (B, max_seqlen, ...)."""
    return x.flatten(0, 1)[padding(cu_seqlens, x.shape[1], tokens)[0]]


def prepend(prefix: Tensor, tokens: PackedTokens) -> PackedTokens:
    """Put the same P prefix tokens (P, C) before each sequence; their positions are -P to -1."""
    count, batch_size = len(prefix), tokens.batch_size
    if count == 0:
        return tokens
    positions = torch.arange(-count, 0, dtype=torch.int32, device=prefix.device)
    if tokens.is_uniform:
        values = tokens.batch()  # [B, N, C]
        positions = torch.cat((positions.expand(batch_size, -1), tokens.positions.view(values.shape[:2])), dim=1)
        values = torch.cat((prefix.expand(batch_size, -1, -1), values), dim=1)
        return PackedTokens.from_batch(values, positions)
    rows = rows_behind_prefix(tokens.cu_seqlens, len(tokens.values), count)
    heads = (tokens.cu_seqlens[:-1, None] + count * torch.arange(batch_size, device=rows.device)[:, None]
             + torch.arange(count, device=rows.device)).flatten()  # fmt: skip
    total = len(tokens.values) + batch_size * count
    values = tokens.values.new_zeros(total, tokens.values.shape[1])
    values = values.index_copy(0, rows, tokens.values)
    values = values.index_copy(0, heads, prefix.to(values.dtype).repeat(batch_size, 1))
    all_positions = positions.new_zeros(total).index_copy(0, rows, tokens.positions)
    all_positions = all_positions.index_copy(0, heads, positions.repeat(batch_size))
    starts = torch.arange(batch_size + 1, dtype=torch.int32, device=rows.device) * count
    return PackedTokens(values, all_positions, tokens.cu_seqlens + starts, tokens.max_seqlen + count)


def rows_behind_prefix(cu_seqlens: Tensor, tokens: int, count: int) -> Tensor:
    """Where T packed tokens lie once `count` prefix tokens stand before each sequence: (T,) int64."""
    return torch.arange(tokens, device=cu_seqlens.device) + count * (sequence_of_tokens(cu_seqlens, tokens) + 1)
