"""InvertedDataset in memory: samples, batches, order, flips and normalisation."""

import pickle

import numpy as np
import pytest
import torch
from dataset_cases import assert_identical, make, masked, ragged, sparse_images
from hypothesis import given, settings
from torch.utils.data import DataLoader, DistributedSampler

from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip, normalize_patches


@given(sparse_images())
@settings(deadline=None)
def test_images_are_black_where_patches_were_stopped(case):
    images, keep, targets, patch_size = case
    dataset = InvertedDataset.from_images(images, keep, targets, patch_size)
    assert torch.equal(dataset.images(), masked(images, keep, patch_size))
    assert torch.equal(dataset.images([-1, 0]), masked(images, keep, patch_size)[[-1, 0]])
    assert dataset.images([]).shape == (0, *images.shape[1:])


@given(sparse_images())
@settings(deadline=None)
def test_samples_hold_the_kept_patches_in_order(case):
    images, keep, targets, (ph, pw) = case
    dataset = InvertedDataset.from_images(images, keep, targets, (ph, pw))
    assert len(dataset) == len(images)
    patches_of_images = torch.nn.functional.unfold(images, (ph, pw), stride=(ph, pw)).mT  # (N, patches, C * ph * pw)
    for i in range(-len(images), len(images)):
        patches, positions, target = dataset[i]
        assert positions.dtype == torch.int32
        assert positions.tolist() == keep[i].tolist()
        assert torch.equal(patches, patches_of_images[i][keep[i]])
        assert type(target) is int
        assert target == targets[i]


@given(sparse_images())
@settings(deadline=None)
def test_collate_lays_samples_end_to_end(case):
    images, keep, targets, patch_size = case
    dataset = InvertedDataset.from_images(images, keep, targets, patch_size)
    loader = torch.utils.data.DataLoader(dataset, batch_size=len(dataset), collate_fn=InvertedDataset.collate)
    [(tokens, labels)] = loader
    assert torch.equal(tokens.values, dataset.patches)
    assert tokens.positions.tolist() == [index for row in keep for index in row.tolist()]
    assert tokens.cu_seqlens.tolist() == np.cumsum([0, *map(len, keep)]).tolist()
    assert tokens.cu_seqlens.dtype == tokens.positions.dtype == torch.int32
    assert tokens.max_seqlen == max(map(len, keep))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, targets)


def test_a_mask_equals_indices(seed):
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.rand(5, 3, 8, 8, generator=generator), torch.arange(5)
    mask = torch.rand(5, 16, generator=generator) < 0.5
    mask[:, 3] = True
    ragged = InvertedDataset.from_images(images, mask, targets, (2, 2))
    by_index = InvertedDataset.from_images(images, [row.nonzero().flatten() for row in mask], targets, (2, 2))
    assert_identical(ragged, by_index)
    assert [len(ragged[i][1]) for i in range(5)] == mask.sum(1).tolist()


@pytest.mark.parametrize("index", [3, -4, 10**9])
def test_an_index_out_of_range_is_refused(seed, index):
    dataset = make(seed)
    with pytest.raises(IndexError):
        dataset[index]
    with pytest.raises(IndexError):
        dataset.images([0, index])
    assert len(list(dataset)) == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_dataset_owns_its_memory(seed, dtype):
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    targets = torch.tensor([4, 7])
    keep = torch.tensor([[0], [3]], dtype=dtype)
    dataset = InvertedDataset.from_images(images, keep, targets, (2, 2))
    before = dataset.patches.clone()
    with torch.no_grad():
        images.zero_()
    targets.zero_()
    keep.zero_()
    assert dataset.targets.tolist() == [4, 7]
    assert dataset.positions.tolist() == [0, 3]
    assert torch.equal(dataset.patches, before)
    assert not dataset.patches.requires_grad


def test_metadata_is_as_json_gives_it_back(seed):
    dataset = make(seed, metadata={"mean": (0.5, 0.25), "stopping": {50: 0.3}})
    assert dataset.metadata == {"mean": [0.5, 0.25], "stopping": {"50": 0.3}}
    with pytest.raises(TypeError):
        make(seed, metadata={"model": torch.nn.Linear(1, 1)})


IMAGES = torch.full((2, 3, 8, 8), 0.5)
KEEP = torch.tensor([[0, 5], [15, 2]])
TARGETS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(images=IMAGES.double()), r"images must be .* not \(2, 3, 8, 8\) float64"),
        (dict(images=IMAGES[0]), r"images must be \(N, C, H, W\)"),
        (dict(images=IMAGES * 3), r"image 0 has kept pixels outside \[0, 1\]"),
        (dict(images=torch.stack([IMAGES[0], IMAGES[1] * torch.nan])), "image 1 has kept pixels outside"),
        (dict(patch_size=(3, 2)), "images of 8x8 pixels are not divided by patches of 3x2"),
        (dict(patch_size=(0, 2)), "patch_size must be 2 positive integers"),
        (dict(keep=KEEP[:1]), "keep"),
        (dict(keep=KEEP.float()), "keep.*float32"),
        (dict(keep=[KEEP[0], KEEP]), r"keep row 1.*\(2, 2\)"),
        (dict(keep=[KEEP[0], KEEP[0, :0]]), "keep.*row 1"),
        (dict(keep=torch.tensor([[0, 1], [2, 16]])), "keep row 1.*16"),
        (dict(keep=torch.tensor([[0, -1], [2, 3]])), "keep row 0.*-1"),
        (dict(keep=torch.tensor([[0, 1], [2, 2**32]])), "keep row 1.*4294967296"),
        (dict(keep=torch.tensor([[0, 1], [7, 7]])), "keep row 1.*7 twice"),
        (dict(keep=torch.ones(2, 15, dtype=torch.bool)), "keep.*15"),
        (dict(targets=TARGETS[:1]), r"targets must be \(2,\) int64, not \(1,\)"),
        (dict(targets=TARGETS.float()), r"targets must be \(2,\) int64, not \(2,\) float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(images=IMAGES, keep=KEEP, targets=TARGETS, patch_size=(2, 2)) | change
    with pytest.raises(ValueError, match=message):
        InvertedDataset.from_images(**arguments)


def test_samples_are_copies(seed, tmp_path):
    make(seed).save(tmp_path / "images.safetensors")
    for dataset in (make(seed), InvertedDataset.load(tmp_path)):
        patches, positions, _ = dataset[1]
        patches.zero_()
        positions.zero_()
        assert_identical(dataset, make(seed))
        dataset.verify()


def test_a_pickle_carries_patches_in_memory(seed):
    dataset = make(seed, metadata={"seed": seed})
    assert_identical(pickle.loads(pickle.dumps(dataset)), dataset)


@pytest.mark.parametrize(("context", "workers", "epochs"), [("fork", 2, 2), ("spawn", 1, 1)])  # to spawn is slow
def test_workers_give_the_same_batches(seed, tmp_path, context, workers, epochs):
    ragged(seed, n=11).save(tmp_path / "a.safetensors")
    ragged(seed + 1, n=6).save(tmp_path / "b.safetensors")
    dataset = InvertedDataset.load(tmp_path)

    def batches(seed, epochs, **workers):
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            dataset, batch_size=3, shuffle=True, generator=generator, collate_fn=InvertedDataset.collate, **workers
        )
        return [[(*vars(tokens).values(), targets) for tokens, targets in loader] for _ in range(epochs)]

    def same(a, b):
        return all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y))
            for left, right in zip(a, b, strict=True)
            for ours, theirs in zip(left, right, strict=True)
            for x, y in zip(ours, theirs, strict=True)
        )

    first, second = alone = batches(seed, 2)
    assert not same([first], [second])  # 17! orders
    assert not same(alone, batches(seed + 1, 2))
    assert same(alone[:epochs], batches(seed, epochs, num_workers=workers, multiprocessing_context=context))


def test_seed_and_epoch_give_the_order(seed):
    dataset = ragged(seed, n=50)

    def order(seed, epoch):
        sampler = DistributedSampler(dataset, 1, 0, seed=seed)
        sampler.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=8, sampler=sampler, collate_fn=dataset.collate)
        return torch.cat([targets for _, targets in loader]).tolist()

    assert order(seed, 3) == order(seed, 3)
    assert sorted(order(seed, 3)) == list(range(50))
    assert len({tuple(order(*key)) for key in ((seed, 3), (seed, 4), (seed + 2, 3))}) == 3


def test_batches_may_be_uniform_or_images(seed):
    dataset = make(seed, n=4)
    [(tokens, _)] = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate)
    [(patches, positions, targets)] = DataLoader(dataset, batch_size=4)  # torch's own collate stacks samples
    assert torch.equal(tokens.batch(), patches)
    assert torch.equal(tokens.positions.view(4, 5), positions)
    assert targets.tolist() == [0, 1, 2, 3]
    dataset = ragged(seed, n=5)
    [(images, targets)] = DataLoader(dataset, batch_size=5, collate_fn=dataset.collate_images)
    assert torch.equal(images, dataset.images())
    assert targets.tolist() == [0, 1, 2, 3, 4]


def test_another_normalisation_is_refused(seed):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    dataset = make(seed, metadata={"mean": mean, "std": std})
    dataset.check_normalization(mean, torch.tensor(std).tolist())  # rounded to float32
    make(seed).check_normalization(mean, std)
    with pytest.raises(ValueError, match=r"mean \[0\.4914, 0\.4822, 0\.4465\], this one has mean \[0\.5, 0\.5, 0\.5\]"):
        dataset.check_normalization([0.5] * 3, std)
    with pytest.raises(ValueError, match=r"std \[0\.247, 0\.2435, 0\.2616\], this one has std \[0\.247\]"):
        dataset.check_normalization(mean, std[:1])


def test_patches_are_normalised_like_images(seed):
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    dataset = ragged(seed, n=3)
    tokens, _ = dataset.collate([dataset[i] for i in range(3)])
    normalized = normalize_patches(tokens, mean.tolist(), std.tolist())
    images = (dataset.images() - mean[:, None, None]) / std[:, None, None]
    patches = torch.nn.functional.unfold(images, 2, stride=2).mT
    expected = [patches[i, dataset[i][1].long()] for i in range(3)]
    assert torch.equal(normalized.values, torch.cat(expected))
    assert normalized.positions is tokens.positions
    for wrong in (([0.5] * 5, [0.5] * 5), ([], []), ([0.5] * 2, [0.5] * 3)):
        with pytest.raises(ValueError, match=r"do not fit patches of 12 values"):
            normalize_patches(tokens, *wrong)


@given(case=sparse_images())
@settings(deadline=None)
def test_flipped_samples_are_mirrored_images(case):
    dataset = InvertedDataset.from_images(*case)
    images, plain = dataset.images(), dataset[0]
    dataset.transform = RandomHorizontalFlip(dataset.image_size, dataset.patch_size, p=1)
    flipped, _ = dataset.collate_images([dataset[i] for i in range(len(dataset))])
    assert torch.equal(flipped, images.flip(3))
    assert dataset[0][1].dtype == torch.int32
    assert torch.equal(dataset.images(), images)  # as stored
    assert torch.equal(dataset.transform(dataset[0])[0], plain[0])  # flipped twice


def flips(seed, epochs=2, **workers):
    """Which of 64 images are flipped in each epoch, (epochs, 64)."""
    images, keep = torch.rand(64, 3, 4, 4), torch.zeros(64, 1, dtype=torch.int64)  # the patch at the top left
    dataset = InvertedDataset.from_images(images, keep, torch.arange(64), (2, 2))
    generator = torch.Generator().manual_seed(seed)
    dataset.transform = RandomHorizontalFlip((3, 4, 4), (2, 2), generator=generator)
    loader = DataLoader(dataset, batch_size=32, generator=generator, collate_fn=dataset.collate, **workers)
    return torch.stack([torch.cat([tokens.positions for tokens, _ in loader]) for _ in range(epochs)])


@pytest.mark.parametrize("workers", [0, 2])
def test_flips_follow_from_the_generator_and_do_not_repeat(seed, workers):
    first = flips(seed, num_workers=workers)
    assert torch.equal(first, flips(seed, num_workers=workers))
    assert len({tuple(batch.tolist()) for epoch in first for batch in epoch.split(32)}) == 4  # chance of less: 2**-29
    assert 30 < first.sum() < 98  # of 128, half: 6 standard deviations


def test_a_pickled_flip_has_no_generator(seed):
    """torch fails to open one in a process that was not forked."""
    flip = RandomHorizontalFlip((3, 4, 4), (2, 2), p=1, generator=torch.Generator().manual_seed(seed))
    copy = pickle.loads(pickle.dumps(flip))
    assert copy.generator is None
    assert copy((torch.rand(1, 12), torch.tensor([2]), 0))[1].tolist() == [3]
    assert flip.generator is not None


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_flip_needs_a_probability(p):
    with pytest.raises(ValueError, match=f"p must be a probability .*{p}"):
        RandomHorizontalFlip((3, 4, 4), (2, 2), p=p)
