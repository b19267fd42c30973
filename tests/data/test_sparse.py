"""InvertedDataset: what goes in comes out, on disk bit for bit, and a bad file says what is wrong with it."""

import json
import os
import pickle
import random
import re
import zlib

import numpy as np
import pytest
import smi_fast.dataset
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder

from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip, atomic_write, normalize_patches


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


def read_raw(path):
    """(header, {tensor: (first byte, byte behind the last) in the file}) after the description of safetensors."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return header, {name: (end + start, end + stop) for name, (start, stop) in offsets.items()}


def test_the_header_is_one_json_string_with_version_and_checksum(seed, tmp_path):
    path = tmp_path / "images.safetensors"
    dataset = make(seed, metadata={"model": "vit"})
    dataset.save(path)
    header, places = read_raw(path)
    content = {name: path.read_bytes()[start:stop] for name, (start, stop) in places.items()}
    checksums = [zlib.crc32(dataset.patches[5 * i : 5 * i + 5].numpy().tobytes()) for i in range(3)]
    assert content["checksums"] == np.array(checksums, dtype="<i8").tobytes()
    entries = '{"format_version": 2, "image_size": [3, 8, 8], "metadata": {"model": "vit"}, "patch_size": [2, 2]}'
    index = b"".join(content[name] for name in ("positions", "cu_seqlens", "targets", "checksums"))
    assert header["__metadata__"].keys() == {"smi_fast"}
    assert json.loads(header["__metadata__"]["smi_fast"]) == {
        "format_version": 2,
        "image_size": [3, 8, 8],
        "patch_size": [2, 2],
        "metadata": {"model": "vit"},
        "checksum": zlib.crc32(entries.encode() + index),
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


def test_a_changed_byte_is_found_or_changes_nothing(seed, tmp_path):
    """Of header, index or patches: a ValueError that names the file, on loading or on reading the image."""
    path, source = tmp_path / "images.safetensors", random.Random(seed)
    dataset = make(seed, metadata={"mean": [0.5, 0.25, 0.125], "seed": seed})
    dataset.save(path)
    data = path.read_bytes()
    header = min(start for start, _ in read_raw(path)[1].values())
    for i in source.sample(range(header), 300) + source.sample(range(header, len(data)), 300):
        path.write_bytes(data[:i] + bytes([data[i] ^ source.randrange(1, 256)]) + data[i + 1 :])
        try:
            read = InvertedDataset.load(path)
            read.verify()
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
        else:
            assert i < header
            assert_identical(read, dataset)


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damage_is_found_where_it_is_read_and_the_other_images_are_still_there(seed, tmp_path):
    path, dataset = tmp_path / "b.safetensors", make(seed, metadata={"model": "vit"})
    dataset.save(path)
    make(seed + 1).save(tmp_path / "a.safetensors")
    flip_byte(path, read_raw(path)[1]["patches"][0] + 7 * dataset.patches[0].nbytes)  # of the 5 patches an image has
    read = InvertedDataset.load(tmp_path)
    for ours, i in ((3, 0), (5, 2)):
        assert torch.equal(read[ours][0], dataset[i][0])
    message = f"^{re.escape(str(path))}: image 1 does not have the checksum"
    copy = tmp_path / "copy.safetensors"
    for reading in (lambda: read[4], read.images, read.verify, lambda: read.save(copy)):
        with pytest.raises(ValueError, match=message):
            reading()
    with pytest.raises(ValueError, match=message):
        read.export(tmp_path / "pngs")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]
    flip_byte(path, read_raw(path)[1]["targets"][0])
    assert_bad(path, "its index does not have the checksum")


def write_file(path, tensors=None, header=None, **change):
    """A dataset's file written by hand, with some of its tensors and header entries changed."""
    dataset = make(0)
    names = ("patches", "positions", "cu_seqlens", "targets")
    tensors = {name: getattr(dataset, name) for name in names} | (tensors or {})
    entries = dict(format_version=1, image_size=[3, 8, 8], patch_size=[2, 2], metadata={}) | change
    save_file(tensors, path, metadata={"smi_fast": json.dumps(entries) if header is None else header})


def test_a_file_of_version_1_written_by_hand_is_read(tmp_path):
    write_file(tmp_path / "hand.safetensors")
    assert_identical(InvertedDataset.load(tmp_path / "hand.safetensors"), make(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(header="not json"), "not the JSON of an inverted dataset"),
        (dict(header="[1, 2]"), "not the JSON of an inverted dataset"),
        (dict(header="{}"), "not the JSON of an inverted dataset"),
        (dict(header='{"format_version": "1"}'), "not the JSON of an inverted dataset"),
        (dict(header='{"format_version": 1}'), r"holds \['format_version'\] and not a dataset's entries"),
        (dict(metadata=[]), "not a dataset's entries"),
        (dict(format_version=3), "format version 3 is newer than 2"),
        (dict(header='{"format_version": 3, "shards": 7}'), "format version 3 is newer than 2"),
        (dict(format_version=2), "not a dataset's entries"),
        (dict(format_version=2, checksum=1), "does not contain tensor checksums"),
        (
            dict(format_version=2, checksum=1, tensors={"checksums": torch.zeros(3)}),
            "its index does not have the checksum",
        ),
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


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_patches_stay_on_disk_until_they_are_asked_for(tmp_path):
    """Two files of 400 MB each, which are holes on disk, take no memory to load, to read one image of, or to pickle."""
    images, kept, patch = 512, 16, 64
    index = {
        "targets": torch.arange(images),
        "positions": torch.arange(kept, dtype=torch.int32).repeat(images),
        "cu_seqlens": torch.arange(0, images * kept + 1, kept, dtype=torch.int32),
    }
    entries = dict(format_version=1, image_size=[3, 4 * patch, 4 * patch], patch_size=[patch, patch], metadata={})
    header, place = {"__metadata__": {"smi_fast": json.dumps(entries)}}, 0
    for name, tensor in index.items():
        dtype = {torch.int32: "I32", torch.int64: "I64"}[tensor.dtype]
        header[name] = dict(dtype=dtype, shape=list(tensor.shape), data_offsets=[place, place + tensor.nbytes])
        place += tensor.nbytes
    shape = [images * kept, 3 * patch**2]
    header["patches"] = dict(dtype="F32", shape=shape, data_offsets=[place, place + 4 * shape[0] * shape[1]])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(t.numpy().tobytes() for t in index.values()))
        file.truncate(8 + len(text) + header["patches"]["data_offsets"][1])
    os.link(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    before = resident_bytes()
    dataset = InvertedDataset.load(tmp_path)
    patches, _, target = dataset[2 * images - 1]
    assert (patches.shape, patches.any(), target) == ((kept, 3 * patch**2), False, images - 1)
    assert len(pickle.dumps(dataset)) < 1e6
    assert resident_bytes() - before < 4e7


def test_a_sample_may_be_changed_in_place(seed, tmp_path):
    make(seed).save(tmp_path / "images.safetensors")
    for dataset in (make(seed), InvertedDataset.load(tmp_path)):
        patches, positions, _ = dataset[1]
        patches.zero_()
        positions.zero_()
        assert_identical(dataset, make(seed))
        dataset.verify()


def test_a_pickled_dataset_opens_its_files_again(seed, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for i, name in enumerate("ab"):
        make(seed + i, n=4 - i).save(tmp_path / "images" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    dataset = InvertedDataset.load("images")
    pickled = pickle.dumps(dataset)
    monkeypatch.chdir("/")
    assert_identical(pickle.loads(pickled), dataset)
    images = dataset.images()
    make(seed + 2).save(tmp_path / "images" / "b.safetensors", overwrite=True)
    assert torch.equal(dataset.images(), images)  # what is open stays what it was
    with pytest.raises(ValueError, match=r"b\.safetensors: is not the file any more"):
        pickle.loads(pickled)


def test_a_pickled_dataset_in_memory_carries_its_patches(seed):
    dataset = make(seed, metadata={"seed": seed})
    assert_identical(pickle.loads(pickle.dumps(dataset)), dataset)


def ragged(seed, n):
    """Images of 1 to 16 patches of classes 0 to n - 1."""
    generator = torch.Generator().manual_seed(seed)
    keep = [torch.randperm(16, generator=generator)[: int(k)] for k in torch.randint(1, 17, (n,), generator=generator)]
    return InvertedDataset.from_images(torch.rand(n, 3, 8, 8, generator=generator), keep, torch.arange(n), (2, 2))


@pytest.mark.parametrize(("context", "workers", "epochs"), [("fork", 2, 2), ("spawn", 1, 1)])  # to spawn is slow
def test_workers_give_the_batches_that_the_seed_gives_without_them(seed, tmp_path, context, workers, epochs):
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


def test_the_order_of_an_epoch_follows_from_seed_and_epoch(seed):
    dataset = ragged(seed, n=50)

    def order(seed, epoch):
        sampler = DistributedSampler(dataset, 1, 0, seed=seed)
        sampler.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=8, sampler=sampler, collate_fn=dataset.collate)
        return torch.cat([targets for _, targets in loader]).tolist()

    assert order(seed, 3) == order(seed, 3)
    assert sorted(order(seed, 3)) == list(range(50))
    assert len({tuple(order(*key)) for key in ((seed, 3), (seed, 4), (seed + 2, 3))}) == 3


def test_batches_are_also_uniform_or_images(seed):
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


def test_runs_add_files_below_one_folder_and_images_keep_their_numbers(seed, tmp_path):
    parts = [ragged(seed + i, n=i + 2) for i in range(3)]
    for i, part in enumerate(parts):
        (tmp_path / f"run-{i}").mkdir()
        part.save(tmp_path / f"run-{i}" / "inverted.safetensors")
        dataset = InvertedDataset.load(tmp_path)
        assert torch.equal(dataset.images(), torch.cat([part.images() for part in parts[: i + 1]]))
    samples = [part[i] for part in parts for i in range(len(part))]
    for (patches, positions, target), ours in zip(samples, dataset, strict=True):
        assert torch.equal(patches, ours[0])
        assert torch.equal(positions, ours[1])
        assert target == ours[2]
    dataset.save(tmp_path / "all.safetensors")
    assert_identical(InvertedDataset.load(tmp_path / "all.safetensors"), dataset)
    (tmp_path / "run-3").mkdir()
    make(seed, patch=4, count=2).save(tmp_path / "run-3" / "inverted.safetensors")
    with pytest.raises(ValueError, match=r"run-3/inverted.safetensors: patch_size is \(4, 4\), but .* in all.safeten"):
        InvertedDataset.load(tmp_path)


@pytest.mark.parametrize("other", [{"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.3]}, {"mean": [0.4, 0.5, 0.6]}, {}])
def test_files_of_a_folder_must_agree_in_normalisation(seed, tmp_path, other):
    make(seed, metadata={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}).save(tmp_path / "a.safetensors")
    make(seed, metadata=other).save(tmp_path / "b.safetensors")
    name = "mean" if other.get("mean") != [0.4, 0.5, 0.6] else "std"
    with pytest.raises(ValueError, match=rf"b\.safetensors: {name} is .*, but \[0\..*\] in a\.safetensors"):
        InvertedDataset.load(tmp_path)


def test_another_normalisation_is_named_with_the_models(seed):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    dataset = make(seed, metadata={"mean": mean, "std": std})
    dataset.check_normalization(mean, torch.tensor(std).tolist())  # rounded to float32
    make(seed).check_normalization(mean, std)
    with pytest.raises(ValueError, match=r"mean \[0\.4914, 0\.4822, 0\.4465\], this one has mean \[0\.5, 0\.5, 0\.5\]"):
        dataset.check_normalization([0.5] * 3, std)
    with pytest.raises(ValueError, match=r"std \[0\.247, 0\.2435, 0\.2616\], this one has std \[0\.247\]"):
        dataset.check_normalization(mean, std[:1])


def test_patches_are_normalised_as_images_are(seed):
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


def to_8_bits(images):
    """(N, H, W, C) uint8, the nearest value of each pixel."""
    return (images.numpy() * np.float32(255) + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1)


@given(case=sparse_images(), named=st.booleans())
@settings(deadline=None, max_examples=40)
def test_what_is_exported_comes_back_to_8_bits(tmp_path_factory, case, named):
    images, keep, targets, patch_size = case
    folder = tmp_path_factory.mktemp("export") / "pngs"
    dark = torch.rand(images.shape, generator=torch.Generator().manual_seed(int(targets[0]))) < 0.5
    dark[:, 0, :: patch_size[0], :: patch_size[1]] = False  # no patch is wholly black
    images = images.clamp(min=0.01).masked_fill(dark, 0)
    names = [f"class {-target}" for target in range(1000)] if named else None
    InvertedDataset.from_images(images, keep, targets, patch_size).export(folder, names)
    read = InvertedDataset.from_image_folder(folder, patch_size, names, metadata={"from": "pngs"})
    order = sorted(range(len(targets)), key=lambda i: (names[targets[i]] if named else int(targets[i]), i))
    assert read.targets.tolist() == targets[order].tolist()
    assert [read[i][1].tolist() for i in range(len(read))] == [sorted(keep[i].tolist()) for i in order]
    pixels = to_8_bits(masked(images, keep, patch_size)[order])
    assert np.array_equal(to_8_bits(read.images()), pixels)
    assert np.array_equal(read.images().permute(0, 2, 3, 1).numpy(), pixels.astype(np.float32) / 255)
    assert read.metadata == {"from": "pngs"}


def test_torchvision_reads_what_is_exported(seed, tmp_path):
    dataset = ragged(seed, n=12)
    pixels = to_8_bits(dataset.images())
    dataset.export(tmp_path / "numbers")
    dataset.export(tmp_path / "names", [f"class {99 - i}" for i in range(12)])
    for folder, targets in (("numbers", range(12)), ("names", reversed(range(12)))):
        read = ImageFolder(str(tmp_path / folder))
        assert len(read) == 12
        assert [label for _, label in read] == list(range(12))  # numbers sort as numbers
        for (image, _), target in zip(read, targets, strict=True):
            assert np.array_equal(np.asarray(image), pixels[target])
    assert (tmp_path / "names" / "class 96" / "03.png").is_file()


@pytest.mark.parametrize(
    ("folders", "class_names", "targets"),
    [
        (["207", "0281"], None, [281, 207]),
        (["dog", "cat"], None, [0, 1]),
        (["7", "cat"], None, [0, 1]),
        (["dog", "cat"], ["bird", "dog", "cat"], [2, 1]),
    ],
)
def test_class_folders_are_numbers_or_names(tmp_path, folders, class_names, targets):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), "white").save(tmp_path / name / "a.png")
    assert InvertedDataset.from_image_folder(tmp_path, (2, 2), class_names).targets.tolist() == targets


def test_export_replaces_nothing_and_leaves_nothing_half_done(seed, tmp_path, monkeypatch):
    dataset = make(seed, n=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    dataset.export(tmp_path / "empty")
    for existing in ("full", "empty", "full/notes.txt"):
        with pytest.raises(FileExistsError, match=f"{existing} exists already"):
            dataset.export(tmp_path / existing)
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        dataset.export(tmp_path / "missing" / "pngs")
    save, saved = Image.Image.save, []

    def interrupt(image, path):
        save(image, path)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dataset.export(tmp_path / "pngs")
    assert len(saved) == 3
    assert sorted(os.listdir(tmp_path)) == ["empty", "full"]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(class_names=["cat", "dog"]), "class 2 is not among 2 class_names"),
        (dict(class_names=["cat", "a/b", "dog"]), "class 1 is called 'a/b', which no folder can be"),
        (dict(class_names=["cat", "..", "dog"]), "class 1 is called '..', which no folder can be"),
        (dict(class_names=["", "cat", "dog"]), "class 0 is called '', which no folder can be"),
        (dict(class_names=["cat", "crane", "crane"]), "class 1 is called 'crane', and so is another"),
        (dict(targets=torch.tensor([0, -1, 2])), "class -1 is not among the numbers from 0"),
        (dict(channels=2), "PNGs have 1 or 3 channels, these images have 2"),
    ],
)
def test_export_names_what_cannot_be_a_picture_or_a_folder(tmp_path, change, message):
    images = torch.rand(3, change.get("channels", 3), 4, 4)
    keep, targets = torch.arange(4).expand(3, -1), change.get("targets", torch.arange(3))
    dataset = InvertedDataset.from_images(images, keep, targets, (2, 2))
    with pytest.raises(ValueError, match=message):
        dataset.export(tmp_path / "pngs", change.get("class_names"))
    assert os.listdir(tmp_path) == []


def test_import_names_a_bad_picture_or_folder(tmp_path):
    good = Image.effect_noise((4, 4), 50).convert("RGB").point(lambda value: value | 1)
    (tmp_path / "pngs" / "cat").mkdir(parents=True)
    bad = tmp_path / "pngs" / "cat" / "b.png"
    good.save(bad.with_name("a.png"))
    whole = bad.with_name("a.png").read_bytes()

    def read(message, error=ValueError, patch_size=(2, 2), class_names=None):
        with pytest.raises(error, match=message) as caught:
            InvertedDataset.from_image_folder(tmp_path / "pngs", patch_size, class_names)
        assert "\n" not in str(caught.value)

    read("patches of 3x2 pixels do not tile an image of 4x4", patch_size=(3, 2))
    read("the class folder 'cat' is 0 times in class_names", class_names=["dog"])
    read("the class folder 'cat' is 2 times in class_names", class_names=["cat", "cat"])
    Image.new("RGB", (4, 4)).save(bad)
    read(rf"^{bad}: the image is wholly black")
    Image.new("RGB", (6, 4), "white").save(bad)
    read(rf"^{bad}: the image is \(3, 4, 6\), the first one \(3, 4, 4\)")
    for broken in (b"", b"no picture", whole[: len(whole) // 2], whole[:40]):
        bad.write_bytes(broken)
        read(rf"^{bad}: cannot be read as an image")
    bad.unlink()
    (tmp_path / "pngs" / "dog").mkdir()
    read("no valid file for the classes dog", FileNotFoundError)
    for name in ("cat/a.png", "cat", "dog"):
        path = tmp_path / "pngs" / name
        path.rmdir() if path.is_dir() else path.unlink()
    read("find any class folder", FileNotFoundError)
    (tmp_path / "pngs").rmdir()
    read("pngs", FileNotFoundError)


@given(case=sparse_images())
@settings(deadline=None)
def test_a_flipped_sample_is_the_mirrored_image(case):
    dataset = InvertedDataset.from_images(*case)
    images = dataset.images()
    dataset.transform = RandomHorizontalFlip(dataset.image_size, dataset.patch_size, p=1)
    flipped, _ = dataset.collate_images([dataset[i] for i in range(len(dataset))])
    assert torch.equal(flipped, images.flip(3))
    assert dataset[0][1].dtype == torch.int32
    assert torch.equal(dataset.images(), images)  # as stored
    assert torch.equal(dataset.transform(dataset[0])[0], dataset._sample(0)[0])


def flips(seed, epochs=2, **workers):
    """Which of 64 images are flipped in each epoch, (epochs, 64)."""
    images, keep = torch.rand(64, 3, 4, 4), torch.zeros(64, 1, dtype=torch.int64)  # the patch at the top left
    dataset = InvertedDataset.from_images(images, keep, torch.arange(64), (2, 2))
    generator = torch.Generator().manual_seed(seed)
    dataset.transform = RandomHorizontalFlip((3, 4, 4), (2, 2), generator=generator)
    loader = DataLoader(dataset, batch_size=32, generator=generator, collate_fn=dataset.collate, **workers)
    return torch.stack([torch.cat([tokens.positions for tokens, _ in loader]) for _ in range(epochs)])


@pytest.mark.parametrize("workers", [0, 2])
def test_flips_follow_from_the_generator_and_repeat_in_no_epoch_or_worker(seed, workers):
    first = flips(seed, num_workers=workers)
    assert torch.equal(first, flips(seed, num_workers=workers))
    assert len({tuple(batch.tolist()) for epoch in first for batch in epoch.split(32)}) == 4  # chance of less: 2**-29
    assert 30 < first.sum() < 98  # of 128, half: 6 standard deviations


def test_a_flip_is_sent_to_workers_without_its_generator(seed):
    """torch fails to open one in a process that was not forked."""
    flip = RandomHorizontalFlip((3, 4, 4), (2, 2), p=1, generator=torch.Generator().manual_seed(seed))
    copy = pickle.loads(pickle.dumps(flip))
    assert copy.generator is None
    assert copy((torch.rand(1, 12), torch.tensor([2]), 0))[1].tolist() == [3]
    assert flip.generator is not None


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_flip_of_no_probability_is_refused(p):
    with pytest.raises(ValueError, match=f"p must be a probability .*{p}"):
        RandomHorizontalFlip((3, 4, 4), (2, 2), p=p)
