"""CifarResNet: the small residual networks for images of 32x32 pixels (He et al., CVPR 2016, Sec. 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)  # channels of the three stages


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut without parameters (option A): where a stage halves the
    resolution, the shortcut takes every second pixel, and the new channels are zero."""

    def __init__(self, in_chans: int, out_chans: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.stride, self.padding = stride, out_chans - in_chans

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, out_chans, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """A residual network for small images: a 3x3 convolution, three stages of 16, 32 and 64 channels, the mean over all
    places and a linear classifier.

    Args:
        depth: the number of weight layers, 6 n + 2 for n blocks in each stage, such as 8, 14 or 20.
        num_classes: the number of logits.
        in_chans: the number of channels of an image.

    Raises:
        ValueError: the depth is not 6 n + 2.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, such as 8, 14 or 20, got {depth}")
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        blocks, last = [], WIDTHS[0]
        for width in WIDTHS:
            for number in range(depth // 6):
                blocks.append(CifarBlock(last, width, 2 if number == 0 and width != WIDTHS[0] else 1))
                last = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to feature maps (B, 64, H / 4, W / 4)."""
        return self.blocks(F.relu(self.bn1(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map feature maps to the features (B, 64) before the classifier, or to logits (B, num_classes)."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
