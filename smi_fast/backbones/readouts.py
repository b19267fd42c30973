"""Two ways to read logits from tokens that timm lacks: DINOv2's pooling, and the cosine logits of CLIP and SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassAndMean(nn.Module):
    """DINOv2's pooling for classification (Oquab et al., 2023): the class token beside the mean of the patches.

    It takes the place of `attn_pool` in timm's VisionTransformer, with `pool_include_prefix`.

    Args:
        num_prefix_tokens: the number of tokens before the patches, of which the first is the class token.
    """

    def __init__(self, num_prefix_tokens: int):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, C) to (B, 2 C). In images of different lengths, `attn_mask` (B, 1, 1, N) is True where a
        token is."""
        patches = x[:, self.num_prefix_tokens :]
        if attn_mask is None:
            mean = patches.mean(1)
        else:
            mask = attn_mask[:, 0, 0, self.num_prefix_tokens :, None]
            mean = (patches * mask).sum(1) / mask.sum(1)
        return torch.cat((x[:, 0], mean), dim=1)


class CosineLogits(nn.Module):
    """Zero-shot classification by text embeddings: scale * cosine(image embedding, text embedding) + bias.

    The sources are CLIP (Radford et al., 2021, figure 3) and SigLIP (Zhai et al., 2023, algorithm 1). It is computed
    and returned in float32 or a higher precision, also within autocast, because logits go up to the scale of about 100.

    Args:
        text_embeddings: (classes, D), of any length.
        scale, bias: scalars.
    """

    def __init__(self, text_embeddings: Tensor, scale: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("text_embeddings", text_embeddings / text_embeddings.norm(dim=-1, keepdim=True))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of image embeddings (B, D), of any length."""
        exact = torch.promote_types(x.dtype, torch.float32)
        x, texts, scale, bias = (part.to(exact) for part in (x, self.text_embeddings, self.scale, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            return scale * ((x / x.norm(dim=-1, keepdim=True)) @ texts.T) + bias
