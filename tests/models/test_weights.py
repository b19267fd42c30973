"""The weights in a user's file: damage is found where the format allows it, no code runs, and no file is a bomb."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from damage_cases import cuts, flips, read_or_refused
from safetensors.torch import save_file
from sneaky_cases import Sneaky, sneaky_files

from smi_fast.models import cifar10_vit
from smi_fast.models.loading import load_model
from smi_fast.models.weights import read_weights

ZIP, LEGACY, SAFETENSORS = "zip.pth", "legacy.pth", "weights.safetensors"
FLIPS, CUTS = 300, 40


def save(weights, path):
    if path.name == SAFETENSORS:
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=path.name == ZIP)


@pytest.fixture
def weights(seed):
    """Tensors of several dtypes, in a small file."""
    tensors = {f"layer{i}.weight": torch.randn(3 + i, 5) for i in range(4)}
    return tensors | {"half": torch.randn(7).half(), "count": torch.arange(3)}


def bits(tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        (ours[name].dtype, ours[name].shape, bits(ours[name])) == (value.dtype, value.shape, bits(value))
        for name, value in theirs.items()
    )


@pytest.mark.parametrize("name", [ZIP, LEGACY, SAFETENSORS])
def test_a_cut_file_is_refused(seed, tmp_path, weights, name):
    path = tmp_path / name
    save(weights, path)
    assert same(read_weights(path), weights)
    for cut in cuts(path.read_bytes(), seed, CUTS):
        path.write_bytes(cut)
        assert read_or_refused(read_weights, path) is None, len(cut)


def test_a_changed_byte_in_torchs_zip_format_is_found_or_changes_nothing(seed, tmp_path, weights):
    path, found = tmp_path / ZIP, 0
    save(weights, path)
    for place, damaged in flips(path.read_bytes(), seed, FLIPS):
        path.write_bytes(damaged)
        read = read_or_refused(read_weights, path)
        found += read is None
        assert read is None or same(read, weights), place
    assert found > FLIPS / 3


def test_torch_itself_does_not_find_a_changed_weight(tmp_path):
    """The reason for our check. If this fails, torch has learnt it."""
    torch.save({"weight": torch.tensor([1.5, 2.5])}, tmp_path / ZIP)
    data = (tmp_path / ZIP).read_bytes()
    (tmp_path / ZIP).write_bytes(data.replace(bits(torch.tensor([1.5, 2.5])), bits(torch.tensor([1.5, 3.5]))))
    assert torch.load(tmp_path / ZIP, weights_only=True)["weight"].tolist() == [1.5, 3.5]
    with pytest.raises(ValueError, match=r"its record zip/data/0 does not have the checksum"):
        read_weights(tmp_path / ZIP)


def test_a_zip_that_was_saved_without_checksums_is_read(tmp_path, weights):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save(weights, tmp_path / ZIP)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_weights(tmp_path / ZIP), weights)


def test_a_changed_byte_of_safetensors_is_found_or_changes_one_number(seed, tmp_path, weights):
    """The format has no checksum. All that can be known is that other numbers, names and shapes are as they were."""
    path = tmp_path / SAFETENSORS
    save(weights, path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = {name: entry["data_offsets"] for name, entry in json.loads(data[8:start]).items() if name[0] != "_"}
    for place, damaged in flips(data, seed, FLIPS):
        path.write_bytes(damaged)
        read = read_or_refused(read_weights, path)
        if place >= start:
            name = next(name for name, (first, last) in places.items() if first <= place - start < last)
            assert read.keys() == weights.keys()
            assert same({n: t for n, t in read.items() if n != name}, {n: t for n, t in weights.items() if n != name})
            assert read[name].shape == weights[name].shape
            assert sum(a != b for a, b in zip(bits(read[name]), bits(weights[name]), strict=True)) == 1
        elif read is not None:  # a name or a dtype of the same width, which the model then refuses
            assert sorted(map(bits, read.values())) == sorted(map(bits, weights.values()))


def test_a_changed_byte_of_the_legacy_format_is_refused_or_leaves_a_state_dict(seed, tmp_path, weights):
    """The format has no checksum, and its pickle can be another valid one. Nothing but weights comes out of it."""
    path = tmp_path / LEGACY
    save(weights, path)
    for _, damaged in flips(path.read_bytes(), seed, FLIPS):
        path.write_bytes(damaged)
        read = read_or_refused(read_weights, path)
        assert read is None or all(type(tensor) is torch.Tensor for tensor in read.values())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_no_file_runs_code(tmp_path, suffix):
    trace, path = tmp_path / "it ran", tmp_path / f"weights{suffix}"
    pickle.loads(pickle.dumps(Sneaky(trace))).close()
    assert trace.exists()  # so these files do run code where pickles are believed
    trace.unlink()
    for name, data in sneaky_files(trace):
        path.write_bytes(data)
        assert read_or_refused(read_weights, path) is None, name
        assert not trace.exists(), name


def rewritten(path, compression, change=lambda name, data: data):
    """The bytes of a torch file whose records are changed and compressed."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(path) as before, zipfile.ZipFile(file, "w", compression) as after:
            for record in before.infolist():
                after.writestr(record.filename, change(record.filename, before.read(record)))
        return file.getvalue()


def test_a_compressed_zip_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / ZIP
    torch.save({"head.weight": torch.zeros(1_000_000)}, path)
    path.write_bytes(rewritten(path, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 10_000
    assert len(torch.load(path, weights_only=True)["head.weight"]) == 1_000_000  # torch would unpack it
    monkeypatch.setattr(torch, "load", pytest.fail)
    with pytest.raises(ValueError, match=r"zip\.pth cannot be read: its records are compressed, .* claim to be 4000"):
        read_weights(path)


def test_a_file_cannot_claim_more_numbers_than_it_holds(tmp_path):
    path = tmp_path / ZIP
    torch.save({"head.weight": torch.zeros(1000, 1000)}, path)
    path.write_bytes(
        rewritten(path, zipfile.ZIP_STORED, lambda name, data: data[:64] if name.endswith("/data/0") else data)
    )
    assert path.stat().st_size < 5000
    assert read_or_refused(read_weights, path) is None
    for name in (ZIP, LEGACY):
        torch.save(
            {"head.weight": torch.zeros(1).expand(10**9, 192)},
            path.with_name(name),
            _use_new_zipfile_serialization=name == ZIP,
        )
        with pytest.raises(ValueError, match=r"holds fewer numbers than the 192000000000 of its head\.weight"):
            load_model("cifar10_vit", checkpoint=path.with_name(name))


def test_a_legacy_file_cannot_claim_a_storage_that_it_leaves_out(tmp_path):
    path = tmp_path / LEGACY
    save({"head.weight": torch.zeros(1_000_000)}, path)
    data = path.read_bytes()
    keys = data.rindex(b"\x80\x02]")  # the list of the storages that follow
    path.write_bytes(data[:keys] + pickle.dumps([], protocol=2))
    assert path.stat().st_size < 5000
    assert torch.load(path, weights_only=True)["head.weight"].shape == (1_000_000,)  # torch believes it
    with pytest.raises(ValueError, match=r"has \d+ bytes, and its weights claim to have 4000000"):
        read_weights(path)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.zeros(10, 192, device="meta"), "without data"),
        (lambda: torch.zeros(10, 192).to_sparse(), "torch.sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.zeros(10, 192), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (lambda: torch.zeros(10, 192).to(torch.float8_e4m3fn), "torch.float8_e4m3fn, the model's is torch.float32"),
        (lambda: torch.zeros(10, 192, dtype=torch.complex64), "torch.complex64, the model's is torch.float32"),
    ],
    ids=["meta", "sparse", "quantized", "nested", "float8", "complex"],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_no_model_has_are_refused(tmp_path, make, kind):
    weights = cifar10_vit(False, depth=1).state_dict() | {"head.weight": make()}
    torch.save(weights, tmp_path / ZIP)
    with pytest.raises(ValueError, match=rf"zip\.pth does not fit .*its head\.weight is {kind}$"):
        load_model("cifar10_vit", checkpoint=tmp_path / ZIP)


def test_a_damaged_checkpoint_of_a_model_never_gives_another_number(seed, tmp_path):
    path, model = tmp_path / ZIP, cifar10_vit(False)
    torch.save(model.state_dict(), path)
    for place, damaged in flips(path.read_bytes(), seed, 5):
        path.write_bytes(damaged)
        loaded = read_or_refused(lambda path: load_model("cifar10_vit", checkpoint=path), path)
        assert loaded is None or same(loaded.state_dict(), model.state_dict()), place
