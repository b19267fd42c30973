"""timm's blocks on packed tokens. Each function that stands in for a timm forward says what it changes
("Modifications:").

Tokens are (B, N, C) if all sequences are equally long, otherwise packed (T, C).

The parts of a plain module are read from its `_modules`, because nn.Module's own access to attributes takes as long as
a view of a tensor.
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

from smi_fast.backbones.attend import Attend, normalise_qk
from smi_fast.backbones.casting import autocast_dtype, product, weights
from smi_fast.backbones.features import feature_name
from smi_fast.backbones.importance import softmax_scale
from smi_fast.backbones.plain import GELUS, gelu_form, plain_for, run_plain
from smi_fast.backbones.pruning import Drop, Merge, check_prunes, check_takes_sizes
from smi_fast.backbones.stream import Stream, add, normalise, normalise_of_first
from smi_fast.backbones.support import (
    LINEAR,
    MLP,
    UnsupportedModelError,
    block_obstacle,
    call,
    obstacle,
    obstacle_within_block,
)
from smi_fast.kernels import bias_gelu, resolve_backend
from smi_fast.kernels.linear import linear


def _attention(attn: Attention, x: Tensor, attend: Attend) -> Tensor:
    """timm's Attention. Modifications: x may be packed (T, C); the kernel reads queries, keys and values where the qkv
    projection wrote them."""
    parts = attn._modules
    qkv = product(parts["qkv"], x).view(-1, 3, attn.num_heads, attn.head_dim)
    out = attend(normalise_qk(attn, qkv), softmax_scale(attn))
    out = call(parts["norm"], out.view(*x.shape[:-1], attn.attn_dim))
    if attn.gate is not None:
        out = out * product(attn.gate, x).sigmoid()
    return call(parts["proj_drop"], product(parts["proj"], out))


def _mlp(mlp: nn.Module, x: Tensor, backend: str) -> Tensor:
    """timm's Mlp. Modifications: the products are ours; on the Triton backend one kernel adds the first bias and
    computes GELU. A module that is not a plain Mlp is called as it is."""
    if obstacle(mlp, MLP) is not None:
        return mlp(x)
    parts = mlp._modules
    form, fc1 = _gelu_form(parts["act"]), parts["fc1"]
    if form is None or obstacle(fc1, LINEAR) is not None or resolve_backend(backend, x.device) == "torch":
        x = mlp.act(product(fc1, x))
    else:
        weight, bias = weights(fc1)
        x = bias_gelu(linear(x, weight), bias, approximate=form, backend=backend)
    return call(parts["drop2"], product(parts["fc2"], call(parts["norm"], call(parts["drop1"], x))))


def _gelu_form(act: nn.Module) -> str | None:
    """Return the `approximate` of `bias_gelu` that stands for an activation, or None if it is no plain GELU."""
    return None if obstacle(act, GELUS) is not None else gelu_form(act)


def _diff_attention(attn: DiffAttention, x: Tensor, attend: Attend) -> Tensor:
    """timm's DiffAttention. Modifications: `_differential` lists them."""
    q, k, v = product(attn.qkv, x).flatten(0, -2).chunk(3, dim=-1)
    out = call(attn.norm, _differential(attn, q, k, v, attend).view_as(x))
    return call(attn.proj_drop, product(attn.proj, out))


def _differential(
    attn: DiffAttention | DiffParallelScalingBlock, q: Tensor, k: Tensor, v: Tensor, attend: Attend
) -> Tensor:
    """Compute differential attention (Ye et al., 2024, Eq. 1) of queries, keys and values (T, C) -> (T, C).

    Modifications: values are twice as wide as queries, so each half of the values becomes a head of its own. One call
    of the attention kernel then computes both softmaxes.
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


def any_block(block: nn.Module, stream: Stream, attend: Attend) -> Stream:
    """Run the block that `attend` has entered, and prune its tokens. It runs in a straight line or by the functions of
    this file if the parts that they bypass are plain, otherwise by its own forward, within which nothing can be
    measured, merged or recorded.

    Raises:
        UnsupportedModelError: the block, perhaps because it runs by its own forward, cannot measure importance, merge
            patches or take their sizes into account, but has to; or it has no feature, or several, of a name that was
            asked for.
    """
    after = run_plain(block, stream, attend)
    if after is not None:
        return after
    reason, number, stream = block_obstacle(block), attend.number, stream.batch(attend.tokens)
    if reason is None:
        if attend.prune is not None:
            check_prunes(block, number, attend.prune)
        if attend.sizes is not None:
            check_takes_sizes(block, number)
        stream = BLOCKS[type(block)](block, stream, attend)
    elif attend.measures:
        raise UnsupportedModelError(f"blocks[{number}]{reason}, so the attention within it cannot be measured")
    elif isinstance(attend.prune, Merge) or attend.sizes is not None:
        raise UnsupportedModelError(
            f"blocks[{number}]{reason}, so it can neither merge patches nor take the sizes of merged ones into account"
        )
    else:
        stream = Stream(block(stream.sum()))
    if attend.prune is not None or "block" in attend.wanted:
        stream = Stream(attend.record("block", attend.drop_or_merge(stream.sum())))
    for part in attend.wanted:
        found = len(attend.found.get(feature_name(number, part), ()))
        if found != 1:
            reason = reason or f" is a {type(block).__name__} with {found or 'no'} tensors of this kind"
            raise UnsupportedModelError(f"there is no feature {feature_name(number, part)!r}: blocks[{number}]{reason}")
    return stream


def _prunes_between_halves(block: Block, attend: Attend) -> bool:
    """Return whether patches go between attention and MLP. Merging and the fused token are defined there. Dropping
    alone is only cheaper there, so it waits for the end of the block if a function decides, which reads the block's
    output, or if a part that is not plain could tell the difference."""
    prune = attend.prune
    if isinstance(prune, Drop) and prune.fuse is None:
        return prune.scores is None and obstacle_within_block(block) is None
    return prune is not None


def _block(block: Block, stream: Stream, attend: Attend) -> Stream:
    """timm's Block. Modifications: attention is ours; patches may be dropped or merged between the two halves."""
    parts = block._modules
    attn = parts["attn"]
    x, normed = normalise(stream, parts["norm1"], attend.backend)
    out = ATTENTIONS[type(attn)](attn, normed, attend)
    stream = add(x, attend.record("attn", out), parts["ls1"], parts["drop_path1"])
    if _prunes_between_halves(block, attend):
        stream = Stream(attend.drop_or_merge(stream.sum()))
    return _second_half(block, stream, attend)


def _second_half(block: Block, stream: Stream, attend: Attend) -> Stream:
    parts = block._modules
    x, normed = normalise(stream, parts["norm2"], attend.backend)
    out = attend.record("mlp", _mlp(parts["mlp"], normed, attend.backend))
    return add(x, out, parts["ls2"], parts["drop_path2"])


def block_of_first_tokens(block: Block, stream: Stream, attend: Attend, count: int) -> Stream:
    """timm's Block if only the first `count` tokens of its output are used: (B, N, C) or (T, C) -> (B, count, C).

    Modifications: only keys and values are computed for all tokens, and the rest for the first tokens.
    """
    plain, parts = plain_for(block, stream, attend), block._modules
    attn, stream = parts["attn"], stream.batch(attend.tokens)
    within, heads, head_dim, width = attn._modules, attn.num_heads, attn.head_dim, attn.attn_dim
    if plain is not None and stream.x.ndim == 3:
        dtype = autocast_dtype(stream.x)
        x, normed, first = plain.normalise(0, stream, attend.operations, dtype, count)  # x and first are [B, count, C]
    else:
        x, normed, first = normalise_of_first(stream, parts["norm1"], attend, count)
    weight, bias = weights(within["qkv"], packed=False)
    q = linear(first.flatten(0, 1), weight[:width], None if bias is None else bias[:width])
    kv = linear(normed.flatten(0, -2), weight[width:], None if bias is None else bias[width:])
    q, kv = call(within["q_norm"], q.view(-1, count, heads, head_dim)), kv.view(-1, 2, heads, head_dim)
    if not isinstance(within["k_norm"], nn.Identity):
        k, v = kv.unbind(1)
        kv = torch.stack((within["k_norm"](k).to(v.dtype), v), 1)
    out = call(within["norm"], attend.of_first(q.to(kv.dtype), kv, softmax_scale(attn)).flatten(2))
    if attn.gate is not None:
        out = out * product(attn.gate, first).sigmoid()
    out = call(within["proj_drop"], product(within["proj"], out))
    if plain is not None:
        return plain.second_half(Stream(x, out, plain.gammas[0]), attend.operations, autocast_dtype(x))
    return _second_half(block, add(x, out, parts["ls1"], parts["drop_path1"]), attend)


def _res_post_block(block: ResPostBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ResPostBlock. Modifications: attention is ours."""
    out = ATTENTIONS[type(block.attn)](block.attn, x, attend)
    x = x + block.drop_path1(block.norm1(attend.record("attn", out)))
    out = attend.record("mlp", _mlp(block.mlp, x, attend.backend))
    return x + block.drop_path2(block.norm2(out))


def _parallel_scaling_block(block: ParallelScalingBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ParallelScalingBlock. Modifications: attention reads q, k and v where the joint projection left them."""
    mlp, qkv = product(block.in_proj, block.in_norm(x)).split((block.in_split[0], sum(block.in_split[1:])), dim=-1)
    qkv = qkv.flatten(0, -2).unflatten(-1, (3, block.num_heads, block.head_dim))
    out = attend(normalise_qk(block, qkv), softmax_scale(block)).view_as(x)
    mlp = block.mlp_drop(block.mlp_act(mlp if block.mlp_bias is None else mlp + block.mlp_bias))
    if block.out_proj is not None:
        out = product(block.out_proj, torch.cat((out, mlp), dim=-1))
    else:
        out = product(block.attn_out_proj, out) + product(block.mlp_out_proj, mlp)
    return x + block.drop_path(block.ls(out))


def _diff_parallel_scaling_block(block: DiffParallelScalingBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's DiffParallelScalingBlock. Modifications: `_differential` lists them."""
    mlp, q, k, v = product(block.in_proj, block.in_norm(x)).split(block.in_split, dim=-1)
    out = _differential(block, q.flatten(0, -2), k.flatten(0, -2), v.flatten(0, -2), attend).view_as(x)
    mlp = block.mlp_drop(block.mlp_act(mlp if block.mlp_bias is None else mlp + block.mlp_bias))
    return x + block.drop_path(block.ls(product(block.out_proj, torch.cat((out, mlp), dim=-1))))


def _parallel_things_block(block: ParallelThingsBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ParallelThingsBlock. Modifications: attention is ours."""
    branches = [b.drop_path(b.ls(ATTENTIONS[type(b.attn)](b.attn, b.norm(x), attend))) for b in block.attns]
    x = x + torch.stack(branches).sum(0)
    return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(0)


def _summed(run: Callable[[nn.Module, Tensor, Attend], Tensor]) -> Callable[[nn.Module, Stream, Attend], Stream]:
    """Let a function of the tokens run on a stream."""
    return lambda block, stream, attend: Stream(run(block, stream.sum(), attend))


ATTENTIONS: dict[type, Callable[[nn.Module, Tensor, Attend], Tensor]] = {
    Attention: _attention,
    DiffAttention: _diff_attention,
}
BLOCKS: dict[type, Callable[[nn.Module, Stream, Attend], Stream]] = {
    Block: _block,
    ResPostBlock: _summed(_res_post_block),
    ParallelScalingBlock: _summed(_parallel_scaling_block),
    DiffParallelScalingBlock: _summed(_diff_parallel_scaling_block),
    ParallelThingsBlock: _summed(_parallel_things_block),
}
