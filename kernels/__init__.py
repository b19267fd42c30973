"""Operations on packed tokens and patches, each defined in plain torch and implemented in Triton.

Nothing here knows of timm, of inversion or of files.
"""

# In a checkout this folder is also found as `kernels`, the name of Hugging Face's package, which transformers imports
# if it finds it. A second copy of the modules would register the operators again, and free those of the first.
if __name__ == "smi_fast.kernels":
    from .attention import MAX_HEAD_DIM, attention
    from .backend import resolve_backend, triton_status
    from .class_attention import class_attention
    from .cpu import cpu_status
    from .cross_entropy import cross_entropy
    from .embedding import embed_tokens
    from .mlp import bias_gelu
    from .norm import residual_norm, residual_norm_of_first
    from .patch_entropy import patch_entropy
    from .patches import gather_patches, view_cells
    from .pixels import patch_sites, pixel_step
    from .selection import select_tokens
else:
    __path__ = []

__all__ = [
    "MAX_HEAD_DIM",
    "attention",
    "bias_gelu",
    "class_attention",
    "cpu_status",
    "cross_entropy",
    "embed_tokens",
    "gather_patches",
    "patch_entropy",
    "patch_sites",
    "pixel_step",
    "residual_norm",
    "residual_norm_of_first",
    "resolve_backend",
    "select_tokens",
    "triton_status",
    "view_cells",
]
