"""The models that come with the package, all for CIFAR-10: a small ViT, a student that was trained without labels, and
a ResNet-20.

They let every command and example run without a download. `README.md` beside this file holds their model cards, and
`examples/train_cifar10.py` and `examples/pretrain_student.py` hold the recipes that trained them.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast.models.resnet import CifarResNet

MODEL_DIR = Path(__file__).parent
# The names by which `load_model` knows them.
MODEL_INSIDE, STUDENT_INSIDE, CNN_INSIDE = "cifar10_vit", "cifar10_student", "cifar10_resnet20"
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10_vit(pretrained: bool = True, **overrides) -> VisionTransformer:
    """A classifier of CIFAR-10 in evaluation mode: timm's VisionTransformer with 2.7 M parameters.

    Images have 32x32 pixels and 8x8 patches of 4x4 pixels; the model has width 192, 6 blocks and 3 heads.

    Args:
        pretrained: whether to load the weights that come with the package. They are stored as float16 and returned as
            float32.
        overrides: further arguments for timm's VisionTransformer, such as `patch_drop_rate`.
    """
    return _vit(MODEL_INSIDE, pretrained, overrides)


def cifar10_student(pretrained: bool = True, **overrides) -> VisionTransformer:
    """A student for `cifar10_vit`, with the same architecture and arguments, in evaluation mode.

    It was trained on the same images without their labels, and the weights of its head are zero.
    """
    return _vit(STUDENT_INSIDE, pretrained, overrides)


def cifar10_resnet20(pretrained: bool = True, **overrides) -> CifarResNet:
    """A classifier of CIFAR-10 in evaluation mode: a ResNet-20 with BatchNorm and 0.27 M parameters (He et al., 2016).

    Args:
        pretrained: whether to load the weights that come with the package. They are stored as float16 and returned as
            float32.
        overrides: further arguments for `CifarResNet`, such as `depth`.
    """
    return _loaded(CNN_INSIDE, CifarResNet(**{"depth": 20, "num_classes": 10} | overrides), pretrained)


def _vit(name: str, pretrained: bool, overrides: dict) -> VisionTransformer:
    arguments = dict(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10) | overrides
    return _loaded(name, VisionTransformer(**arguments), pretrained)


def _loaded(name: str, model: nn.Module, pretrained: bool) -> nn.Module:
    """Describe the model in the form of timm's configurations, and load its weights."""
    model.pretrained_cfg = model.default_cfg = {
        "architecture": name, "input_size": (3, 32, 32), "num_classes": 10,
        "mean": CIFAR10_MEAN, "std": CIFAR10_STD, "interpolation": "bicubic", "crop_pct": 1.0,
        "label_names": CIFAR10_CLASSES,
    }  # fmt: skip
    if pretrained:
        model.load_state_dict(load_file(str(MODEL_DIR / f"{name}.safetensors")))
    return model.eval()
