"""CNN: a convolutional network as a backbone, whose grid has one patch for each image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.backends import cudnn

from smi_fast import kernels
from smi_fast.backbones.base import Outputs, autocast_to, check_dtype, compute_dtype, frozen
from smi_fast.backbones.batch_norm import batch_norm_statistics
from smi_fast.backbones.support import UnsupportedModelError
from smi_fast.grid import PatchGrid
from smi_fast.packed import PackedTokens

BATCH_NORM = "batch_norm"  # the feature that stands for the statistics of all BatchNorm layers


class CNN(nn.Module):
    """A model of whole images as a `Backbone`: an image is one patch, jittered and mirrored as a view shows it.

    It shares the model's weights and calls the model as it is, with its hooks. `Inverter` wraps timm's, torchvision's
    and other CNNs with BatchNorm2d by itself. A model without BatchNorm2d can be wrapped too, and has no statistics.

    The model's image size, mean, std and number of channels are those of its timm data config. A model without one,
    such as torchvision's, has ImageNet's mean and std, 224x224 pixels, and the channels of its first convolution.

    Args:
        model: maps normalised images (B, C, H, W) to logits (B, num_classes).
        dtype: the dtype of the convolutions, as `accelerate` takes it. The model runs in it by autocast.
        backend: the backend of the kernels around the model: "auto", "triton" or "torch".
        image_size: (H, W) in pixels. None: the model's. The model takes images of other sizes in the same proportions.
        channels_last: whether images are laid out as (B, H, W, C). None: on a CPU, where six CNNs were 0.96 to 1.73
            times as fast so, and on a GPU in bfloat16 or float16, as torch recommends it.

    Raises:
        ValueError: the backend is unknown, or the weights do not allow the dtype.
        UnsupportedModelError: the model has no weights, or does not map an image to logits. One image is tried.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        *,
        image_size: Sequence[int] | None = None,
        channels_last: bool | None = None,
    ):
        super().__init__()
        self.model, self._dtype, self.backend, self._channels_last = model, dtype, backend, channels_last
        if next(model.parameters(), None) is None:
            raise UnsupportedModelError(f"the model is a {type(model).__name__} without weights")
        check_dtype(self._parameter, dtype)
        kernels.resolve_backend(backend, self.device)
        config = resolve_data_config(model=model)
        convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
        first = next(convolutions, None)
        self.num_channels: int = config["input_size"][0] if first is None else first.in_channels
        self.image_size: tuple[int, int] = tuple(image_size or config["input_size"][1:])
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.num_classes: int = self._count_classes(self.image_size)
        self._sizes = {self.image_size}  # of which an image has been tried

    def _count_classes(self, image_size: tuple[int, int]) -> int:
        shape = (1, self.num_channels, *image_size)
        try:
            with frozen(self), torch.no_grad():
                logits = self(torch.zeros(shape, dtype=self._parameter.dtype, device=self.device))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(f"the model cannot run on an image of shape {shape}: {reason}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModelError(f"the model maps an image of shape {shape} to {found}, expected (1, classes)")
        return logits.shape[1]

    @property
    def pretrained_cfg(self) -> Mapping:
        """timm's description of the model and its data, empty for a model without one."""
        return getattr(self.model, "pretrained_cfg", None) or {}

    @property
    def _parameter(self) -> nn.Parameter:
        return next(self.model.parameters())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._parameter.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the convolutions on the device where the weights are now."""
        return compute_dtype(self._parameter, self._dtype)

    @property
    def patch_dtype(self) -> torch.dtype:
        """The dtype of the images, that of the weights: autocast rounds them where a layer wants it, and priors do not
        see rounded images."""
        return self._parameter.dtype

    @property
    def channels_last(self) -> bool:
        """Whether images are laid out as (B, H, W, C) on the device where the weights are now."""
        if self._channels_last is not None:
            return self._channels_last
        return self.device.type == "cpu" or self.compute_dtype in (torch.bfloat16, torch.float16)

    def grid(self, image_size: Sequence[int]) -> PatchGrid:
        """Return the grid of images of (H, W) pixels, which has one patch.

        Raises:
            ValueError: the proportions are not those of `self.image_size`.
            UnsupportedModelError: the model cannot run on an image of this size. One is tried for each new size.
        """
        (height, width), own = image_size, self.image_size
        if min(height, width) < 1 or height * own[1] != width * own[0]:
            raise ValueError(
                f"images have {height}x{width} pixels, which are not the proportions of {own[0]}x{own[1]}: "
                f"CNN(model, image_size=({height}, {width})) takes them"
            )
        if (height, width) not in self._sizes:
            self._count_classes((height, width))
            self._sizes.add((height, width))
        return PatchGrid.of(image_size, image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, C, H, W) of any floating dtype to the model's logits (B, num_classes)."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        images = images.to(self.patch_dtype, memory_format=layout)
        with autocast_to(self._parameter, self._dtype):
            return self.model(images)

    def outputs(
        self,
        patches: PackedTokens,
        *,
        grid_size: tuple[int, int] | None = None,
        importance: bool = False,
        features: Sequence[str] = (),
    ) -> Outputs:
        """Run the model on images, given as one patch each: values (B, C * H * W).

        With the feature "batch_norm" the outputs hold the statistics of the BatchNorm layers that the forward pass
        reaches, in the order of `model.modules()`; see `batch_norm_statistics`.

        Raises:
            ValueError: the patches are no whole images, or another feature is asked for.
            UnsupportedModelError: importance is asked for, which a CNN has none of; or see `batch_norm_statistics`.
        """
        unknown = [name for name in features if name != BATCH_NORM]
        if unknown:
            raise ValueError(f"there is no feature {unknown[0]!r}: a CNN has {BATCH_NORM}")
        if importance:
            raise UnsupportedModelError("a CNN has one patch for each image, and no attention that measures it")
        images = self._images(patches)
        if not features:
            return Outputs(self(images), backend=self.backend)
        differentiable = images.requires_grad and torch.is_grad_enabled()
        with batch_norm_statistics(self.model, differentiable=differentiable) as found:
            logits = self(images)
        order = [name for name, _ in self.model.named_modules() if name in found]
        return Outputs(logits, backend=self.backend, batch_norm=tuple(found[name] for name in order))

    def _images(self, patches: PackedTokens) -> Tensor:
        """Return the patches as images (B, C, H, W), in the proportions of `self.image_size`."""
        values, (height, width) = patches.values, self.image_size
        scale = math.sqrt(values.shape[1] / (self.num_channels * height * width))
        shape = (self.num_channels, round(scale * height), round(scale * width))
        if len(values) != patches.batch_size or values.shape[1] != math.prod(shape):
            raise ValueError(
                f"{len(values)} patches of {values.shape[1]} values are not {patches.batch_size} images of "
                f"{self.num_channels} channels in the proportions of {height}x{width} pixels"
            )
        return values.view(-1, *shape)

    @contextmanager
    def cast_weights(self, *, pack: bool = True) -> Iterator[None]:
        """Return a context for many iterations. On a GPU, cuDNN then takes the same algorithms in every run, and
        computes float32 without TF32. Weights are not copied: that they are cast in every forward pass costs little
        beside the convolutions."""
        exact = (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
        with ExitStack() as before:
            for place, name, value in ((cudnn, "deterministic", True), (cudnn, "benchmark", False), exact):
                before.callback(setattr, place, name, getattr(place, name))
                setattr(place, name, value)
            yield
