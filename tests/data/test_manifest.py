"""Manifests: read as they were written, or refused with the name of the file."""

import pytest

from smi_fast.data.files import sealed, write_json
from smi_fast.data.manifest import MANIFEST, read_manifest, write_manifest

SETTINGS = {"iterations": 100, "stopping": "50:0.3", "targets": [1, 2], "lr": 0.1}


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    write_manifest(tmp_path, "inversion", SETTINGS, {"versions": {"torch": "2"}})
    assert read_manifest(tmp_path) == {
        "format_version": 1, "kind": "inversion", "settings": SETTINGS, "made_with": {"versions": {"torch": "2"}}
    }  # fmt: skip


def test_every_changed_byte_and_every_cut_is_found(tmp_path):
    write_manifest(tmp_path, "inversion", SETTINGS, {})
    file = tmp_path / MANIFEST
    whole, manifest = file.read_bytes(), read_manifest(tmp_path)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        for content in (changed, whole[:place]):
            file.write_bytes(content)
            try:
                found = read_manifest(tmp_path)
            except ValueError as error:
                found = str(error)
            assert found == manifest or str(file) in found  # equal, as for a blank that became another


def test_another_version_is_named(tmp_path):
    write_json(tmp_path / MANIFEST, sealed({"format_version": 7}))
    with pytest.raises(ValueError, match=r"run\.json is of format version 7, this code reads version 1"):
        read_manifest(tmp_path)
