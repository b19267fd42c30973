"""From tokens to logits: timm's pooling and classifier, for packed sequences too."""

from __future__ import annotations

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from smi_fast.backbones.casting import product
from smi_fast.backbones.plain import plain_block
from smi_fast.backbones.support import block_obstacle, call, changed_method, obstacle_within, obstacle_within_block
from smi_fast.kernels.rows import gather_rows
from smi_fast.packed import PackedTokens


def pooled_tokens(model: VisionTransformer, block: nn.Module) -> int | None:
    """Return how many of the last block's first tokens the head reads, or None if it may read all tokens."""
    if model.global_pool != "token" or changed_method(model, "forward_head", "pool") is not None:
        return None
    if type(block) is not Block or type(block.attn) is not Attention or type(block.attn.qkv) is not nn.Linear:
        return None
    plain = plain_block(block)
    if (plain is None or plain.drops()) and (obstacle_within_block(block) or block_obstacle(block)):
        return None
    if obstacle_within(model.norm):
        return None
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def head(model: VisionTransformer, x: Tensor, tokens: PackedTokens) -> Tensor:
    """timm's pooling and classifier. Modifications: packed sequences (T, C) are pooled here, and the product is ours.

    Args:
        model: a timm model.
        x: the normalised tokens, (B, N, C) or packed (T, C). If they are (B, N, C), N may be as few as the head reads.
        tokens: where packed tokens lie.

    Raises:
        ValueError: the head needs sequences of equal length, and they are not.
    """
    changed = changed_method(model, "forward_head", "pool") is not None
    if model.global_pool == "token" and not changed and not isinstance(model, VisionTransformerDistilled):
        if x.ndim == 2:
            first = gather_rows(x, tokens.cu_seqlens[:-1].long())
        else:
            first = x.squeeze(1) if x.shape[1] == 1 else x[:, 0]
        return product(model.head, call(model.head_drop, call(model.fc_norm, first)))
    if x.ndim == 3:
        return model.forward_head(x)
    if model.global_pool == "token":
        first = tokens.cu_seqlens[:-1, None] + torch.arange(model.num_prefix_tokens, device=x.device)
        return model.forward_head(x[first])
    padded, mask = tokens.pad(x)
    if not model.pool_include_prefix:
        padded, mask = padded[:, model.num_prefix_tokens :], mask[:, model.num_prefix_tokens :]
    if model.global_pool == "map":
        pooled = model.attn_pool(padded, attn_mask=mask[:, None, None])
    elif model.global_pool in ("avg", "max", "avgmax"):
        mean = padded.sum(1) / mask.sum(1, keepdim=True)
        largest = padded.masked_fill(~mask[..., None], float("-inf")).amax(1)
        pooled = {"avg": mean, "max": largest, "avgmax": 0.5 * (largest + mean)}[model.global_pool]
    else:
        raise ValueError(f"global_pool {model.global_pool!r} needs images that all keep the same number of patches")
    return product(model.head, model.head_drop(model.fc_norm(pooled)))
