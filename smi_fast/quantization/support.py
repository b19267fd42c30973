"""check_supported(): whether a model can be quantised, and if not, which part prevents it."""

from __future__ import annotations

from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from smi_fast.backbones.support import (
    MODEL_METHODS,
    PLAIN,
    UnsupportedModelError,
    changed_method,
    check_bypassed,
    obstacle,
)

BITS = range(2, 9)
MAX_HEAD_DIM = 256  # 255^2 * 256 < 2^24, so that a score of 8-bit queries and keys is exact in float32


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

    def require(part: str, found: object, *known: type) -> None:
        if type(found) not in known:
            names = " or ".join(kind.__name__ for kind in known)
            raise UnsupportedModelError(f"{part} is a {type(found).__name__}, and only {names} can be quantised")

    require("the model", model, VisionTransformer)
    require("patch_embed", model.patch_embed, PatchEmbed)
    require("patch_embed.proj", model.patch_embed.proj, nn.Conv2d)
    for part in ("patch_embed.norm", "norm_pre", "fc_norm"):
        require(part, model.get_submodule(part), nn.Identity)
    for part in ("reg_token", "attn_pool"):
        require(part, getattr(model, part), type(None))
    for part in ("cls_token", "pos_embed"):
        require(part, getattr(model, part), nn.Parameter)
    if model.no_embed_class or model.global_pool != "token":
        raise UnsupportedModelError(
            f"only a model whose class token has a position and is pooled can be quantised, not one of "
            f"no_embed_class={model.no_embed_class} and global_pool={model.global_pool!r}"
        )
    for number, block in enumerate(model.blocks):
        name = f"blocks[{number}]"
        require(name, block, Block)
        require(f"{name}.attn", block.attn, Attention)
        require(f"{name}.attn.gate", block.attn.gate, type(None))
        require(f"{name}.mlp", block.mlp, Mlp)
        require(f"{name}.mlp.act", block.mlp.act, nn.GELU)
        if block.mlp.act.approximate != "none":
            raise UnsupportedModelError(f"{name}.mlp.act approximates GELU by {block.mlp.act.approximate!r}")
        if block.attn.head_dim > MAX_HEAD_DIM:
            raise UnsupportedModelError(f"{name} has a head_dim of {block.attn.head_dim}, more than {MAX_HEAD_DIM}")
        for part in ("ls1", "ls2"):
            require(f"{name}.{part}", block.get_submodule(part), nn.Identity, LayerScale)
        for part in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm"):
            require(f"{name}.{part}", block.get_submodule(part), nn.Identity)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            require(f"{name}.{part}", block.get_submodule(part), nn.Linear)
    if len(model.blocks) == 0:
        raise UnsupportedModelError("the model has no blocks")
    require("head", model.head, nn.Linear)
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    if not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None and norm.eps == norms[0].eps for norm in norms):
        raise UnsupportedModelError("only LayerNorms with weight and bias, all of the same eps, can be quantised")
    check_bypassed(model)
    reason = changed_method(model, *MODEL_METHODS)
    if reason is not None:
        raise UnsupportedModelError(f"the model{reason}, and a quantised model would not run it")
    for name, module in model.named_modules():
        reason = obstacle(module, PLAIN)
        if reason is not None:
            raise UnsupportedModelError(
                f"{name or 'the model'}{reason}, and only the weights of plain modules can be quantised"
            )
