"""Real images are left with the patches that get the most attention, and pixels survive the way into a dataset."""

import torch

from smi_fast import accelerate
from smi_fast.studies.images import most_attended, noise, real_images, whole_images


def test_the_most_attended_patches_are_left(run, models):
    whole = real_images(run, 6, seed=1)
    part = most_attended(run, whole, 5)
    mean, std = (torch.tensor(models[0].pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    _, attention = accelerate(models[0])((whole.images() - mean) / std, return_attention=True)
    for number, image in enumerate(part.images()):
        kept = part[number][1].long()
        dropped = torch.tensor([cell for cell in range(16) if cell not in kept])
        assert len(kept) == 5
        assert attention[number, kept].min() >= attention[number, dropped].max()
        seen = torch.zeros(16).index_fill(0, kept, 1).view(1, 4, 1, 4, 1).expand(3, 4, 4, 4, 4).reshape(3, 16, 16)
        assert torch.equal(image, whole.images([number])[0] * seen)
    assert torch.equal(part.targets, whole.targets)


def test_whole_images_are_denormalised_and_clamped(run, models):
    images = noise(run, 3, seed=2)
    mean, std = (torch.tensor(models[0].pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    dataset = whole_images(run, images, torch.zeros(3).long())
    torch.testing.assert_close(dataset.images(), (images * std + mean).clamp(0, 1))
    assert not torch.equal(images, noise(run, 3, seed=3))
