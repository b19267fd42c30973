"""quantize(): what a calibration set may be, and which ranges it gives."""

import json

import pytest
import torch

from smi_fast.data.sparse import InvertedDataset
from smi_fast.models import CIFAR10_MEAN, CIFAR10_STD, cifar10_vit
from smi_fast.packed import PackedTokens, pack_keep
from smi_fast.quantization import QuantizedViT, quantize


def test_more_bits_come_nearer_to_float(seed):
    model, images = cifar10_vit(), torch.randn(16, 3, 32, 32)
    expected = model(images)
    errors = [(quantize(model, images, bits, bits)(images) - expected).norm() / expected.norm() for bits in (4, 6, 8)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.1


def test_inverted_dataset_is_normalised_and_fed_sparse(model, random_keep):
    images, keep = torch.rand(40, 3, 32, 32), random_keep(40, ragged=True)
    dataset = InvertedDataset.from_images(
        images, keep, torch.zeros(40).long(), (8, 8), {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    model = model.float()
    probe = QuantizedViT(model)
    black = ~torch.stack([torch.zeros(16).index_fill(0, cells, 1).bool() for cells in keep])
    rubbish = black.view(40, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3) * 1e3  # where nothing is kept
    batch = probe.patches((images - mean) / std + rubbish, keep)
    ranges = quantize(model, dataset).ranges
    for place, observed in quantize(model, batch).ranges.items():
        assert ranges[place] == pytest.approx(observed, rel=1e-4, abs=1e-5), place


def test_all_forms_of_images_calibrate_alike(model, images):
    expected = quantize(model, images).ranges
    everything = pack_keep(None, 5, 16, images.device)
    for form in ([images], [(images, torch.zeros(5))], QuantizedViT(model).patches(images, everything)):
        assert quantize(model, form).ranges == expected
    halves = quantize(model, iter([images[:1], images[1:]])).ranges
    for place, observed in halves.items():
        assert observed == pytest.approx(expected[place], rel=1e-9), place


def test_a_calibration_goes_on_from_every_batch_with_the_same_bits(model, images):
    states = []
    expected = quantize(model, images.split(1), callback=states.append)
    assert [state["batches"] for state in states] == [1, 2, 3, 4, 5]
    for state in json.loads(json.dumps(states)):
        later = []
        found = quantize(model, images.split(1), callback=later.append, state=state)
        assert found.ranges == expected.ranges
        assert torch.equal(found(images), expected(images))
        assert later == states[state["batches"] :]
    with pytest.raises(ValueError, match="the state of the calibration is of another model"):
        quantize(cifar10_vit(pretrained=False, depth=1), torch.randn(1, 3, 32, 32), state=states[0])


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, True, None, "8"])
def test_bits_out_of_range(model, images, name, bits):
    with pytest.raises(ValueError, match=f"{name} must be an integer from 2 to 8, got {bits!r}"):
        quantize(model, images, **{name: bits})


def test_empty_or_unfitting_calibration_set(model, images):
    for empty in ([], iter([]), images[:0]):
        with pytest.raises(ValueError, match="the calibration set is empty"):
            quantize(model, empty)
    with pytest.raises(TypeError, match="must hold images or PackedTokens, not str"):
        quantize(model, ["images"])
    with pytest.raises(ValueError, match=r"images are \(5, 3, 16, 32\)"):
        quantize(model, images[:, :, :16])
    with pytest.raises(ValueError, match="patches have 7 values each, the model's have 192"):
        quantize(model, PackedTokens.from_batch(torch.zeros(1, 2, 7), torch.arange(2)))
    with pytest.raises(ValueError, match=r"activations from (nan|.* to nan)"):
        quantize(model, images.index_fill(0, torch.tensor(3), torch.nan))

    def dataset(**options) -> InvertedDataset:
        options = dict(size=32, patch=8, metadata={}) | options
        keep = torch.zeros(1, 1).long()
        blank = torch.zeros(1, 3, options["size"], options["size"])
        return InvertedDataset.from_images(blank, keep, keep[:, 0], (options["patch"],) * 2, options["metadata"])

    quantize(model, dataset())
    for options, message in (
        (dict(size=64), r"images of \(3, 64, 64\) .* the model takes \(3, 32, 32\)"),
        (dict(patch=4), r"patches of \(4, 4\), the model takes .* in \(8, 8\)"),
        (dict(metadata={"mean": [0.5] * 3}), r"mean.*0\.5, 0\.5, 0\.5.*0\.4914, 0\.4822, 0\.4465"),
        (dict(metadata={"std": [1] * 3}), r"std.*1, 1, 1.*0\.247, 0\.2435, 0\.2616"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, dataset(**options))
