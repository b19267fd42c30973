"""from_huggingface(): transformers' ViT, DeiT, DINOv2, CLIP and SigLIP vision models as timm's VisionTransformer."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import GELUTanh, Mlp, QuickGELU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast.backbones.huggingface_folder import named, read_folder
from smi_fast.backbones.readouts import ClassAndMean, CosineLogits
from smi_fast.backbones.support import UnsupportedModelError
from smi_fast.backbones.timm_weights import (
    IMAGENET,
    build,
    check_dropout,
    check_modules,
    set_classifier,
    set_config,
    timm_weights,
)

INCEPTION = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
OPENAI = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
LAST_NORM = r"(?:post_)?layernorm\.(.*)"
LAYER, TO = r"(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."
NAMES = {  # of transformers 4 and 5, in a model without its head; None: not used by the forward pass
    r"embeddings\.(?:cls_token|class_embedding)": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.(?:position_embeddings|position_embedding\.weight)": "pos_embed",
    r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.(.*)": r"patch_embed.proj.\1",
    r"embeddings\.(?:mask_token|position_ids)": None,
    r"pre_layrnorm\.(.*)": r"norm_pre.\1",
    LAST_NORM: r"norm.\1",
    r"pooler\..*": None,
    LAYER + r"(?:layernorm_before|layer_norm1|norm1)\.(.*)": TO + r"norm1.\2",
    LAYER + r"(?:attention\.attention\.query|(?:attention|self_attn)\.q_proj)\.(.*)": TO + r"attn.q.\2",
    LAYER + r"(?:attention\.attention\.key|(?:attention|self_attn)\.k_proj)\.(.*)": TO + r"attn.k.\2",
    LAYER + r"(?:attention\.attention\.value|(?:attention|self_attn)\.v_proj)\.(.*)": TO + r"attn.v.\2",
    LAYER + r"(?:attention\.(?:output\.dense|o_proj)|self_attn\.out_proj)\.(.*)": TO + r"attn.proj.\2",
    LAYER + r"layer_scale([12])\.lambda1": TO + r"ls\2.gamma",
    LAYER + r"(?:layernorm_after|layer_norm2|norm2)\.(.*)": TO + r"norm2.\2",
    LAYER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(.*)": TO + r"mlp.fc1.\2",
    LAYER + r"mlp\.(gate|up)_proj\.(.*)": TO + r"mlp.\2.\3",
    LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.*)": TO + r"mlp.fc2.\2",
}
POOLING_NAMES = {  # SigLIP's attention pooling
    r"head\.probe": "attn_pool.latent",
    r"head\.attention\.in_proj_(.*)": r"attn_pool.qkv.\1",
    r"head\.attention\.out_proj\.(.*)": r"attn_pool.proj.\1",
    r"head\.layernorm\.(.*)": r"attn_pool.norm.\1",
    r"head\.mlp\.(.*)": r"attn_pool.mlp.\1",
}
ACTIVATIONS = {
    "gelu": nn.GELU, "gelu_new": GELUTanh, "gelu_pytorch_tanh": GELUTanh, "quick_gelu": QuickGELU, "relu": nn.ReLU,
    "silu": nn.SiLU, "swish": nn.SiLU, "tanh": nn.Tanh,
}  # fmt: skip
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    Args:
        tower: the attribute in which a model with a head keeps its ViT.
        statistics: the mean and standard deviation of images where a folder does not say otherwise.
        any_size: whether the model takes images of any size. It then resamples position embeddings in float32.
        antialias: whether it does so with antialiasing.
    """

    tower: str
    statistics: tuple[Sequence[float], Sequence[float]]
    any_size: bool = False
    antialias: bool = False


VIT, DEIT = Family("vit", INCEPTION), Family("deit", IMAGENET)
DINOV2 = Family("dinov2", IMAGENET, any_size=True)
REGISTERS = Family("dinov2_with_registers", IMAGENET, any_size=True, antialias=True)
CLIP, SIGLIP = Family("vision_model", OPENAI), Family("vision_model", INCEPTION)
MODELS = {
    "ViTModel": VIT, "ViTForImageClassification": VIT,
    "DeiTModel": DEIT, "DeiTForImageClassification": DEIT, "DeiTForImageClassificationWithTeacher": DEIT,
    "Dinov2Model": DINOV2, "Dinov2ForImageClassification": DINOV2,
    "Dinov2WithRegistersModel": REGISTERS, "Dinov2WithRegistersForImageClassification": REGISTERS,
    "CLIPModel": CLIP, "CLIPVisionModel": CLIP, "CLIPVisionModelWithProjection": CLIP,
    "CLIPForImageClassification": CLIP,
    "SiglipModel": SIGLIP, "SiglipVisionModel": SIGLIP, "SiglipForImageClassification": SIGLIP,
}  # fmt: skip


def from_huggingface(
    model_or_folder: nn.Module | str | os.PathLike,
    text_embeddings: Tensor | None = None,
    temperature: float | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> VisionTransformer:
    """Make a timm VisionTransformer with the weights and the numbers of a vision model of transformers.

    The result computes the logits of a classifier, and otherwise the model's pooled output: the image embedding of
    `CLIPModel`, `CLIPVisionModelWithProjection` and SigLIP, and the `pooler_output` of the others. A ViT or DeiT
    without a pooler gives its normalised class token. A model without a classifier has `num_classes` 0. With
    `text_embeddings` CLIP and SigLIP become zero-shot classifiers, whose logits are those of `logits_per_image`.

    Weights are copied and keep their device and dtype; hooks and dropout are left out. The result is in the mode of the
    model, training or evaluation. `accelerate` and `Inverter` take it like any other model of timm.

    Args:
        model_or_folder: a ViTModel, ViTForImageClassification, DeiTModel, DeiTForImageClassification,
            DeiTForImageClassificationWithTeacher, Dinov2Model, Dinov2ForImageClassification, the same two of
            Dinov2WithRegisters, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, CLIPForImageClassification,
            SiglipModel, SiglipVisionModel or SiglipForImageClassification, or a folder that `save_pretrained` has
            written, with config.json, model.safetensors and, for the preprocessing, preprocessor_config.json.
        text_embeddings: (classes, D), what CLIP's or SigLIP's text model gives for a text of each class, of any length.
        temperature: what cosines are divided by, instead of the model's own 1 / exp(logit_scale). It is needed for a
            vision model alone, which has no logit_scale.
        image_size: the size of images in pixels. Position embeddings are resampled to it as transformers does with
            interpolate_pos_encoding. None: the size in the model's config or, for DINOv2, which takes any size, that to
            which the folder's preprocessing crops images. Pixels at the right and the bottom that patches do not cover,
            which transformers ignores, do not belong to it: a SigLIP for 384 pixels and patches of 14 takes 378.
        mean, std: the normalisation of images, one number per channel. None: the folder's, otherwise that with which
            the first models of the family were published.
        class_names: the names of the classes. None: those of the model's config, if it has any, and numbers for texts.

    Raises:
        UnsupportedModelError: timm's VisionTransformer cannot compute the same. The message names the part.
        ValueError: the folder cannot be read, or an argument does not fit the model.
        ImportError: a folder is given, and transformers is not installed.
    """
    if isinstance(model_or_folder, nn.Module):
        return _convert(model_or_folder, {}, text_embeddings, temperature, image_size, mean, std, class_names)
    with named(Path(model_or_folder)) as folder:
        read = read_folder(folder, MODELS)
        return _convert(*read, text_embeddings, temperature, image_size, mean, std, class_names)


def _convert(
    model: nn.Module,
    preprocessing: dict[str, Any],
    text_embeddings: Tensor | None,
    temperature: float | None,
    image_size: int | tuple[int, int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    class_names: Sequence[str] | None,
) -> VisionTransformer:
    """Convert a model whose images are preprocessed as `read_folder` says. `from_huggingface` describes the rest."""
    family = _family(model)
    tower = getattr(model, family.tower, model)
    weights, swiglu = _weights(model, tower), getattr(tower.config, "use_swiglu_ffn", False)
    cropped = preprocessing.pop("crop_size", None)
    size = image_size if image_size is not None else cropped if family.any_size else None
    fast = build(
        weights,
        image_size=_fit_positions(weights, family, _pair(tower.config.image_size), size),
        num_heads=tower.config.num_attention_heads,
        eps=tower.config.layer_norm_eps,
        act_layer=nn.SiLU if swiglu else _activation(tower.config, "hidden_act"),
        mlp_layer=SwiGLUPacked if swiglu else Mlp,
        no_embed_class=family is REGISTERS,
        **_pooling(model),
    )
    _add_head(fast, model, tower)
    if text_embeddings is not None:
        _classify_by_texts(fast, model, text_embeddings, temperature)
        class_names = [str(number) for number in range(len(text_embeddings))] if class_names is None else class_names
    elif temperature is not None:
        raise ValueError(f"temperature {temperature} needs text_embeddings")
    elif class_names is None:
        class_names = _labels(model.config, fast.num_classes)
    given = {name: value for name, value in (("mean", mean), ("std", std)) if value is not None}
    published = dict(zip(("mean", "std"), family.statistics, strict=True))
    set_config(fast, type(model).__name__, class_names, **published | preprocessing | given)
    return fast.train(model.training)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _family(model: nn.Module) -> Family:
    """Return the family of a model, after a check that nothing in it is known to compute something else."""
    kind = type(model)
    if kind.__name__ not in MODELS or not kind.__module__.startswith("transformers.models."):
        raise UnsupportedModelError(
            f"the model is a {kind.__module__}.{kind.__name__}, not one of transformers' {', '.join(MODELS)}"
        )
    family = MODELS[kind.__name__]
    tower = getattr(model, family.tower, model)
    check_modules(tower, "transformers")
    check_dropout(model, {name: getattr(tower.config, name, 0.0) for name in DROPOUTS})
    return family


def _activation(config: Any, name: str) -> type[nn.Module]:
    kind = getattr(config, name, "tanh")  # transformers 4.45 knows no pooler_act: it is tanh
    if kind not in ACTIVATIONS:
        raise UnsupportedModelError(f"{name} is {kind!r}, and only {', '.join(ACTIVATIONS)} are known")
    return ACTIVATIONS[kind]


def _weights(model: nn.Module, tower: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model under timm's names, without those of its classifier or projection."""
    names, classifies = NAMES, hasattr(model, "classifier")
    if MODELS[type(model).__name__] is SIGLIP:
        names = names | (dict.fromkeys(POOLING_NAMES) if classifies else POOLING_NAMES)
        if not (classifies or hasattr(tower, "head")):
            raise UnsupportedModelError("vision_use_head is False, so the model has no pooled output")
    elif MODELS[type(model).__name__] is CLIP and classifies:
        names = names | {LAST_NORM: None}
    weights = timm_weights(tower.state_dict(), names)
    if "dist_token" in weights and not hasattr(model, "distillation_classifier"):
        weights["reg_token"] = weights.pop("dist_token")  # a token that the head does not read
    for part in ("weight", "bias"):
        if (qkv := weights.pop(f"attn_pool.qkv.{part}", None)) is not None:
            rows = len(qkv) // 3
            weights[f"attn_pool.q.{part}"], weights[f"attn_pool.kv.{part}"] = qkv.split((rows, 2 * rows))
    return weights


def _fit_positions(
    weights: dict[str, Tensor], family: Family, native: tuple[int, int], image_size: int | Sequence[int] | None
) -> tuple[int, int]:
    """Make the position embeddings those of images of another size than the native one, as transformers' method
    interpolate_pos_encoding does. Return the size of the images that patches cover."""
    patch_size, pos = weights["patch_embed.proj.weight"].shape[2:], weights["pos_embed"]
    size = native if image_size is None else _pair(image_size)
    before, after = (tuple(side // patch for side, patch in zip(s, patch_size, strict=True)) for s in (native, size))
    covered = tuple(count * patch for count, patch in zip(after, patch_size, strict=True))
    if min(after) < 1 or (image_size is not None and covered != size):
        raise ValueError(f"image_size {image_size} is not divisible into patches of {tuple(patch_size)} pixels")
    if (before != after or family.any_size) and native[0] != native[1]:
        raise UnsupportedModelError(
            f"image_size is {native} in the model's config, and only position embeddings of a square are resampled"
        )
    prefix, grid = pos.split((pos.shape[1] - before[0] * before[1], before[0] * before[1]), dim=1)
    if before != after:
        maps = grid.unflatten(1, before).permute(0, 3, 1, 2).to(torch.float32 if family.any_size else pos.dtype)
        maps = F.interpolate(maps, size=after, mode="bicubic", align_corners=False, antialias=family.antialias)
        grid = maps.to(pos.dtype).permute(0, 2, 3, 1).flatten(1, 2)
    if family is REGISTERS:  # the class token has a position and registers have none: in timm all have one, or none
        weights["cls_token"], weights["pos_embed"] = weights["cls_token"] + prefix, grid
    else:
        weights["pos_embed"] = torch.cat((prefix, grid), dim=1)
    return covered


def _pooling(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer for what a model does between its blocks and its head."""
    kind = type(model).__name__
    if kind in ("CLIPForImageClassification", "SiglipForImageClassification"):
        return {"global_pool": "avg", "fc_norm": False, "final_norm": MODELS[kind] is SIGLIP}
    return {"global_pool": "map" if MODELS[kind] is SIGLIP else "token"}


def _add_head(fast: VisionTransformer, model: nn.Module, tower: nn.Module) -> None:
    """Add the classifier, projection or pooler of a model."""
    classifier = getattr(model, "classifier", getattr(model, "cls_classifier", None))
    if classifier is not None:
        set_classifier(fast, classifier)
        if isinstance(fast, VisionTransformerDistilled):
            fast.head_dist = copy.deepcopy(model.distillation_classifier)
        elif MODELS[type(model).__name__] in (DINOV2, REGISTERS):
            fast.global_pool, fast.pool_include_prefix = "map", True
            fast.attn_pool = ClassAndMean(fast.num_prefix_tokens)
    elif hasattr(model, "visual_projection"):
        fast.head = copy.deepcopy(model.visual_projection)
    elif getattr(tower, "pooler", None) is not None:
        fast.head = nn.Sequential(copy.deepcopy(tower.pooler.dense), _activation(tower.config, "pooler_act")())


def _classify_by_texts(
    fast: VisionTransformer, model: nn.Module, text_embeddings: Tensor, temperature: float | None
) -> None:
    """Make a model of image embeddings a classifier by text embeddings."""
    kind, weight = type(model).__name__, fast.patch_embed.proj.weight
    if not hasattr(model, "visual_projection") and kind not in ("SiglipModel", "SiglipVisionModel"):
        raise ValueError(
            "text_embeddings are for CLIPModel, CLIPVisionModelWithProjection, SiglipModel and SiglipVisionModel, "
            f"whose image embeddings they are compared with, not for {kind}"
        )
    width = fast.embed_dim if fast.global_pool == "map" else fast.head.out_features
    if not isinstance(text_embeddings, Tensor) or text_embeddings.ndim != 2 or text_embeddings.shape[1] != width:
        found = tuple(text_embeddings.shape) if isinstance(text_embeddings, Tensor) else type(text_embeddings).__name__
        raise ValueError(f"text_embeddings are {found}, expected a tensor (classes, {width})")
    texts = text_embeddings.detach().to(weight)
    wrong = (~texts.isfinite().all(1) | (texts == 0).all(1)).nonzero()
    if len(texts) == 0 or len(wrong):
        where = f"row {int(wrong[0])} is zero or not finite" if len(wrong) else "there is no row"
        raise ValueError(f"text_embeddings: {where}")
    if temperature is None and not hasattr(model, "logit_scale"):
        raise ValueError(f"{kind} has no logit_scale: give temperature, such as 0.01")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    scale = model.logit_scale.detach().exp().view(()) if temperature is None else weight.new_tensor(1 / temperature)
    bias = model.logit_bias.detach().clone().view(()) if hasattr(model, "logit_bias") else weight.new_zeros(())
    logits = CosineLogits(texts, scale.to(weight), bias.to(weight))
    fast.head = logits if isinstance(fast.head, nn.Identity) else nn.Sequential(fast.head, logits)
    fast.num_classes = len(texts)


def _labels(config: Any, num_classes: int) -> list[str] | None:
    """Return the names of the classes in a config, or None if it has none, or no more than their numbers."""
    names = [config.id2label[number] for number in sorted(config.id2label)]
    named = any(name != f"LABEL_{number}" for number, name in enumerate(names))
    return names if named and len(names) == num_classes else None
