"""A CUDA runtime that computes nothing, for tests of what torch does on a GPU where there is none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "inversion" / "fakecuda"
ROOT = Path(__file__).parents[1]


def headers() -> Path | None:
    """The folder of CUDA's headers, of the version that torch was built with."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    major = (torch.version.cuda or "none").split(".")[0]
    for include in (Path(home) / "include" for home in homes if home):
        header = include / "cuda_runtime_api.h"
        if header.is_file() and f"CUDART_VERSION  {major}" in header.read_text():
            return include
    return None


def _missing() -> str:
    if torch.cuda.is_available():
        return "there is a GPU, on which the cuda tests run"
    if not shutil.which("gcc"):
        return "gcc compiles the runtime, and is not here"
    return "" if headers() else "the headers of the CUDA that torch was built with are not here"


needs_fake_cuda = pytest.mark.skipif(bool(_missing()), reason=_missing())


def fake_cuda(folder: Path) -> dict[str, str]:
    """Compile the runtime into a folder. Returns the environment of a process that has it in the place of CUDA's."""
    for source, library in (("runtime.c", "runtime.so"), ("driver.c", "libcuda.so.1")):
        compile_ = ["gcc", "-O1", "-shared", "-fPIC", f"-I{headers()}", FOLDER / source, "-o", folder / library]
        subprocess.run([*compile_, "-lpthread"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    libraries = os.pathsep.join(filter(None, (str(folder), environment.get("LD_LIBRARY_PATH"))))
    return environment | {
        "FAKECUDA_RUNTIME": str(folder / "runtime.so"), "LD_PRELOAD": str(folder / "runtime.so"),
        "LD_LIBRARY_PATH": libraries, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
