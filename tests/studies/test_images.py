"""Real images are left with the patches that get the most attention, and pixels survive the way into a dataset."""

import torch

from smi_fast import InvertedDataset, accelerate
from smi_fast.studies import images as images_of_a_comparison
from smi_fast.studies.images import most_attended, noise, real_images, save_rows, whole_images


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


def test_the_columns_of_a_picture_are_the_classes_that_all_its_rows_have(tmp_path, monkeypatch):
    def dataset(targets: list[int]) -> InvertedDataset:
        """Images of which each has its number as its brightness."""
        images = torch.arange(len(targets)).div(10).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        return InvertedDataset.from_images(images, None, torch.tensor(targets), (4, 4))

    drawn = []
    monkeypatch.setattr(images_of_a_comparison, "save_grid", lambda *arguments: drawn.extend(arguments))
    sets = {"dense": dataset([2, 0, 1, 2]), "rebirth": dataset([1, 1, 2, 2])}
    save_rows(tmp_path / "rows.png", sets, ["cat", "dog", "owl"])
    images, _, columns, rows, titles = drawn
    assert (columns, rows, titles) == (2, ["dense", "rebirth"], ["owl", "dog"])
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.0, 0.2, 0.2, 0.0]))
