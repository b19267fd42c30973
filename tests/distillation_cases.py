"""What the tests of distillation share: small models and datasets, and timm's own logits of kept patches."""

import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast.data.sparse import InvertedDataset

SIZE, PATCH, GRID, CLASSES = 16, 4, 4, 5


def tiny(kind=VisionTransformer, mean=0.5, std=0.5, **overrides) -> torch.nn.Module:
    """A ViT of random weights with pronounced opinions, float32, whose normalisation is given."""
    arguments = (
        dict(img_size=SIZE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES) | overrides
    )
    model = kind(**arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else 1 / parameter.shape[-1] ** 0.5)
    model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": (mean,) * 3, "std": (std,) * 3}
    return model.eval()


def make_dataset(n=12, count=6, ragged=False, **kwargs) -> InvertedDataset:
    counts = torch.randint(1, GRID**2 + 1, (n,)).tolist() if ragged else [count] * n
    keep = [torch.randperm(GRID**2)[:c] for c in counts]
    return InvertedDataset.from_images(
        torch.rand(n, 3, SIZE, SIZE), keep, torch.arange(n) % CLASSES, (PATCH, PATCH), **kwargs
    )


def timm_logits(model, images, keep) -> torch.Tensor:
    """Logits of one image from its kept patches (K,), by timm's own modules; pixels in [0, 1]."""
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    x = model._pos_embed(model.patch_embed((images - mean) / std))
    prefix = model.num_prefix_tokens
    x = torch.cat((x[:, :prefix], x[:, prefix:][:, keep.long()]), 1)
    return model.forward_head(model.norm(model.blocks(model.norm_pre(x))))
