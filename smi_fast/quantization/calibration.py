"""quantize(): quantise a model with ranges that come from inverted images, whole images or packed patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from smi_fast.data.sparse import InvertedDataset, normalize_patches
from smi_fast.packed import PackedTokens
from smi_fast.quantization.vit import QuantizedViT

CALIBRATION_BATCH = 32  # images at a time; the ranges do not depend on it


def quantize(
    model: nn.Module,
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable,
    weight_bits: int = 8,
    activation_bits: int = 8,
    callback: Callable[[dict[str, Any]], None] | None = None,
    state: Mapping[str, Any] | None = None,
) -> QuantizedViT:
    """Quantise a trained timm ViT or DeiT, without training it further.

    Args:
        model: a model that `accelerate` takes, whose parts are all timm's own. It is copied and stays as it is.
        calibration: an InvertedDataset, whose kept patches are normalised with the model's mean and std; or a batch, or
            an iterable of batches, that are normalised already. A batch is PackedTokens with values (T, C * ph * pw),
            images (B, C, H, W), or a tuple that begins with one of the two, as a DataLoader yields it.
        weight_bits, activation_bits: the widths of the integers, 2 to 8.
        callback: called after every batch with what was observed so far: a dict of texts, numbers and lists.
        state: what the callback was called with in a call with the same model and calibration set. The calibration goes
            on from there, and gives the same bits as one that was not interrupted.

    Raises:
        UnsupportedModelError: the model has a part that the scheme does not cover. The message names it.
        ValueError: bits are out of range, there is no image to calibrate on, an image does not fit the model, or an
            activation is not finite, or the state is of another model.
        TypeError: a batch is none of the above.
    """
    quantized = QuantizedViT(model, weight_bits, activation_bits)
    done, number = _restore(quantized, state), 0
    for number, group in enumerate(_groups(calibration, quantized), 1):
        if number > done:
            quantized.forward_patches(group)
            if callback is not None:
                callback({"batches": number, "ranges": quantized.ranges})
    if not number:
        raise ValueError("the calibration set is empty: ranges are observed on at least one image")
    quantized.freeze()
    return quantized


def _restore(model: QuantizedViT, state: Mapping[str, Any] | None) -> int:
    """Give the places the ranges of a state, and return the number of batches that have been observed."""
    if state is None:
        return 0
    places = model.quantizers
    if state["ranges"].keys() != places.keys():
        raise ValueError("the state of the calibration is of another model: it has other places of quantisation")
    for name, place in places.items():
        place.low, place.high = state["ranges"][name]
    return state["batches"]


def _groups(
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable, model: QuantizedViT
) -> Iterator[PackedTokens]:
    """Yield the calibration set in groups that are observed at once."""
    for batch in _batches(calibration, model):
        if batch.batch_size:
            # Images of different lengths go one by one, so that no padding is observed.
            yield from batch.groups(CALIBRATION_BATCH if batch.is_uniform else 1)


def _batches(
    calibration: InvertedDataset | Tensor | PackedTokens | Iterable, model: QuantizedViT
) -> Iterator[PackedTokens]:
    """Yield the calibration set as batches of normalised patches, on the model's device."""
    device = model.pos_embed.device
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
