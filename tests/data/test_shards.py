"""The file format: files return every bit, join in a folder, stay on disk, and say what is wrong with them."""

import json
import os
import pickle
import random
import re
import resource
import signal
import zlib
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from dataset_cases import assert_identical, make, ragged, sparse_images
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smi_fast.data.sparse import InvertedDataset

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


def read_raw(path):
    """(header, {tensor: (first byte, byte behind the last) in the file}) after the description of safetensors."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return header, {name: (end + start, end + stop) for name, (start, stop) in offsets.items()}


def test_the_file_is_as_documented(seed, tmp_path):
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


def test_equal_datasets_give_equal_files(seed, tmp_path):
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


def test_a_missing_folder_and_a_wrong_suffix_are_named(seed, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        make(seed).save(tmp_path / "missing" / "images.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        make(seed).save(tmp_path / "images.pt")
    assert os.listdir(tmp_path) == []


@contextmanager
def file_size_limit(size):
    """The system refuses to let a file grow beyond `size` bytes, as it does on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_everything_as_it_was(seed, tmp_path, monkeypatch, existing, failing):
    path = tmp_path / "images.safetensors"
    if existing:
        make(seed).save(path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    dataset = make(seed + 1, n=500)  # 121 KB of patches
    if failing != "write":
        monkeypatch.setattr(os, failing, disk_full)
    with file_size_limit(60_000) if failing == "write" else nullcontext(), pytest.raises(OSError) as caught:
        dataset.save(path, overwrite=True)
    assert str(path) in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_file_permissions_follow_the_umask(seed, tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    make(seed).save(tmp_path / "images.safetensors")
    assert (tmp_path / "images.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_joins_its_files_by_name(seed, tmp_path):
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


def test_images_keep_their_numbers_when_runs_add_files(seed, tmp_path):
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


def test_files_of_a_folder_agree_in_sizes(seed, tmp_path):
    make(seed).save(tmp_path / "a.safetensors")
    make(seed, patch=4, count=2).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: patch_size is \(4, 4\), but \(2, 2\) in a\.safetensors"):
        InvertedDataset.load(tmp_path)
    make(seed, side=4, count=2).save(tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(ValueError, match=r"b\.safetensors: image_size is \(3, 4, 4\)"):
        InvertedDataset.load(tmp_path)


@pytest.mark.parametrize("other", [{"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.3]}, {"mean": [0.4, 0.5, 0.6]}, {}])
def test_files_of_a_folder_agree_in_normalisation(seed, tmp_path, other):
    make(seed, metadata={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}).save(tmp_path / "a.safetensors")
    make(seed, metadata=other).save(tmp_path / "b.safetensors")
    name = "mean" if other.get("mean") != [0.4, 0.5, 0.6] else "std"
    with pytest.raises(ValueError, match=rf"b\.safetensors: {name} is .*, but \[0\..*\] in a\.safetensors"):
        InvertedDataset.load(tmp_path)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
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


def test_a_truncated_file_is_refused(seed, tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    make(seed).save(whole)
    data = whole.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(data) - 1, *random.Random(seed).sample(range(len(data)), 60)}
    for length in sorted(lengths):
        cut.write_bytes(data[:length])
        assert_bad(cut, "not a complete dataset of inverted images")


def test_random_bytes_are_refused(seed, tmp_path):
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


def test_a_damaged_image_leaves_the_others_readable(seed, tmp_path):
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


def test_version_1_is_read(tmp_path):
    write_file(tmp_path / "hand.safetensors")
    assert_identical(InvertedDataset.load(tmp_path / "hand.safetensors"), make(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(header="not json"), "not the JSON of a dataset of inverted images"),
        (dict(header="[1, 2]"), "not the JSON of a dataset of inverted images"),
        (dict(header="{}"), "not the JSON of a dataset of inverted images"),
        (dict(header='{"format_version": "1"}'), "not the JSON of a dataset of inverted images"),
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
        (dict(patch_size=[2, 3]), "images of 8x8 pixels are not divided by patches of 2x3"),
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


def test_a_foreign_file_says_so(tmp_path):
    path = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file(torch.nn.Linear(2, 2).state_dict(), path, metadata=metadata)
        assert_bad(path, "so it is not a dataset of inverted images")
    write_file(path)
    tensors = load_file(path)
    del tensors["positions"]
    header = dict(format_version=1, image_size=[3, 8, 8], patch_size=[2, 2], metadata={})
    save_file(tensors, path, metadata={"smi_fast": json.dumps(header)})
    assert_bad(path, "positions")


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_patches_stay_on_disk_until_they_are_read(tmp_path):
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


def test_a_pickle_opens_its_files_again(seed, tmp_path, monkeypatch):
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
