"""What the kernels' tests share: packed batches, the attention that everything is measured against, and the 2x rule."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def naive_attention(qkv: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Attention sequence by sequence from its formula, in the dtype of qkv: out (T, H, D), and the class row (T,)."""
    outs, rows = [], []
    for sequence in qkv.split(lengths):
        q, k, v = sequence.permute(1, 2, 0, 3)  # (H, N, D) each
        p = (q @ k.mT * scale).softmax(-1)  # (H, N, N)
        outs.append((p @ v).transpose(0, 1))
        rows.append(p[:, :1].float().mean((0, 1)) if p.dtype != torch.float64 else p[:, :1].mean((0, 1)))
    return torch.cat(outs), torch.cat(rows)


def assert_within_twice(kernel: dict, plain: list[dict], exact: dict) -> None:
    """Each of the kernel's results errs at most twice as far from the float64 result as plain torch does.

    `plain` are several ways to write the same in plain torch, none of them the true one: the largest error counts.
    """
    for name, reference in exact.items():
        error, *errors = ((x[name].double() - reference).abs().max().item() for x in (kernel, *plain))
        assert kernel[name].isfinite().all(), f"{name} is not finite"
        assert error <= 2 * max(errors) + 1e-6, f"{name} errs by {error:.3g}, plain torch by {errors}"


@contextmanager
def poisoned_memory():
    """Fresh memory holds NaN (integers: the largest), so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
