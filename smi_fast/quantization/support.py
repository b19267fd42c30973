"""check_supported(): whether a model can be quantised, and if not, which part prevents it."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent, GluMlp, Mlp, PatchEmbed, SimpleNorm, SwiGLU
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

from smi_fast.backbones import support
from smi_fast.backbones.readouts import ClassAndMean, CosineLogits
from smi_fast.backbones.stream import PATHS, SCALES
from smi_fast.backbones.support import (
    ACTIVATIONS,
    BRANCH,
    DROPS,
    LINEAR,
    MODEL_METHODS,
    MODELS,
    PATCH_DROPS,
    SEQUENTIAL,
    TIMM_ATTENTIONS,
    TIMM_BLOCKS,
    UnsupportedModelError,
    changed_method,
    check_bypassed,
    embedding_obstacle,
    obstacle,
)
from smi_fast.backbones.vit import AcceleratedViT

BITS = range(2, 9)
MAX_HEAD_DIM = 256  # 255^2 * 256 < 2^24, so that a score of 8-bit queries and keys is exact in float32
NORMS = tuple(kind for kind in support.NORMS if kind is not SimpleNorm)
POOLS = ("token", "avg")  # of an attention pooling
HEADS = (*LINEAR, *ACTIVATIONS, *DROPS, CosineLogits)
ROLES: dict[str, tuple[type, ...]] = {  # the last part of a module's name -> what `translation.py` takes there
    **dict.fromkeys(("", "model"), MODELS),
    **dict.fromkeys(("blocks", "attns", "ffns"), (nn.Sequential, nn.ModuleList)),
    **dict.fromkeys(("qkv", "kv", "fc1", "fc2", "fc1_g", "fc1_x", "in_proj", "out_proj", "head_dist"), LINEAR),
    **dict.fromkeys(("attn_out_proj", "mlp_out_proj"), LINEAR),
    "q": (*LINEAR, nn.Identity),
    "head": (*HEADS, nn.Sequential),
    **dict.fromkeys(
        ("norm", "norm1", "norm2", "in_norm", "norm_pre", "fc_norm", "q_norm", "k_norm", "sub_norm"), NORMS
    ),
    **dict.fromkeys(("act", "mlp_act"), ACTIVATIONS),
    **dict.fromkeys(("ls", "ls1", "ls2"), SCALES),
    **dict.fromkeys(("drop_path", "drop_path1", "drop_path2"), PATHS),
    **dict.fromkeys(("drop1", "drop2", "attn_drop", "proj_drop", "mlp_drop", "pos_drop", "head_drop"), DROPS),
    "patch_embed": (PatchEmbed,),
    "patch_drop": PATCH_DROPS,
    "proj": (*LINEAR, nn.Conv2d),
    "attn": TIMM_ATTENTIONS,
    "mlp": (Mlp, GluMlp, SwiGLU),
    "attn_pool": (AttentionPoolLatent, ClassAndMean),
}

NUMBERED = {"blocks": TIMM_BLOCKS, "head": HEADS}  # the modules of a list; others are branches


def check_bits(**bits: int) -> None:
    """Check widths of integers, which are given by the names of their arguments.

    Raises:
        ValueError: a width is out of range. The message names it.
    """
    for name, width in bits.items():
        if isinstance(width, bool) or not isinstance(width, int) or width not in BITS:
            raise ValueError(f"{name} must be an integer from {BITS[0]} to {BITS[-1]}, got {width!r}")


def check_supported(model: nn.Module) -> None:
    """Check that a model can be quantised.

    Raises:
        UnsupportedModelError: the scheme does not cover some part of the model. The message names it.
    """
    if type(model) not in MODELS:
        hint = ": pass its .model" if isinstance(model, AcceleratedViT) else ""
        raise UnsupportedModelError(f"the model is a {type(model).__name__}, which cannot be quantised{hint}")
    check_bypassed(model)
    reason = changed_method(model, *MODEL_METHODS)
    if reason is not None:
        raise UnsupportedModelError(f"the model{reason}, and a quantised model would not run it")
    for name, module in model.named_modules():
        path, _, role = name.rpartition(".")
        kinds = NUMBERED.get(path, SEQUENTIAL) if role.isdecimal() else ROLES.get(role, ())
        reason = obstacle(module, kinds) or _setting(module)
        if reason is not None:
            raise UnsupportedModelError(f"{name or 'the model'}{reason}, which cannot be quantised")
    if len(model.blocks) == 0:
        raise UnsupportedModelError("the model has no blocks")
    reason = embedding_obstacle(model)
    if reason is not None:
        raise UnsupportedModelError(f"{reason}, which cannot be quantised")


def _setting(module: nn.Module) -> str | None:
    """Say which setting of a plain module is not covered, as the end of a sentence; None if all are."""
    head_dim = getattr(module, "head_dim", None) or 0
    if head_dim > MAX_HEAD_DIM:
        return f" has a head_dim of {head_dim}, more than {MAX_HEAD_DIM}"
    if getattr(module, "gate", None) is not None:
        return " has a gate"
    if isinstance(module, NORMS) and not isinstance(module, nn.Identity) and module.weight is None:
        return " has no weight"
    if isinstance(module, PatchEmbed) and (module.img_size is None or module.dynamic_img_pad):
        return " has no img_size" if module.img_size is None else " pads images (dynamic_img_pad)"
    if hasattr(module, "head_dist") and type(module.head) is not nn.Linear:
        return " has a distillation token and a head that is not a Linear"
    if isinstance(module, AttentionPoolLatent):
        if module.pos_embed is not None or module.mlp is None or module.pool not in POOLS:
            return f" has a pos_embed, no mlp, or pools {module.pool!r}"
        return None
    if isinstance(module, ParallelThingsBlock):
        for names, branches in ((BRANCH, module.attns), (("norm", "mlp", *BRANCH[2:]), module.ffns)):
            if any(tuple(branch._modules) != names for branch in branches):
                return f" has a branch that is not {', '.join(names)}"
    return None
