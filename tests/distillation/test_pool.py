"""The pool: what is computed once equals timm's own forward pass, and images are drawn in complete passes."""

import copy

import pytest
import torch
from distillation_cases import GRID, SIZE, make_dataset, timm_logits, tiny, tiny_cnn
from timm.models.deit import VisionTransformerDistilled

from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip
from smi_fast.distillation.pool import Pool, Reader
from smi_fast.distillation.rounds import distill


def test_both_views_are_read_as_timm_reads_images(seed):
    """Logits and features of the pool, plain and mirrored, against mirrored pixels at mirrored positions."""
    teacher, student, dataset = tiny(), tiny(mean=0.3), make_dataset(ragged=True)
    mirror = RandomHorizontalFlip(dataset.image_size, dataset.patch_size, p=1)
    pool = Pool(Reader(teacher, (SIZE, SIZE)), Reader(student, (SIZE, SIZE)), mirror, True, batch_size=5)
    pool.add(dataset)
    cells = torch.arange(GRID**2).view(GRID, GRID)
    for number in range(len(dataset)):
        plain, kept = dataset.images([number]), dataset[number][1].long()
        for view, (image, keep) in enumerate([(plain, kept), (plain.flip(-1), cells.flip(1).flatten()[kept])]):
            with torch.no_grad():
                expected = timm_logits(teacher, image, keep), timm_logits(student, image, keep)
            found = pool.logits[view, [number]], pool.student_logits(torch.tensor([number]), torch.tensor([view]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [4, SIZE])
def test_a_cnn_reads_both_views_of_whole_images(patch, seed):
    """However the images are cut: in the patches of a ViT, or not at all."""
    teacher, student, images = tiny_cnn(), tiny_cnn(mean=0.3), torch.rand(7, 3, SIZE, SIZE)
    dataset = InvertedDataset.from_images(images, None, torch.zeros(7).long(), (patch, patch))
    readers = (Reader(model, (SIZE, SIZE), (patch, patch)) for model in (teacher, student))
    mirror = RandomHorizontalFlip(dataset.image_size, dataset.patch_size, p=1)
    pool = Pool(*readers, mirror, False, batch_size=4)
    pool.add(dataset)
    for view, expected in enumerate((images, images.flip(-1))):
        torch.testing.assert_close(pool.logits[view], teacher((expected - 0.5) / 0.5), rtol=1e-5, atol=1e-5)
        found = pool.student_logits(torch.arange(7), torch.full((7,), view))
        torch.testing.assert_close(found, student((expected - 0.3) / 0.5), rtol=1e-5, atol=1e-5)


def test_passes_are_shuffled_and_complete(seed):
    model = tiny()
    pool = Pool(Reader(model, (SIZE, SIZE)), Reader(model, (SIZE, SIZE)), lambda sample: sample, True, batch_size=5)
    pool.add(make_dataset(n=12))
    draws = list(pool.draw(7, torch.Generator().manual_seed(seed)))
    assert [len(index) for index, _ in draws] == [5] * 7
    index, view = (torch.cat(parts) for parts in zip(*draws, strict=True))
    assert sorted(index[:12].tolist()) == sorted(index[12:24].tolist()) == list(range(12))
    assert index[:12].tolist() != index[12:24].tolist()
    assert set(view.tolist()) == {0, 1}


def test_a_distilled_student_is_probed_at_both_heads(seed):
    student, dataset = tiny(VisionTransformerDistilled), make_dataset()
    reader, tokens = Reader(student, (SIZE, SIZE)), InvertedDataset.collate([dataset[i] for i in range(12)])[0]
    reader.fast.eval()
    found = reader.logits(reader.features(lambda: reader(tokens)))
    images = list(zip(dataset.images().split(1), [dataset[i][1] for i in range(12)], strict=True))
    torch.testing.assert_close(
        found, torch.cat([timm_logits(student, *image) for image in images]), rtol=1e-4, atol=1e-4
    )
    before = copy.deepcopy(student.state_dict())
    distill(tiny(), student, dataset=dataset, rounds=1, steps=2, progress=False)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
