"""from_torchvision(): torchvision's vit_b_16 and its family as timm's VisionTransformer."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

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

LAYER, TO = r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."
NAMES = {  # None: the head is copied as a whole
    "class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    r"conv_proj\.(weight|bias)": r"patch_embed.proj.\1",
    r"encoder\.ln\.(.*)": r"norm.\1",
    r"heads\..*": None,
    LAYER + r"ln_([12])\.(.*)": TO + r"norm\2.\3",
    LAYER + r"self_attention\.in_proj_(.*)": TO + r"attn.qkv.\2",
    LAYER + r"self_attention\.out_proj\.(.*)": TO + r"attn.proj.\2",
    LAYER + r"mlp\.0\.(.*)": TO + r"mlp.fc1.\2",
    LAYER + r"mlp\.3\.(.*)": TO + r"mlp.fc2.\2",
}


def from_torchvision(
    model: nn.Module,
    *,
    mean: Sequence[float] = IMAGENET[0],
    std: Sequence[float] = IMAGENET[1],
    class_names: Sequence[str] | None = None,
) -> VisionTransformer:
    """Make a timm VisionTransformer with the weights and the logits of torchvision's, such as vit_b_16.

    Weights are copied and keep their device and dtype. The result is in the mode, training or evaluation, of the model.

    Args:
        model: a torchvision.models.VisionTransformer without a convolutional stem.
        mean, std: the normalisation of images, one number per channel. The defaults are those of all of torchvision's
            weights.
        class_names: the names of the classes, such as `weights.meta["categories"]`.

    Raises:
        UnsupportedModelError: timm's VisionTransformer cannot compute the same. The message names the part.
        ValueError: an argument does not fit the model.
    """
    if type(model) is not TorchvisionViT:
        kind = type(model)
        raise UnsupportedModelError(f"the model is a {kind.__module__}.{kind.__name__}, not torchvision's own ViT")
    check_modules(model.encoder, "torchvision")
    check_dropout(model, {"dropout": model.dropout, "attention_dropout": model.attention_dropout})
    fast = build(
        timm_weights(model.state_dict(), NAMES),
        image_size=(model.image_size, model.image_size),
        num_heads=model.encoder.layers[0].num_heads,
        eps=model.encoder.ln.eps,
        act_layer=nn.GELU,
    )
    set_classifier(fast, model.heads)
    set_config(fast, "torchvision_vit", class_names, mean=mean, std=std, interpolation="bilinear", crop_pct=0.875)
    return fast.train(model.training)
