"""Files: they are written complete or not at all, errors name them, JSON is strict, and pictures are what they were."""

import errno
import json
import math
import os
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from damage_cases import cuts, flips, read_or_refused
from PIL import Image
from safetensors import SafetensorError

from smi_fast.data.files import atomic_folder, atomic_write, read_image, read_json, read_sealed, sealed, write_json


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_to_write_names_the_file(tmp_path, error):
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_write(tmp_path / "result.bin"):
        raise error
    assert str(tmp_path / "result.bin") in str(caught.value)
    assert ".partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nan_and_infinity_are_null_in_json(tmp_path):
    record = {"loss": [1.5, math.nan, -math.inf], "range": (math.inf, 2), "name": "NaN", "nested": {"x": math.nan}}
    write_json(tmp_path / "report.json", record)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found == {"loss": [1.5, None, None], "range": [None, 2], "name": "NaN", "nested": {"x": None}}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"", b"[" * 100_000, b"9" * 10_000])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "about.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"about\.json is damaged"):
        read_json(tmp_path / "about.json")


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.stat().st_dev == path.stat().st_dev
        assert list(tmp_path.rglob("*.safetensors")) == [path]  # never seen as a part of a folder's dataset
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_an_error_within_a_folder_names_the_file_that_was_to_be(tmp_path):
    with (
        pytest.raises(OSError, match=rf"File name too long: '{tmp_path / 'pictures' / 'xxx'}"),
        atomic_folder(tmp_path / "pictures") as partial,
    ):
        (partial / ("x" * 300)).mkdir()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------- damaged records


def test_a_damaged_record_never_gives_another_number(seed, tmp_path):
    path = tmp_path / "section.json"
    record = {"title": "Table 4 – größer", "rows": [[1.5, 20, None, "a"]], "nested": {"7": [0.1, True]}}
    write_json(path, sealed(record))
    assert read_sealed(path) == record
    assert json.loads(path.read_text())["checksum"] == zlib.crc32(json.dumps(record, sort_keys=True).encode())
    data = path.read_bytes()
    for _, damaged in flips(data, seed, len(data)):
        path.write_bytes(damaged)
        assert read_or_refused(read_sealed, path) in (None, record)
    for cut in cuts(data.rstrip(), seed, 30):
        path.write_bytes(cut)
        assert read_or_refused(read_sealed, path) is None


# ----------------------------------------------------------------------------------------------------------- pictures


def pixels_of(path):
    return np.array(read_image(path, ("L", "RGB")))


def write_picture(path, mode="RGB", side=12, **options):
    noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).convert(mode).save(path, **options)
    return path.read_bytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
def test_a_damaged_png_never_gives_other_pixels(seed, tmp_path, mode):
    path = tmp_path / "a.png"
    data = write_picture(path, mode)
    expected, damages, refused = pixels_of(path), list(flips(data, seed, 120)), 0
    for place, damaged in damages:
        path.write_bytes(damaged)
        read = read_or_refused(pixels_of, path)
        refused += read is None
        assert read is None or np.array_equal(read, expected), place
    assert refused > 0.9 * len(damages)
    for cut in cuts(data[:-12], seed, 30):  # the last 12 bytes only say that it ends
        path.write_bytes(cut)
        assert read_or_refused(pixels_of, path) is None, len(cut)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.bmp", "a.ppm", "a.tif", "a.gif"])
@pytest.mark.filterwarnings("ignore")  # Pillow's about metadata
def test_a_damaged_picture_without_checksums_is_a_picture_or_refused(seed, tmp_path, name):
    path = tmp_path / name
    data = write_picture(path)
    for damaged in [damaged for _, damaged in flips(data, seed, 80)] + cuts(data, seed, 10):
        path.write_bytes(damaged)
        read = read_or_refused(pixels_of, path)
        assert read is None or read.dtype == np.uint8


def png_that_claims(width, height):
    """A PNG with a whole header that claims this size, and hardly any pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [100_000, 10_000])  # above the limit by which Pillow refuses, and by which it warns
def test_a_picture_of_unusual_size_is_refused_without_its_pixels(tmp_path, side, monkeypatch, recwarn):
    path = tmp_path / "a.png"
    path.write_bytes(png_that_claims(side, side))
    monkeypatch.setattr(Image.Image, "load", pytest.fail)
    with pytest.raises(ValueError, match=rf"^{path}: cannot be read as an image .*{side**2} pixels.* exceeds"):
        read_image(path)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["zip", "eps"])
def test_a_picture_in_name_only_is_refused_and_starts_no_program(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.png"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("data.pkl", bytes(10_000_000))
    else:
        Image.new("RGB", (4, 4)).save(path, format="EPS")
        with Image.open(path) as image:
            assert image.format == "EPS"  # for which Pillow starts Ghostscript
    monkeypatch.setattr("subprocess.Popen", pytest.fail)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: cannot be read as an image .*cannot identify"):
        read_image(path)
