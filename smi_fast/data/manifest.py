"""The manifest of a run: what its folder is to hold, in a file with a checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smi_fast.data.files import read_sealed, sealed, write_json

MANIFEST = "run.json"
IMAGES = "images"  # the folder in which a run keeps its shards
FORMAT_VERSION = 1
ENTRIES = {"format_version", "kind", "settings", "made_with"}


def write_manifest(folder: Path, kind: str, settings: dict[str, Any], made_with: dict[str, Any]) -> None:
    """Write the manifest of a run: complete, or not at all.

    Args:
        folder: the folder of the run.
        kind: what the run makes, such as "inversion".
        settings: what decides the results, in JSON's types. "images" of an inversion is the number of images.
        made_with: what results depend on besides, such as versions.
    """
    manifest = {"format_version": FORMAT_VERSION, "kind": kind, "settings": settings, "made_with": made_with}
    write_json(folder / MANIFEST, sealed(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: the manifest is damaged or of another version. The message names it.
    """
    file = folder / MANIFEST
    manifest = read_sealed(file)
    if manifest.get("format_version") != FORMAT_VERSION or manifest.keys() != ENTRIES:
        version = manifest.get("format_version")
        raise ValueError(f"{file} is of format version {version}, this code reads version {FORMAT_VERSION}")
    return manifest


def planned_images(folder: Path) -> int:
    """Return how many images a folder is to hold, if it is that of an inversion, or else 0."""
    manifest = read_manifest(folder)
    return manifest["settings"]["images"] if manifest["kind"] == "inversion" else 0
