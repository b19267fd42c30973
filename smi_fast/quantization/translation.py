"""timm's modules, brought into the few forms that are quantised.

Each function takes modules that `support.py` has checked. What timm computes with constants alone, and what it joins to
one layer or keeps apart without changing a number, is settled here:

- a LayerScale becomes a part of the weights of the layer in front of it;
- a block with parallel attention and MLP has one layer in front of both and one behind both, which are taken apart;
- the two layers in front of SwiGLU become one;
- the factor 1 - lambda_init of differential attention becomes a part of the norm in front of it;
- queries that are learned are projected once.
"""

from __future__ import annotations

import json

import torch
from timm.data import resolve_data_config
from timm.layers import GELU as TimmGELU
from timm.layers import AttentionPoolLatent, DiffAttention, GELUTanh, GluMlp, LayerScale, QuickGELU, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from smi_fast.backbones.readouts import ClassAndMean, CosineLogits
from smi_fast.backbones.support import DROPS
from smi_fast.quantization.blocks import Attention, Block, DifferentialAttention, Mlp
from smi_fast.quantization.heads import Activation, UnitLength
from smi_fast.quantization.layers import IntegerLinear, Norm
from smi_fast.quantization.observers import Quantizer
from smi_fast.quantization.pooling import AllTokens, AttentionPool, JoinedTokens, Pool

NAMES = {
    TimmGELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
DIFFERENTIAL = (DiffAttention, DiffParallelScalingBlock)


def activation_name(act: nn.Module) -> str:
    """Return the name of an activation in `blocks.ACTIVATIONS`."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return NAMES[type(act)]


def linear(layer: nn.Linear | nn.Conv2d, scale: nn.Module | None = None) -> IntegerLinear:
    """Translate a layer, and the LayerScale behind it."""
    return IntegerLinear(layer.weight.flatten(1), layer.bias, _gain(scale))


def norm(module: nn.Module, bits: int, factor: float = 1.0) -> Norm | nn.Identity:
    """Translate a norm whose output is multiplied by `factor`, or an Identity."""
    if type(module) is nn.Identity:
        return nn.Identity()
    bias = None
    if isinstance(module, nn.LayerNorm):
        bias = module.weight.new_zeros(module.weight.shape) if module.bias is None else module.bias * factor
    eps = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
    return Norm(module.weight * factor, bias, eps, bits)


def block(module: nn.Module, bits: int) -> Block:
    """Translate one of timm's blocks."""
    return BLOCKS[type(module)](module, bits)


def prefix_tokens(model: VisionTransformer) -> Tensor:
    """Return the class, distillation and register tokens (P, C) that a model has."""
    found = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    found = [tokens.detach()[0] for tokens in found if tokens is not None]
    return torch.cat(found) if found else model.patch_embed.proj.weight.new_empty(0, model.embed_dim)


def position_embedding(model: VisionTransformer) -> Tensor:
    """Return the position embedding (P + N, C), which is zero for tokens that have none."""
    zeros = model.patch_embed.proj.weight.new_zeros(
        model.num_prefix_tokens + model.patch_embed.num_patches, model.embed_dim
    )
    if model.pos_embed is not None:
        zeros[-model.pos_embed.shape[1] :] = model.pos_embed.detach()[0]
    return zeros


def config(model: VisionTransformer) -> dict:
    """Return a model's preprocessing, and its name and class names if they are known, in JSON's types."""
    given = dict(getattr(model, "pretrained_cfg", None) or {})
    known = {key: given[key] for key in ("architecture", "label_names") if given.get(key) is not None}
    return json.loads(json.dumps(resolve_data_config(model=model) | known))


def pool(model: VisionTransformer, bits: int) -> nn.Module:
    """Translate the pooling of a model."""
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if isinstance(model.attn_pool, ClassAndMean):
        return Pool("class+avg", model.attn_pool.num_prefix_tokens, bits)
    if model.attn_pool is not None:
        return _attention_pool(model.attn_pool, skipped, bits)
    if model.global_pool == "token":
        return JoinedTokens()
    return Pool(model.global_pool, skipped, bits) if model.global_pool else AllTokens()


def head(model: VisionTransformer, bits: int) -> tuple[nn.Module, nn.Module]:
    """Translate the classifier. Return it and the place of the logits, which is an Identity if it is a part of the
    classifier or if there is none.

    The two classifiers of a distilled model, whose logits are averaged, become one for the class token and the
    distillation token side by side.
    """
    if hasattr(model, "head_dist"):
        both = (linear(model.head), linear(model.head_dist))
        weight, bias = torch.cat([each.weight for each in both], 1), sum(each.bias for each in both)
        return IntegerLinear(weight / 2, bias / 2), Quantizer(bits)
    layers = [*model.head] if isinstance(model.head, nn.Sequential) else [model.head]
    parts: list[nn.Module] = []
    for layer in layers:
        if parts and isinstance(parts[-1], IntegerLinear) and isinstance(layer, (nn.Linear, CosineLogits)):
            parts.append(Quantizer(bits))
        if isinstance(layer, nn.Linear):
            parts.append(linear(layer))
        elif isinstance(layer, CosineLogits):
            texts = layer.scale * layer.text_embeddings
            parts += [UnitLength(bits), IntegerLinear(texts, layer.bias.expand(len(texts)))]
        elif not isinstance(layer, DROPS):
            parts.append(Activation(activation_name(layer), bits))
    logits = Quantizer(bits) if parts and isinstance(parts[-1], IntegerLinear) else nn.Identity()
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts), logits


def _gain(scale: nn.Module | None) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def _sequential(*norms: Norm | nn.Identity) -> nn.Module:
    """Return norms one after the other, without those that do nothing."""
    norms = [each for each in norms if not isinstance(each, nn.Identity)]
    return nn.Sequential(*norms) if len(norms) > 1 else (norms or [nn.Identity()])[0]


def _attention(
    attn: nn.Module, qkv: IntegerLinear, proj: IntegerLinear, before: nn.Module, after: nn.Module, bits: int
) -> Attention:
    """Translate timm's attention, or that of a parallel block, between two layers and the norms around them."""
    arguments = dict(
        qkv=qkv,
        proj=proj,
        q_norm=norm(attn.q_norm, bits),
        k_norm=norm(attn.k_norm, bits),
        heads=attn.num_heads,
        scale=attn.scale,
        norm=norm(before, bits),
        inner=norm(getattr(attn, "norm", nn.Identity()), bits),
        after=norm(after, bits),
        bits=bits,
    )
    if not isinstance(attn, DIFFERENTIAL):
        return Attention(**arguments)
    arguments["inner"] = _sequential(norm(attn.sub_norm, bits, 1 - attn.lambda_init), arguments["inner"])
    factor = attn._compute_lambda().to(qkv.weight.dtype)
    return DifferentialAttention(factor, **arguments | {"heads": 2 * attn.num_heads})


def _attention_branch(attn: nn.Module, scale: nn.Module, before: nn.Module, after: nn.Module, bits: int) -> Attention:
    return _attention(attn, linear(attn.qkv), linear(attn.proj, scale), before, after, bits)


def _mlp_branch(mlp: nn.Module, scale: nn.Module, before: nn.Module, after: nn.Module, bits: int) -> Mlp:
    if isinstance(mlp, SwiGLU):
        both = (linear(mlp.fc1_g), linear(mlp.fc1_x))
        fc1 = IntegerLinear(torch.cat([each.weight for each in both]), torch.cat([each.bias for each in both]))
    else:
        fc1 = linear(mlp.fc1)
        if isinstance(mlp, GluMlp) and mlp.gate_last:
            rows = len(fc1.weight) // 2
            fc1 = IntegerLinear(fc1.weight.roll(rows, 0), fc1.bias.roll(rows, 0))
    return Mlp(
        fc1,
        linear(mlp.fc2, scale),
        activation_name(mlp.act),
        gated=not isinstance(mlp, TimmMlp),
        norm=norm(before, bits),
        inner=norm(mlp.norm, bits),
        after=norm(after, bits),
        bits=bits,
    )


def _block(module: TimmBlock, bits: int) -> Block:
    nothing = nn.Identity()
    return Block(
        {"attn": _attention_branch(module.attn, module.ls1, module.norm1, nothing, bits)},
        {"mlp": _mlp_branch(module.mlp, module.ls2, module.norm2, nothing, bits)},
    )


def _res_post_block(module: ResPostBlock, bits: int) -> Block:
    nothing = nn.Identity()
    return Block(
        {"attn": _attention_branch(module.attn, nothing, nothing, module.norm1, bits)},
        {"mlp": _mlp_branch(module.mlp, nothing, nothing, module.norm2, bits)},
    )


def _parallel_things_block(module: ParallelThingsBlock, bits: int) -> Block:
    nothing = nn.Identity()
    attentions = [_attention_branch(each.attn, each.ls, each.norm, nothing, bits) for each in module.attns]
    mlps = [_mlp_branch(each.mlp, each.ls, each.norm, nothing, bits) for each in module.ffns]
    stages = ("attn", attentions), ("mlp", mlps)
    return Block(*({f"{name}{i}": each for i, each in enumerate(branches)} for name, branches in stages))


def _parallel_block(module: ParallelScalingBlock | DiffParallelScalingBlock, bits: int) -> Block:
    hidden, nothing, gain = module.in_split[0], nn.Identity(), _gain(module.ls)
    both = linear(module.in_proj)
    bias = both.bias[:hidden] if module.mlp_bias is None else module.mlp_bias
    fc1 = IntegerLinear(both.weight[:hidden], bias)
    qkv = IntegerLinear(both.weight[hidden:], both.bias[hidden:])
    if module.out_proj is None:
        proj, fc2 = linear(module.attn_out_proj, module.ls), linear(module.mlp_out_proj, module.ls)
    else:
        width, both = len(qkv.weight) // 3, linear(module.out_proj)
        proj = IntegerLinear(both.weight[:, :width], None, gain)
        fc2 = IntegerLinear(both.weight[:, width:], both.bias, gain)
    mlp = Mlp(
        fc1,
        fc2,
        activation_name(module.mlp_act),
        gated=False,
        norm=norm(module.in_norm, bits),
        inner=nothing,
        after=nothing,
        bits=bits,
    )
    return Block({"attn": _attention(module, qkv, proj, module.in_norm, nothing, bits), "mlp": mlp})


def _attention_pool(module: AttentionPoolLatent, skipped: int, bits: int) -> AttentionPool:
    query = module.q(module.latent[0])
    query = module.q_norm(query.unflatten(-1, (module.num_heads, module.head_dim))).flatten(-2)
    nothing = nn.Identity()
    return AttentionPool(
        query,
        linear(module.kv),
        norm(module.k_norm, bits),
        linear(module.proj),
        _mlp_branch(module.mlp, nothing, module.norm, nothing, bits),
        kind=module.pool,
        skipped=skipped,
        heads=module.num_heads,
        scale=module.scale,
        bits=bits,
    )


BLOCKS = {
    TimmBlock: _block,
    ResPostBlock: _res_post_block,
    ParallelThingsBlock: _parallel_things_block,
    ParallelScalingBlock: _parallel_block,
    DiffParallelScalingBlock: _parallel_block,
}
