"""Loss scaling for float16, whose small gradients would vanish."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

INITIAL, INTERVAL = 2.0**16, 2000  # the values of torch.amp.GradScaler
SMALLEST, LARGEST = 2.0**-64, 2.0**24


class LossScale:
    """The factor that a loss is multiplied by before its backward pass, adjusted as `torch.amp.GradScaler` does.

    It is halved when a gradient overflows and doubled after 2000 iterations without an overflow. Unlike GradScaler, it
    replaces a gradient that overflows by zero and takes the step all the same. The host then has nothing to decide, so
    an iteration can be captured in a CUDA graph.
    """

    def __init__(self, device: torch.device):
        self.value = torch.full((), INITIAL, device=device)
        self._finite_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(self, *grads: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of the loss itself, in float32, from those of the scaled loss, and adjust the scale."""
        finite = torch.stack([grad.isfinite().all() for grad in grads if grad is not None]).all()
        grads = [None if grad is None else torch.where(finite, grad.float() / self.value, 0.0) for grad in grads]
        self._finite_in_a_row.add_(1).mul_(finite)
        grows = self._finite_in_a_row == INTERVAL
        self._finite_in_a_row.mul_(~grows)
        self.value.mul_(torch.where(finite, 1.0 + grows, 0.5)).clamp_(SMALLEST, LARGEST)
        return grads

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the scale and of the number of iterations since it last changed."""
        return {"value": self.value.clone(), "finite_in_a_row": self._finite_in_a_row.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned."""
        self.value.copy_(state["value"])
        self._finite_in_a_row.copy_(state["finite_in_a_row"])
