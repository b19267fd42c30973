"""The loss of a transfer from a teacher to a student."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def transfer_loss(student: Tensor, teacher: Tensor, temperature: float = 20.0) -> Tensor:
    """Compute T^2 times the KL divergence of the student's class probabilities from the teacher's, at temperature T.

    The probabilities are softmax(logits / T); the loss is the mean over the batch. Source: Hu et al., 2024, Eq. 6;
    Hinton et al., 2015.

    Args:
        student, teacher: logits (B, classes).
        temperature: the temperature T.

    Returns:
        A scalar.
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
