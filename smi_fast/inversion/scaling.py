"""Loss scaling for float16, whose small gradients would vanish."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, INTERVAL = 2.0**16, 2000  # those of torch.amp.GradScaler
SMALLEST, LARGEST = 2.0**-64, 2.0**24


class LossScale:
    """The factor that a loss is multiplied by before its backward pass, adjusted as `torch.amp.GradScaler` does.

    It is halved when a gradient overflows and doubled after 2000 iterations without. Unlike GradScaler's, a gradient
    that overflows counts as zero, and the step is taken: so neither the host nor the optimiser has to be asked, and an
    iteration can be captured in a CUDA graph.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), INITIAL, device=device)
        self._finite_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(self, grad: Tensor) -> Tensor:
        """The gradient of the loss itself, in float32, out of that of the scaled loss; adjusts the scale."""
        finite = grad.isfinite().all()
        grad = torch.where(finite, grad.float() / self.value, 0.0)
        self._finite_in_a_row.add_(1).mul_(finite)
        grows = self._finite_in_a_row == INTERVAL
        self._finite_in_a_row.mul_(~grows)
        self.value.mul_(torch.where(finite, 1.0 + grows, 0.5)).clamp_(SMALLEST, LARGEST)
        return grad
