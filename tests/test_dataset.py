"""InvertedDataset: what goes in comes out, on disk bit for bit, and a bad file says what is wrong with it."""

import json
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import smi_fast.dataset
from smi_fast.dataset import InvertedDataset, atomic_write


@st.composite
def sparse_images(draw):
    """(images, keep as a list of shuffled index tensors, targets, patch_size) of awkward and of square shapes."""
    n, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3]))
    rows, columns, ph, pw = (draw(st.integers(1, 4)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images = torch.rand(n, channels, rows * ph, columns * pw, generator=generator)
    counts = draw(st.lists(st.integers(1, rows * columns), min_size=n, max_size=n))
    keep = [torch.randperm(rows * columns, generator=generator)[:count] for count in counts]
    return images, keep, torch.randint(0, 1000, (n,), generator=generator), (ph, pw)


def masked(images, keep, patch_size):
    """The images with all but the kept patches black, pixel by pixel."""
    images, (ph, pw) = images.numpy(), patch_size
    columns = images.shape[3] // pw
    result = np.zeros_like(images)
    for i, row in enumerate(keep):
        for index in row.tolist():
            y, x = index // columns * ph, index % columns * pw
            result[i, :, y : y + ph, x : x + pw] = images[i, :, y : y + ph, x : x + pw]
    return torch.from_numpy(result)


def make(seed, n=3, side=8, patch=2, count=5, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.stack([torch.randperm((side // patch) ** 2, generator=generator)[:count] for _ in range(n)])
    images = torch.rand(n, 3, side, side, generator=generator)
    return InvertedDataset.from_images(images, keep, torch.arange(n), (patch, patch), **kwargs)


def assert_identical(a, b):
    for name in ("patches", "positions", "cu_seqlens", "targets"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.numpy().tobytes() == right.numpy().tobytes(), name
    assert (a.image_size, a.patch_size, a.metadata) == (b.image_size, b.patch_size, b.metadata)


@given(sparse_images())
@settings(deadline=None)
def test_images_are_the_originals_where_kept_and_black_elsewhere(case):
    images, keep, targets, patch_size = case
    dataset = InvertedDataset.from_images(images, keep, targets, patch_size)
    assert torch.equal(dataset.images(), masked(images, keep, patch_size))
    assert torch.equal(dataset.images([-1, 0]), masked(images, keep, patch_size)[[-1, 0]])
    assert dataset.images([]).shape == (0, *images.shape[1:])


@given(sparse_images())
@settings(deadline=None)
def test_a_sample_holds_the_kept_patches_in_the_order_given(case):
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(case=sparse_images(), metadata=st.dictionaries(st.text(max_size=8), json_values, max_size=4))
@settings(deadline=None)
def test_save_and_load_return_every_bit(tmp_path_factory, case, metadata):
    dataset = InvertedDataset.from_images(*case, metadata=metadata)
    path = tmp_path_factory.mktemp("round_trip") / "images.safetensors"
    dataset.save(path)
    assert_identical(InvertedDataset.load(path), dataset)
    assert dataset.metadata == metadata


def test_a_mask_and_an_index_tensor_keep_the_same_patches(seed):
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.rand(5, 3, 8, 8, generator=generator), torch.arange(5)
    mask = torch.rand(5, 16, generator=generator) < 0.5
    mask[:, 3] = True
    ragged = InvertedDataset.from_images(images, mask, targets, (2, 2))
    by_index = InvertedDataset.from_images(images, [row.nonzero().flatten() for row in mask], targets, (2, 2))
    assert_identical(ragged, by_index)
    assert [len(ragged[i][1]) for i in range(5)] == mask.sum(1).tolist()


@pytest.mark.parametrize("index", [3, -4, 10**9])
def test_an_index_out_of_range_is_an_index_error(seed, index):
    dataset = make(seed)
    with pytest.raises(IndexError):
        dataset[index]
    with pytest.raises(IndexError):
        dataset.images([0, index])
    assert len(list(dataset)) == 3


def test_the_dataset_owns_its_memory(seed):
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    targets = torch.tensor([4, 7])
    dataset = InvertedDataset.from_images(images, torch.tensor([[0], [3]]), targets, (2, 2))
    before = dataset.patches.clone()
    with torch.no_grad():
        images.zero_()
    targets.zero_()
    assert dataset.targets.tolist() == [4, 7]
    assert torch.equal(dataset.patches, before)
    assert not dataset.patches.requires_grad


def test_metadata_is_what_json_makes_of_it(seed):
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
        (dict(patch_size=(3, 2)), "patches of 3x2 pixels do not tile an image of 8x8"),
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
def test_a_wrong_argument_is_named_with_its_row_and_value(change, message):
    arguments = dict(images=IMAGES, keep=KEEP, targets=TARGETS, patch_size=(2, 2)) | change
    with pytest.raises(ValueError, match=message):
        InvertedDataset.from_images(**arguments)


def test_the_header_is_one_json_string_with_a_format_version(seed, tmp_path):
    path = tmp_path / "images.safetensors"
    make(seed, metadata={"model": "vit"}).save(path)
    with open(path, "rb") as file:  # the safetensors format: length of the header, header, tensors
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"].keys() == {"smi_fast"}
    assert json.loads(header["__metadata__"]["smi_fast"]) == {
        "format_version": 1,
        "image_size": [3, 8, 8],
        "patch_size": [2, 2],
        "metadata": {"model": "vit"},
    }


def test_equal_datasets_are_equal_files(seed, tmp_path):
    for name in "ab":
        make(seed, metadata={"seed": seed}).save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_only_overwrite_replaces_a_file(seed, tmp_path):
    path = tmp_path / "images.safetensors"
    old, new = make(seed), make(seed + 1)
    old.save(path)
    with pytest.raises(FileExistsError, match=r"images\.safetensors"):
        new.save(path)
    assert_identical(InvertedDataset.load(path), old)
    new.save(path, overwrite=True)
    assert_identical(InvertedDataset.load(path), new)
    InvertedDataset.load(path).save(path, overwrite=True)  # the file that it was read from
    assert_identical(InvertedDataset.load(path), new)


def test_save_names_a_missing_folder_and_a_wrong_suffix(seed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        make(seed).save(tmp_path / "missing" / "images.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        make(seed).save(tmp_path / "images.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_a_failed_save_leaves_nothing_and_the_old_file_intact(seed, tmp_path, monkeypatch, existing, failing):
    path = tmp_path / "images.safetensors"
    if existing:
        make(seed).save(path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def disk_full(*args, **kwargs):
        if failing == "save_file":
            args[1].write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    if failing == "save_file":
        monkeypatch.setattr(smi_fast.dataset, "save_file", disk_full)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", disk_full)
    else:
        monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        make(seed + 1).save(path, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_reader_sees_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent
        assert partial.suffix != ".safetensors"  # never seen as a part of a folder's dataset
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_saved_file_is_as_readable_as_any_other(seed, tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    make(seed).save(tmp_path / "images.safetensors")
    assert (tmp_path / "images.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_the_concatenation_of_its_files_by_name(seed, tmp_path):
    parts = [make(seed + i, n=i + 1, count=i + 2, metadata={"model": "vit", "seed": i}) for i in range(3)]
    for name, part in zip(("b", "c", "a"), parts, strict=True):
        part.save(tmp_path / f"{name}.safetensors")
    (tmp_path / "notes.txt").write_text("not a dataset")
    dataset = InvertedDataset.load(tmp_path)
    in_order = [parts[2], parts[0], parts[1]]
    assert len(dataset) == 6
    assert torch.equal(dataset.images(), torch.cat([part.images() for part in in_order]))
    assert torch.equal(dataset.targets, torch.cat([part.targets for part in in_order]))
    assert dataset.cu_seqlens.dtype == torch.int32
    assert dataset.metadata == {"model": "vit"}


def test_files_of_a_folder_must_agree_in_sizes(seed, tmp_path):
    make(seed).save(tmp_path / "a.safetensors")
    make(seed, patch=4, count=2).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: patch_size is \(4, 4\), but \(2, 2\) in a\.safetensors"):
        InvertedDataset.load(tmp_path)
    make(seed, side=4, count=2).save(tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(ValueError, match=r"b\.safetensors: image_size is \(3, 4, 4\)"):
        InvertedDataset.load(tmp_path)


def test_load_names_a_missing_file_and_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        InvertedDataset.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="the folder holds no"):
        InvertedDataset.load(tmp_path)


def assert_bad(path, message="."):
    """Loading fails with a ValueError of one line that begins with the file."""
    with pytest.raises(ValueError, match=message) as caught:
        InvertedDataset.load(path)
    text = str(caught.value)
    assert type(caught.value) is ValueError
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_a_file_truncated_at_any_byte_is_an_error(seed, tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    make(seed).save(whole)
    data = whole.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(data) - 1, *random.Random(seed).sample(range(len(data)), 60)}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        assert_bad(cut, "not a complete dataset")


def test_random_bytes_are_an_error(seed, tmp_path):
    path, source = tmp_path / "noise.safetensors", random.Random(seed)
    for size in (1, 8, 9, 100, 10_000):
        path.write_bytes(source.randbytes(size))
        assert_bad(path)
        path.write_bytes(size.to_bytes(8, "little") + source.randbytes(size))
        assert_bad(path)


def test_a_damaged_header_is_an_error_or_read_as_written(seed, tmp_path):
    """Any byte of the header replaced: a ValueError that names the file, or a dataset that passes its own checks."""
    path, source = tmp_path / "images.safetensors", random.Random(seed)
    make(seed).save(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        i = source.randrange(end)
        path.write_bytes(data[:i] + source.randbytes(1) + data[i + 1 :])
        try:
            InvertedDataset.load(path).images()
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017


def write_file(path, tensors=None, header=None, **change):
    """A dataset's file written by hand, with some of its tensors and header entries changed."""
    dataset = make(0)
    names = ("patches", "positions", "cu_seqlens", "targets")
    tensors = {name: getattr(dataset, name) for name in names} | (tensors or {})
    entries = dict(format_version=1, image_size=[3, 8, 8], patch_size=[2, 2], metadata={}) | change
    save_file(tensors, path, metadata={"smi_fast": json.dumps(entries) if header is None else header})


def test_a_file_written_by_hand_is_read(tmp_path):
    write_file(tmp_path / "hand.safetensors")
    assert_identical(InvertedDataset.load(tmp_path / "hand.safetensors"), make(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(header="not json"), "not the JSON of an inverted dataset"),
        (dict(header="[1, 2]"), "not the JSON of an inverted dataset"),
        (dict(header="{}"), "not the JSON of an inverted dataset"),
        (dict(header='{"format_version": "1"}'), "not the JSON of an inverted dataset"),
        (dict(header='{"format_version": 1}'), r"holds \[\] and not a dataset's entries"),
        (dict(metadata=[]), "not a dataset's entries"),
        (dict(format_version=2), "format version 2 is newer than 1"),
        (dict(header='{"format_version": 2, "shards": 7}'), "format version 2 is newer than 1"),
        (dict(image_size=[3, 8]), "image_size must be 3 positive integers"),
        (dict(image_size=[3, 8, "8"]), "image_size must be 3 positive integers"),
        (dict(image_size=8), "image_size must be 3 positive integers"),
        (dict(patch_size=[2, -2]), "patch_size must be 2 positive integers"),
        (dict(patch_size=[2, 3]), "do not tile"),
        (dict(patch_size=[4, 4]), "patches must be"),
        (dict(image_size=[3, 4, 4]), "outside its grid of 4 patches"),
        (dict(tensors={"patches": torch.zeros(15, 12, dtype=torch.float16)}), r"patches must be \(15, 12\) float32"),
        (dict(tensors={"patches": torch.zeros(14, 12)}), r"patches must be \(15, 12\) float32, not \(14, 12\)"),
        (dict(tensors={"patches": torch.zeros(())}), r"patches must be \(15, 12\) float32, not \(\)"),
        (dict(tensors={"positions": torch.zeros(15, dtype=torch.int64)}), r"positions must be \(15,\) int32"),
        (dict(tensors={"positions": torch.zeros(15, dtype=torch.int32)}), "image 0 has its patch 0 twice"),
        (dict(tensors={"positions": torch.arange(15, dtype=torch.int32) - 1}), "image 0 has a patch at -1"),
        (dict(tensors={"targets": torch.zeros(3)}), r"targets must be \(3,\) int64, not \(3,\) float32"),
        (dict(tensors={"targets": torch.zeros(3, 1, dtype=torch.int64)}), r"targets must be \(3,\) int64"),
        (dict(tensors={"targets": torch.tensor(0)}), r"targets must be \(1,\) int64, not \(\)"),
        (dict(tensors={"cu_seqlens": torch.tensor([0, 5, 10, 15])}), r"cu_seqlens must be \(4,\) int32"),
        (dict(tensors={"cu_seqlens": torch.tensor([0, 15], dtype=torch.int32)}), r"cu_seqlens must be \(4,\) int32"),
        (dict(tensors={"cu_seqlens": torch.tensor([0, 10, 5, 15], dtype=torch.int32)}), "image 1 has -5 patches"),
        (dict(tensors={"cu_seqlens": torch.tensor([0, 5, 5, 15], dtype=torch.int32)}), "image 1 has 0 patches"),
        (dict(tensors={"cu_seqlens": torch.tensor([0, 5, 10, 14], dtype=torch.int32)}), "not from 0 to 15"),
        (dict(tensors={"cu_seqlens": torch.tensor([1, 5, 10, 15], dtype=torch.int32)}), "not from 0 to 15"),
    ],
)
def test_an_inconsistent_file_says_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "bad.safetensors"
    write_file(path, **change)
    assert_bad(path, message)


def test_a_foreign_safetensors_file_says_so(tmp_path):
    path = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file(torch.nn.Linear(2, 2).state_dict(), path, metadata=metadata)
        assert_bad(path, "not an inverted dataset")
    write_file(path)
    tensors = load_file(path)
    del tensors["positions"]
    header = dict(format_version=1, image_size=[3, 8, 8], patch_size=[2, 2], metadata={})
    save_file(tensors, path, metadata={"smi_fast": json.dumps(header)})
    assert_bad(path, "positions")
