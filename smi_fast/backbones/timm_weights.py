"""Making timm's VisionTransformer from the weights of another library's ViT, with the same numbers."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, cat, nn

from smi_fast.backbones.support import UnsupportedModelError

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}  # timm has one weight
ROWS = ("cls_token", "dist_token", "reg_token", "pos_embed", "attn_pool.latent")  # (1, tokens, C) in timm


def timm_weights(weights: Mapping[str, Tensor], names: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Return a ViT's weights under timm's names, without a copy where two weights are not fused to one.

    Args:
        weights: the weights under the names of the other library.
        names: maps regular expressions to timm's names, or to None for weights that the forward pass does not use. A
            name that begins as one of FUSED does becomes a part of timm's weight.

    Raises:
        UnsupportedModelError: a name is unknown, or the weights are not all of one floating dtype.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        matches = [(match, to) for pattern, to in names.items() if (match := re.fullmatch(pattern, name))]
        if not matches:
            raise UnsupportedModelError(f"the weight {name} has no place in timm's VisionTransformer")
        [(match, to)] = matches
        if to is not None:
            found[match.expand(to)] = weight.detach()
    width = found["patch_embed.proj.weight"].shape[0]
    found |= {name: found[name].view(1, -1, width) for name in ROWS if name in found}
    dtypes = {weight.dtype: name for name, weight in found.items()}
    for dtype, name in dtypes.items():
        if not dtype.is_floating_point or len(dtypes) > 1:
            raise UnsupportedModelError(f"the weight of {name} is {dtype}, and all must have one floating dtype")
    for whole, parts in FUSED.items():
        for name in [name for name in found if f".{parts[0]}." in name]:
            fused = [found.pop(name.replace(f".{parts[0]}.", f".{part}.")) for part in parts]
            found[name.replace(f".{parts[0]}.", f".{whole}.")] = cat(fused)
    return found


def build(
    weights: Mapping[str, Tensor],
    *,
    image_size: tuple[int, int],
    num_heads: int,
    eps: float,
    act_layer: type[nn.Module],
    **arguments: Any,
) -> VisionTransformer:
    """Make timm's VisionTransformer without a head, with copies of weights under timm's names. It is a distilled one if
    the weights hold a `dist_token`.

    Args:
        weights: all but those of the head. Sizes that are not given are read from them.
        arguments: further arguments of timm's VisionTransformer.

    Raises:
        UnsupportedModelError: the weights are not those of such a model. The message names one.
    """
    proj, depth = weights["patch_embed.proj.weight"], sum(name.endswith(".norm1.weight") for name in weights)
    if depth == 0:
        raise UnsupportedModelError("the model has no blocks")
    model = (VisionTransformerDistilled if "dist_token" in weights else VisionTransformer)(
        img_size=image_size,
        patch_size=tuple(proj.shape[2:]),
        in_chans=proj.shape[1],
        num_classes=0,
        embed_dim=proj.shape[0],
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=(weights["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / proj.shape[0],  # timm rounds down
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
        class_token="cls_token" in weights,
        reg_tokens=weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        pre_norm="norm_pre.weight" in weights,
        norm_layer=partial(LayerNorm, eps=eps),
        act_layer=act_layer,
        weight_init="skip",
        device="meta",
        **arguments,
    )
    for name, weight in model.state_dict().items():
        if name not in weights or weights[name].shape != weight.shape:
            is_there = tuple(weights[name].shape) if name in weights else "missing"
            raise UnsupportedModelError(f"the weight of {name} is {is_there}, timm's is {tuple(weight.shape)}")
    unknown = model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, False, True)[1]
    if unknown:
        raise UnsupportedModelError(f"the weight of {unknown[0]} has no place in timm's VisionTransformer")
    return model


def check_modules(model: nn.Module, library: str) -> None:
    """Raise UnsupportedModelError, naming the part, if a part of a model is neither the library's nor torch's."""
    for name, module in model.named_modules():
        owner = type(module).__module__
        if not owner.startswith((f"{library}.", "torch.nn.modules.")):
            raise UnsupportedModelError(f"{name} is a {owner}.{type(module).__name__}, which is not part of {library}")


def check_dropout(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Raise UnsupportedModelError, naming the rate, if a model is in training mode and drops something."""
    for name, rate in rates.items():
        if model.training and rate > 0:
            raise UnsupportedModelError(
                f"{name} is {rate}, and timm does not drop in the same places while training: call model.eval() first"
            )


def set_classifier(model: VisionTransformer, classifier: nn.Module) -> None:
    """Give a model a copy of a classifier. It has as many classes as the last Linear in it has outputs."""
    if type(classifier) is nn.Sequential and len(classifier) == 1:
        [classifier] = classifier
    widths = [part.out_features for part in classifier.modules() if isinstance(part, nn.Linear)]
    model.head, model.num_classes = copy.deepcopy(classifier), (widths or [0])[-1]


def set_config(
    model: VisionTransformer, architecture: str, class_names: Sequence[str] | None, **preprocessing: Any
) -> None:
    """Give a model the `pretrained_cfg` from which timm and this package read how images are preprocessed.

    Args:
        architecture: the name of the model.
        class_names: the names of its classes, if they are known.
        preprocessing: mean and std, one number per channel, and other entries of timm's data config.

    Raises:
        ValueError: the mean or the standard deviation has another number of values than images have channels, or there
            are not as many names as classes.
    """
    channels = model.in_chans
    for name in ("mean", "std"):
        preprocessing[name] = values = tuple(map(float, preprocessing[name]))
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, and images have {channels} channels")
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"there are {len(class_names)} class_names, and the model has {model.num_classes} classes")
    model.pretrained_cfg = model.default_cfg = {
        "architecture": architecture, "input_size": (channels, *model.patch_embed.img_size),
        "num_classes": model.num_classes, "interpolation": "bicubic", "crop_pct": 1.0,
        "first_conv": "patch_embed.proj", "classifier": "head",
    } | preprocessing | ({} if class_names is None else {"label_names": tuple(class_names)})  # fmt: skip
