"""quantize(): quantise a model with ranges that come from inverted images, whole images or packed patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.data.sparse import InvertedDataset, normalize_patches
from smi_fast.packed import PackedTokens
from smi_fast.quantization.vit import QuantizedViT

CALIBRATION_BATCH = 32  # images at a time; the ranges do not depend on it


def quantize(
    model: VisionTransformer,
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable,
    weight_bits: int = 8,
    activation_bits: int = 8,
) -> QuantizedViT:
    """Quantise a trained timm ViT or DeiT, without training it further.

    Args:
        model: a plain VisionTransformer with a class token, a learned position embedding, LayerNorm, one linear head,
            and in its blocks timm's Attention and its Mlp with GELU. It is copied and stays as it is.
        calibration: an InvertedDataset, whose kept patches are normalised with the model's mean and std; or a batch, or
            an iterable of batches, that are normalised already. A batch is PackedTokens with values (T, C * ph * pw),
            images (B, C, H, W), or a tuple that begins with one of the two, as a DataLoader yields it.
        weight_bits, activation_bits: the widths of the integers, 2 to 8.

    Raises:
        UnsupportedModelError: the model has a part that the scheme does not cover. The message names it.
        ValueError: bits are out of range, there is no image to calibrate on, an image does not fit the model, or an
            activation is not finite.
        TypeError: a batch is none of the above.
    """
    quantized = QuantizedViT(model, weight_bits, activation_bits)
    images = 0
    for batch in _batches(calibration, quantized):
        images += batch.batch_size
        # Images of different lengths go one by one, so that no padding is observed.
        for group in batch.groups(CALIBRATION_BATCH if batch.is_uniform else 1) if batch.batch_size else ():
            quantized.forward_patches(group)
    if not images:
        raise ValueError("the calibration set is empty: ranges are observed on at least one image")
    quantized.freeze()
    return quantized


def _batches(
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable, model: QuantizedViT
) -> Iterator[PackedTokens]:
    """Yield the calibration set as batches of normalised patches, on the model's device."""
    device = model.class_token.device
    if isinstance(calibration, InvertedDataset):
        calibration = _dataset_batches(calibration, model)
    elif isinstance(calibration, (Tensor, PackedTokens)):
        calibration = [calibration]
    for batch in calibration:
        data = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(data, Tensor):
            data = model.patches(data.to(device))
        if not isinstance(data, PackedTokens):
            raise TypeError(f"a calibration batch must hold images or PackedTokens, not {type(data).__name__}")
        yield data.to(device)


def _dataset_batches(dataset: InvertedDataset, model: QuantizedViT) -> Iterator[PackedTokens]:
    """Yield the kept patches of a dataset, normalised as the model wants them."""
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    dataset.check_normalization(mean, std)
    image_size, patch_size = (model.num_channels, *model.grid.image_size), model.grid.patch_size
    if dataset.image_size != image_size or dataset.patch_size != patch_size:
        raise ValueError(
            f"the calibration set has images of {dataset.image_size} in patches of {dataset.patch_size}, the model "
            f"takes {image_size} in {patch_size}"
        )
    for start in range(0, len(dataset), CALIBRATION_BATCH):
        indices = range(start, min(start + CALIBRATION_BATCH, len(dataset)))
        patches, _ = InvertedDataset.collate([dataset[i] for i in indices])
        yield normalize_patches(patches, mean, std)
