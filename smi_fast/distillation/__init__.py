"""The transfer of knowledge from a teacher to a student, on inverted images."""

from smi_fast.distillation.losses import transfer_loss
from smi_fast.distillation.pool import Reader
from smi_fast.distillation.rounds import DistillationResult, Round, distill

__all__ = ["DistillationResult", "Reader", "Round", "distill", "transfer_loss"]
