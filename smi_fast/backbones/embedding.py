"""From pixels to tokens: timm's patch embedding, position embedding and prefix tokens, for the kept patches alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.backbones.casting import weights
from smi_fast.backbones.support import UnsupportedModelError, call
from smi_fast.kernels import embed_tokens
from smi_fast.kernels.linear import linear
from smi_fast.kernels.rows import gather_rows
from smi_fast.packed import PackedTokens


def embed(
    model: VisionTransformer, patches: PackedTokens, grid_size: tuple[int, int], whole: Tensor | None
) -> PackedTokens:
    """Embed kept patches: from the whole images (B, C, H, W) if they are given, because a part of the embedding is
    changed, and otherwise alone."""
    return embed_patches(model, patches, grid_size) if whole is None else embed_images(model, whole, patches)


def embed_patches(model: VisionTransformer, patches: PackedTokens, grid_size: tuple[int, int]) -> PackedTokens:
    """Embed kept patches, whose values are (T, C * ph * pw) pixels, if no part of the embedding is changed.

    Modifications: only kept patches are embedded, by a matrix product instead of a convolution.
    """
    embed = model.patch_embed
    weight, bias = weights(embed.proj)
    weight = weight.flatten(1)
    if patches.values.shape[1] != weight.shape[1]:
        raise ValueError(f"patches have {patches.values.shape[1]} values each, the model's have {weight.shape[1]}")
    embedded = call(embed.norm, linear(patches.values.to(weight.dtype), weight, bias))
    prefix, pos_embed = _prefix_tokens(model, embedded), model.pos_embed
    if pos_embed is not None and grid_size != tuple(embed.grid_size):
        count = 0 if model.no_embed_class else model.num_prefix_tokens
        pos_embed = resample_abs_pos_embed(pos_embed, grid_size, embed.grid_size, num_prefix_tokens=count)
    tokens, positions, cu_seqlens = embed_tokens(
        embedded,
        patches.positions,
        patches.cu_seqlens,
        patches.max_seqlen,
        prefix,
        None if pos_embed is None else pos_embed[0],
        embeds_prefix=not model.no_embed_class,
        backend=model.backend,
    )
    if pos_embed is not None:
        tokens = call(model.pos_drop, tokens)
    return PackedTokens(tokens, positions, cu_seqlens, patches.max_seqlen + model.num_prefix_tokens)


def _prefix_tokens(model: VisionTransformer, embedded: Tensor) -> Tensor:
    """Return the class, distillation and register tokens, (count, C)."""
    prefix = (model.cls_token, getattr(model, "dist_token", None), model.reg_token)  # (1, count, C) each, or None
    prefix = [tokens[0] for tokens in prefix if tokens is not None] or [embedded.new_empty(0, embedded.shape[1])]
    return prefix[0] if len(prefix) == 1 else torch.cat(prefix)


def embed_images(model: VisionTransformer, images: Tensor, kept: PackedTokens) -> PackedTokens:
    """Embed whole images (B, C, H, W) by timm's own modules, which may be changed, and gather the kept patches.

    Raises:
        UnsupportedModelError: the embedding does not give one token per patch behind the prefix tokens.
    """
    x = model.patch_drop(model._pos_embed(model.patch_embed(images)))  # [B, prefix + N, C]
    count, grid = model.num_prefix_tokens, model.patch_embed.dynamic_feat_size(images.shape[-2:])
    num_patches = grid[0] * grid[1]
    if x.ndim != 3 or x.shape[1] != count + num_patches:
        raise UnsupportedModelError(
            f"the changed embedding gives tokens {tuple(x.shape)}, not {count} prefix tokens and {num_patches} patches"
        )
    rows = kept.owners() * num_patches + kept.positions
    return replace(kept, values=gather_rows(x[:, count:].flatten(0, 1), rows)).prepend(x[:, :count])
