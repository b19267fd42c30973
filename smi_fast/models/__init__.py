"""The models inside: a small ViT trained on CIFAR-10, and a student that does not know its classes, so that everything
runs without a download.

`README.md` beside this file holds their model cards; `examples/train_cifar10.py` and `examples/pretrain_student.py` are
the recipes.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

MODEL_DIR = Path(__file__).parent
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10_vit(pretrained: bool = True, **overrides) -> VisionTransformer:
    """A timm VisionTransformer for CIFAR-10: 32x32 pixels, 8x8 patches of 4x4, width 192, 6 blocks, 3 heads, 2.7 M
    parameters, in evaluation mode.

    Args:
        pretrained: load the weights of this package (stored as float16, returned as float32).
        overrides: further arguments of timm's VisionTransformer, such as `patch_drop_rate`.
    """
    return _vit("cifar10_vit", pretrained, overrides)


def cifar10_student(pretrained: bool = True, **overrides) -> VisionTransformer:
    """A student for `cifar10_vit`, of the same architecture, in evaluation mode: it was trained on the same images
    without their labels, and its head is zero. Arguments are those of `cifar10_vit`."""
    return _vit("cifar10_student", pretrained, overrides)


def _vit(name: str, pretrained: bool, overrides: dict) -> VisionTransformer:
    arguments = dict(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10) | overrides
    model = VisionTransformer(**arguments)
    model.pretrained_cfg = model.default_cfg = {
        "architecture": name, "input_size": (3, 32, 32), "num_classes": 10,
        "mean": CIFAR10_MEAN, "std": CIFAR10_STD, "interpolation": "bicubic", "crop_pct": 1.0,
        "label_names": CIFAR10_CLASSES,
    }  # fmt: skip
    if pretrained:
        model.load_state_dict(load_file(str(MODEL_DIR / f"{name}.safetensors")))
    return model.eval()
