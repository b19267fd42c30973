"""What the tests of pruning and of features share: a small model, and timm's attention written out."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.models import cifar10_vit


def build(**options) -> VisionTransformer:
    """Four blocks, 64 patches, two registers, float64, every weight random."""
    options = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "reg_tokens": 2, **options}
    return randomised(cifar10_vit(pretrained=False, **options))


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


def some_keep(kind: str) -> list[torch.Tensor] | torch.Tensor | None:
    """Patches of three images: "all", equally many ("uniform"), or "ragged"."""
    if kind == "ragged":
        return [torch.randperm(64)[:count] for count in (40, 1, 23)]
    return None if kind == "all" else torch.stack([torch.randperm(64)[:30] for _ in range(3)])


def rows_of(keep) -> list[torch.Tensor]:
    return [torch.arange(64)] * 3 if keep is None else list(keep)


def embedded(model: VisionTransformer, image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The tokens (1, P + K, C) of the kept patches of an image (C, H, W) that enter the first block."""
    prefix = model.num_prefix_tokens
    x = model._pos_embed(model.patch_embed(image[None]))
    return model.norm_pre(torch.cat((x[:, :prefix], x[:, prefix:][:, keep]), dim=1))


def attention_of(attn: nn.Module, x: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """timm's Attention of (1, N, C) from its formula, with the logarithm of sizes (N,) added to the scores of the keys:
    the output, the softmax (H, N, N), the heads' outputs and the keys (H, N, D)."""
    q, k, v = attn.qkv(x)[0].unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scores = q @ k.mT * attn.head_dim**-0.5
    softmax = (scores if sizes is None else scores + sizes.log()).softmax(-1)
    heads = softmax @ v
    return attn.proj(attn.norm(heads.transpose(0, 1).flatten(1)[None])), softmax, heads, k


def assert_as_by_image(fast, images, keep, by_image) -> None:
    """Compare logits, importance and the gradient of images with `by_image`(image, its patches), which returns logits
    (1, classes) and importance (K,)."""
    logits, importance = fast(images, keep=keep, return_attention=True)
    expected = [by_image(image, row) for image, row in zip(images, rows_of(keep), strict=True)]
    torch.testing.assert_close(importance.flatten().double(), torch.cat([e[1] for e in expected]), rtol=1e-5, atol=1e-7)
    expected = torch.cat([e[0] for e in expected])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(logits)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), images)[0] for y in (logits, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
