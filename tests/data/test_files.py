"""Files: they are written complete or not at all, errors name them, and JSON is strict."""

import errno
import json
import math
import os

import pytest
from safetensors import SafetensorError

from smi_fast.data.files import atomic_write, read_json, write_json


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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b""])
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
