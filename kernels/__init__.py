"""Operations on packed tokens and patches, each defined in plain torch and implemented in Triton.

Nothing here knows of timm, of inversion or of files.
"""

from .attention import MAX_HEAD_DIM, attention
from .backend import resolve_backend, triton_status
from .class_attention import class_attention
from .mlp import bias_gelu
from .norm import residual_norm
from .patches import gather_patches, view_cells
from .pixels import patch_sites, pixel_step
from .selection import select_tokens

__all__ = [
    "MAX_HEAD_DIM",
    "attention",
    "bias_gelu",
    "class_attention",
    "gather_patches",
    "patch_sites",
    "pixel_step",
    "residual_norm",
    "resolve_backend",
    "select_tokens",
    "triton_status",
    "view_cells",
]
