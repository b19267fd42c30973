"""The manifest of a run: what its folder is to hold, in a file with a checksum."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from smi_fast.data.files import read_json, write_json

MANIFEST = "run.json"
IMAGES = "images"  # the folder in which a run keeps its shards
FORMAT_VERSION = 1
ENTRIES = {"format_version", "kind", "settings", "made_with", "checksum"}


def write_manifest(folder: Path, kind: str, settings: dict[str, Any], made_with: dict[str, Any]) -> None:
    """Write the manifest of a run: complete, or not at all.

    Args:
        folder: the folder of the run.
        kind: what the run makes, such as "inversion".
        settings: what decides the results, in JSON's types. "images", if it is there, is the number of images.
        made_with: what results depend on besides, such as versions.
    """
    manifest = {"format_version": FORMAT_VERSION, "kind": kind, "settings": settings, "made_with": made_with}
    write_json(folder / MANIFEST, manifest | {"checksum": _checksum(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: the manifest is damaged or of another version. The message names it.
    """
    file = folder / MANIFEST
    manifest = read_json(file)
    version = manifest.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise ValueError(f"{file} is of format version {version}, this code reads version {FORMAT_VERSION}")
    if manifest.keys() != ENTRIES or manifest.pop("checksum") != _checksum(manifest):
        raise ValueError(f"{file} is damaged: it does not have the checksum that it was saved with")
    return manifest


def _checksum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
