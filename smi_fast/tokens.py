"""PackedTokens: the one data structure, sequences of differing length laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return self.values.view(self.batch_size, self.max_seqlen, -1)

    def sequences(self) -> list[Tensor]:
        """The sequences as a list of B tensors (N_b, C); reads their lengths on the host."""
        return list(self.values.split(self.cu_seqlens.diff().tolist()))


def uniform_cu_seqlens(batch: int, length: int, device: torch.device | str) -> Tensor:
    """Cumulative lengths (B + 1,) int32 of `batch` sequences of `length` tokens each."""
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)[: batch + 1]
