"""The transfer of knowledge from a teacher to a student, on inverted images."""

from smi_fast.distillation.losses import transfer_loss
from smi_fast.distillation.pool import Reader
from smi_fast.distillation.rounds import DistillationResult, distill, settings_of
from smi_fast.distillation.training import Round

__all__ = ["DistillationResult", "Reader", "Round", "distill", "settings_of", "transfer_loss"]
