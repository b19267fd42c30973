"""What the tests of distillation share: small models and datasets, and timm's own logits of kept patches."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

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


def tiny_cnn(mean=0.5, std=0.5, width=8, size=(SIZE, SIZE), classes=CLASSES) -> torch.nn.Module:
    """A CNN of random weights and BatchNorm statistics, float32, whose normalisation is given."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, classes),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else 2 / parameter[0].numel() ** 0.5)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data += 1
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    mean, std = (tuple(v) if isinstance(v, tuple) else (v,) * 3 for v in (mean, std))
    model.pretrained_cfg = {"input_size": (3, *size), "mean": mean, "std": std}
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
