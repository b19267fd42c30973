"""timm's blocks on packed tokens. Each function that stands in for a timm forward says what it changes
("Modifications:").

Tokens are (B, N, C) where all sequences are equally long, else packed (T, C).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import Attention, DiffAttention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn

from smi_fast.backbones.importance import Attend, softmax_scale
from smi_fast.backbones.support import LINEAR, MLP, UnsupportedModelError, block_obstacle, obstacle
from smi_fast.kernels.linear import PackedWeight, linear


def _attention(attn: Attention, x: Tensor, attend: Attend) -> Tensor:
    """timm's Attention. Modifications: x may be packed (T, C); the kernel reads queries, keys and values where the qkv
    projection wrote them."""
    qkv = _linear(attn.qkv, x).view(-1, 3, attn.num_heads, attn.head_dim)
    out = attend(_normalise_qk(attn, qkv), softmax_scale(attn))
    out = attn.norm(out.view(*x.shape[:-1], attn.attn_dim))
    if attn.gate is not None:
        out = out * _linear(attn.gate, x).sigmoid()
    return attn.proj_drop(_linear(attn.proj, out))


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """timm's Linear. Modifications: the product is ours. A module that is not a plain Linear is called as it is."""
    return linear(x, *weights(module)) if obstacle(module, LINEAR) is None else module(x)


def weights(module: nn.Module) -> tuple[Tensor | PackedWeight, Tensor | None]:
    """Weight and bias, or the copies of them that were cast within `AcceleratedViT.cast_weights`."""
    return getattr(module, "_cast_weights", None) or (module.weight, module.bias)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """timm's Mlp. Modifications: the products are ours. A module that is not a plain Mlp is called as it is."""
    if obstacle(mlp, MLP) is not None:
        return mlp(x)
    x = mlp.drop1(mlp.act(_linear(mlp.fc1, x)))
    return mlp.drop2(_linear(mlp.fc2, mlp.norm(x)))


def _normalise_qk(attn: nn.Module, qkv: Tensor) -> Tensor:
    """Normalise the queries and keys of (T, 3, H, D) where the model does so."""
    if isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity):
        return qkv
    q, k, v = qkv.unbind(1)
    return torch.stack((attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v), dim=1)


def _diff_attention(attn: DiffAttention, x: Tensor, attend: Attend) -> Tensor:
    """timm's DiffAttention. Modifications: those of `_differential`."""
    q, k, v = _linear(attn.qkv, x).flatten(0, -2).chunk(3, dim=-1)
    out = attn.norm(_differential(attn, q, k, v, attend).view_as(x))
    return attn.proj_drop(_linear(attn.proj, out))


def _differential(
    attn: DiffAttention | DiffParallelScalingBlock, q: Tensor, k: Tensor, v: Tensor, attend: Attend
) -> Tensor:
    """Differential attention (Ye et al., 2024, Eq. 1) of queries, keys and values (T, C) -> (T, C).

    Modifications: values are twice as wide as queries. Both halves of the values become heads of their own, so that one
    call of the attention kernel computes both softmaxes.
    """
    heads, head_dim = attn.num_heads, attn.head_dim
    q1, q2 = attn.q_norm(q.view(-1, heads, 2, head_dim)).to(v.dtype).unbind(2)  # [T, H, D] each
    k1, k2 = attn.k_norm(k.view(-1, heads, 2, head_dim)).to(v.dtype).unbind(2)
    va, vb = v.view(-1, heads, 2, head_dim).unbind(2)
    qkv = torch.stack(
        (torch.cat((q1, q1, q2, q2), 1), torch.cat((k1, k1, k2, k2), 1), torch.cat((va, vb) * 2, 1)), dim=1
    )
    first_a, first_b, second_a, second_b = attend.attention(qkv, softmax_scale(attn)).chunk(4, dim=1)
    weight = attn._compute_lambda().type_as(q)
    out = torch.cat((first_a, first_b), -1) - weight * torch.cat((second_a, second_b), -1)  # [T, H, 2 D]
    if attend.measures:
        received = attend.received(q1, k1, softmax_scale(attn)) - weight.detach().float() * attend.received(
            q2, k2, softmax_scale(attn)
        )
        attend.measured.append(received[None])
    return (attn.sub_norm(out) * (1 - attn.lambda_init)).flatten(1)


def any_block(block: nn.Module, number: int, x: Tensor, attend: Attend) -> Tensor:
    """Run block `number`: our way if what we bypass in it is plain, else by its own forward, whose attention cannot be
    measured.

    Raises:
        UnsupportedModelError: such a block has to measure.
    """
    reason = block_obstacle(block)
    if reason is None:
        return BLOCKS[type(block)](block, x, attend)
    if attend.measures:
        raise UnsupportedModelError(f"blocks[{number}]{reason}, so the attention within it cannot be measured")
    return block(x)


def _block(block: Block, x: Tensor, attend: Attend) -> Tensor:
    """timm's Block. Modifications: attention is ours."""
    x = x + block.drop_path1(block.ls1(ATTENTIONS[type(block.attn)](block.attn, block.norm1(x), attend)))
    return x + block.drop_path2(block.ls2(_mlp(block.mlp, block.norm2(x))))


def block_of_first_tokens(block: Block, x: Tensor, count: int, attend: Attend) -> Tensor:
    """timm's Block where only the first `count` tokens of its output are used: (B, N, C) or (T, C) -> (B, count, C).

    Modifications: only keys and values are computed for all tokens.
    """
    attn, normed = block.attn, block.norm1(x)
    first = attend.first(normed, count)  # [B, count, C]
    weight, bias = weights(attn.qkv)
    width = attn.attn_dim
    q = linear(first, weight[:width], None if bias is None else bias[:width])
    kv = linear(normed, weight[width:], None if bias is None else bias[width:])
    q = attn.q_norm(q.unflatten(-1, (attn.num_heads, attn.head_dim)))  # [B, count, H, D]
    kv = kv.flatten(0, -2).unflatten(-1, (2, attn.num_heads, attn.head_dim))  # [T, 2, H, D]
    if not isinstance(attn.k_norm, nn.Identity):
        k, v = kv.unbind(1)
        kv = torch.stack((attn.k_norm(k).to(v.dtype), v), 1)
    out = attn.norm(attend.of_first(q.to(kv.dtype), kv, softmax_scale(attn)).flatten(2))
    if attn.gate is not None:
        out = out * _linear(attn.gate, first).sigmoid()
    x = attend.first(x, count) + block.drop_path1(block.ls1(attn.proj_drop(_linear(attn.proj, out))))
    return x + block.drop_path2(block.ls2(_mlp(block.mlp, block.norm2(x))))


def _res_post_block(block: ResPostBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ResPostBlock. Modifications: attention is ours."""
    x = x + block.drop_path1(block.norm1(ATTENTIONS[type(block.attn)](block.attn, x, attend)))
    return x + block.drop_path2(block.norm2(_mlp(block.mlp, x)))


def _parallel_scaling_block(block: ParallelScalingBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ParallelScalingBlock. Modifications: attention reads q, k and v where the joint projection left them."""
    mlp, qkv = _linear(block.in_proj, block.in_norm(x)).split((block.in_split[0], sum(block.in_split[1:])), dim=-1)
    qkv = qkv.flatten(0, -2).unflatten(-1, (3, block.num_heads, block.head_dim))
    out = attend(_normalise_qk(block, qkv), softmax_scale(block)).view_as(x)
    mlp = block.mlp_drop(block.mlp_act(mlp if block.mlp_bias is None else mlp + block.mlp_bias))
    if block.out_proj is not None:
        out = _linear(block.out_proj, torch.cat((out, mlp), dim=-1))
    else:
        out = _linear(block.attn_out_proj, out) + _linear(block.mlp_out_proj, mlp)
    return x + block.drop_path(block.ls(out))


def _diff_parallel_scaling_block(block: DiffParallelScalingBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's DiffParallelScalingBlock. Modifications: those of `_differential`."""
    mlp, q, k, v = _linear(block.in_proj, block.in_norm(x)).split(block.in_split, dim=-1)
    out = _differential(block, q.flatten(0, -2), k.flatten(0, -2), v.flatten(0, -2), attend).view_as(x)
    mlp = block.mlp_drop(block.mlp_act(mlp if block.mlp_bias is None else mlp + block.mlp_bias))
    return x + block.drop_path(block.ls(_linear(block.out_proj, torch.cat((out, mlp), dim=-1))))


def _parallel_things_block(block: ParallelThingsBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ParallelThingsBlock. Modifications: attention is ours."""
    branches = [b.drop_path(b.ls(ATTENTIONS[type(b.attn)](b.attn, b.norm(x), attend))) for b in block.attns]
    x = x + torch.stack(branches).sum(0)
    return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(0)


ATTENTIONS: dict[type, Callable[[nn.Module, Tensor, Attend], Tensor]] = {
    Attention: _attention,
    DiffAttention: _diff_attention,
}
BLOCKS: dict[type, Callable[[nn.Module, Tensor, Attend], Tensor]] = {
    Block: _block,
    ResPostBlock: _res_post_block,
    ParallelScalingBlock: _parallel_scaling_block,
    DiffParallelScalingBlock: _diff_parallel_scaling_block,
    ParallelThingsBlock: _parallel_things_block,
}
