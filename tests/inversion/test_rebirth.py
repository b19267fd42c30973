"""Patch Rebirth Inversion: one run makes several disjoint sparse images of each target."""

from itertools import pairwise

import pytest
import torch
from inversion_cases import grid_mask, small_model

from smi_fast import InvertedDataset, Inverter, Mass, RebirthSchedule, StoppingSchedule, deep_inversion
from smi_fast.inversion.schedule import Release

OPTIONS = {"iterations": 10, "lr": 0.05, "jitter": 1 / 2, "objective": deep_inversion(1e-2), "progress": False}


@pytest.fixture
def model(seed):
    return small_model()


def test_the_paper_releases_equal_parts_at_equal_distances():
    assert RebirthSchedule(4).stopping(4000).patches(196) == {1000: 147, 2000: 98, 3000: 49}
    assert list(RebirthSchedule(7).stopping(4000).stops) == [571 * k for k in range(1, 7)]
    assert RebirthSchedule(7).stopping(4000).images_per_target == 7
    assert StoppingSchedule.parse("rebirth=4", 4000) == RebirthSchedule(4).stopping(4000)


@pytest.mark.parametrize(("patches", "releases"), [(16, 3), (196, 7), (10, 4), (5, 5)])
def test_parts_differ_by_at_most_one_patch(patches, releases):
    left = [patches, *RebirthSchedule(releases).stopping(100).patches(patches).values(), 0]
    parts = [before - after for before, after in pairwise(left)]
    assert max(parts) - min(parts) <= 1
    assert len(parts) == releases


@pytest.mark.parametrize("stopping", [RebirthSchedule(3), {3: Mass(0.8), 5: Release(2)}], ids=["uniform", "ragged"])
def test_the_most_attended_patches_leave_as_they_are(model, seed, stopping):
    targets, states = [4, 0], []
    result = Inverter(model, stopping=stopping, **OPTIONS).run(
        targets, seed, lambda step: states.append(step.state_dict())
    )
    stops = [3, 6] if isinstance(stopping, RebirthSchedule) else [5]
    assert result.targets.tolist() == targets * (len(stops) + 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    for number, stop in enumerate(stops):
        before = states[stop - 1]
        starts = before["cu_seqlens"].tolist()
        for image in range(2):
            rows = slice(starts[image], starts[image + 1])
            positions, importance = before["positions"][rows], before["importance"][rows]
            count = len(positions) // (3 - number if len(stops) == 2 else 2)
            order = sorted(range(len(positions)), key=lambda i: (-importance[i].item(), i))
            found = number * 2 + image
            assert result.keep[found].tolist() == sorted(positions[order[:count]].tolist())
            pixels = (before["images"][image] * std + mean).clamp(0, 1)
            expected = torch.where(grid_mask([result.keep[found]])[0], pixels, 0.0)
            assert torch.equal(result.images[found], expected)
    for image in range(2):
        parts = torch.cat([result.keep[image + 2 * part] for part in range(len(stops) + 1)])
        assert len(parts.unique()) == len(parts)
        assert isinstance(stopping, dict) or len(parts) == 16


def test_released_images_are_samples_of_a_dataset(model, seed, tmp_path):
    inverter = Inverter(model, stopping=RebirthSchedule(4), **OPTIONS)
    result = inverter.run([4, 0, 2], seed)
    record = {"mean": inverter.mean, "std": inverter.std}
    dataset = InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, record)
    dataset.save(tmp_path / "images.safetensors")
    loaded = InvertedDataset.load(tmp_path)
    assert len(loaded) == 12
    assert [int(loaded[number][-1]) for number in range(12)] == [4, 0, 2] * 4


@pytest.mark.parametrize(
    ("stopping", "error", "message"),
    [
        (RebirthSchedule(17), ValueError, "16 patches cannot be released in 17 parts|17 images cannot be released"),
        (RebirthSchedule(11), ValueError, "11 images cannot be released in 10 iterations"),
        ({1: 0.9, 3: Release(4)}, ValueError, "1 patches cannot be released in 4 parts"),
    ],
)
def test_more_releases_than_patches_are_refused(model, stopping, error, message):
    with pytest.raises(error, match=message):
        Inverter(model, stopping=stopping, **OPTIONS)


@pytest.mark.parametrize(("parts", "error"), [(1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_number_of_parts_that_is_none_is_refused(parts, error):
    with pytest.raises(error, match=str(parts)):
        RebirthSchedule(parts)
