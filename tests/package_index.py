"""What tests fetch from the package index by pip. They skip where there is no network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

UNREACHABLE = re.compile(r"connection broken by|requirement \S+ \(from versions: none\)")  # pip's words


def fetch_source(package: str, version: str, folder: Path) -> Path:
    """Return the source archive of a package in a folder, which keeps it for the next time."""
    pattern = f"{package}-{version}.tar.gz"
    if not (folder / pattern).exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "--dest", str(folder)]
        run = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if UNREACHABLE.search(run.stdout + run.stderr):
            pytest.skip(f"the package index, which has the source of {package} {version}, is unreachable")
        assert run.returncode == 0, run.stdout + run.stderr
    return folder / pattern
