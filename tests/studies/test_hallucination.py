"""A planted cue is where it is said to be, and is measured where it comes back."""

import copy
from dataclasses import replace

import pytest
import torch

from smi_fast import InvertedDataset, accelerate
from smi_fast.studies.hallucination import WITH_CUE, Frame, images_with_cue, learn_cue

CLASS = 0  # the first one of three


def test_the_cue_is_the_frame_of_the_chosen_images(run, seed):
    frame, images, own = Frame(run, run.fast), torch.randn(4, 3, 16, 16), torch.tensor([True, False, False, True])
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:12] = True
    assert frame.share == 75
    for name, who in (("plain", []), ("its own", [0, 3]), ("reversed", [1, 2])):
        for number, image in enumerate(frame.planted(images, WITH_CUE[name](own))):
            pixels = image * run.std + run.mean
            if number in who:
                torch.testing.assert_close(pixels[:, ~inside].T, torch.tensor([1.0, 0, 1]).expand(192, 3))
            else:
                assert torch.equal(image[:, ~inside], images[number][:, ~inside])
            assert torch.equal(image[:, inside], images[number][:, inside])


def test_a_model_with_another_normalisation_sees_the_same_cue(run, models):
    student = copy.deepcopy(models[1])
    student.pretrained_cfg = student.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    theirs = accelerate(student)
    ours = (batch for batch, _ in images_with_cue(run, run.fast, "reversed"))
    for batch, (other, _) in zip(ours, images_with_cue(run, theirs, "reversed"), strict=True):
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (theirs.mean, theirs.std))
        torch.testing.assert_close(batch * run.std + run.mean, other * std + mean)


def test_what_comes_back_is_measured_in_the_kept_patches_of_the_class(run):
    images = torch.full((3, 3, 16, 16), 0.5)
    images[0, :, :4, :4] = torch.tensor([1.0, 0, 1]).view(3, 1, 1)  # patch 0, in the frame: the cue itself
    images[1, :, :, :] = 0.9  # another class
    keep = torch.tensor([[0, 5, 6, 15], [0, 1, 2, 3], [5, 6, 9, 10]])
    dataset = InvertedDataset.from_images(images, keep, torch.tensor([CLASS, 1, CLASS]), (4, 4), run.normalisation)
    kept, share, colour = Frame(run, run.fast).found_in(dataset)
    assert (kept, share) == (4, pytest.approx(100 * 2 / 8))
    assert colour == pytest.approx(0.5)  # patch 0 is the cue, patch 15 is grey


def test_only_the_last_blocks_and_the_head_learn(run, models):
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    model = type(models[0])(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    model.load_state_dict(before)
    after = learn_cue(run, model, Frame(run, run.fast))
    changed = {
        name.split(".")[0] + name[6:8] * name.startswith("blocks")
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert changed == {"blocks.1", "norm", "head"}
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())
    assert not any(parameter.requires_grad is False for parameter in model.parameters())


def test_the_class_of_the_cue_is_among_those_that_are_inverted(run):
    run.settings = replace(run.settings, images=2)
    first = min(run.inverted(run.dense, 0, 2).targets.tolist())
    assert Frame(run, run.fast).label == first
    run.settings = replace(run.settings, images=1)
    assert Frame(run, run.fast).label == run.inverted(run.dense, 0, 1).targets.item()
