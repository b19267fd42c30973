"""Hostile files on the command line: one sentence, exit code 2, and nothing of theirs runs or takes the memory."""

import io
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from sneaky_cases import sneaky_files

from smi_fast import InvertedDataset
from smi_fast.cli import main
from smi_fast.models import CIFAR10_CLASSES
from smi_fast.quantization import QuantizedViT


@pytest.fixture
def sneaky(tmp_path):
    """A function that calls `use` with each file whose pickle would run code, and checks that none did."""

    def each(path, use):
        for name, data in sneaky_files(tmp_path / "it ran"):
            path.write_bytes(data)
            use(path)
            assert not (tmp_path / "it ran").exists(), name

    return each


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_that_would_run_code_is_one_sentence(sneaky, refused, tmp_path, suffix):
    sneaky(
        tmp_path / f"w.{suffix}", lambda path: refused(["invert", "--checkpoint", str(path)], f"{path} cannot be read")
    )


@pytest.mark.parametrize("option", ["--verifier cifar10_resnet20 --verifier-checkpoint", "--resume"])
def test_other_files_of_an_inversion_are_one_sentence(sneaky, refused, tmp_path, option):
    sneaky(tmp_path / "w.pth", lambda path: refused(["invert", *option.split(), str(path)], f"{path}"))


def test_datasets_and_quantised_models_are_never_unpickled(sneaky, refused, tmp_path, data):
    path = tmp_path / "file.safetensors"

    def use(path):
        for load in (InvertedDataset.load, QuantizedViT.load):
            with pytest.raises(ValueError, match=f"^{path}: not a complete"):
                load(path)
        refused(["evaluate", "--quantized", str(path), "--data", str(data)], f"{path}: not a complete quantised model")
        refused(["distill", "--dataset", str(path), "--data", str(data)], f"{path}: not a complete dataset")

    sneaky(path, use)


def test_a_named_data_set_that_is_not_the_published_one_is_not_unpickled(sneaky, refused, tmp_path):
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def use(path):
        for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
            if path.name != name:
                shutil.copy(path, folder / name)
        refused(["evaluate", "--data", "CIFAR10", "--root", str(folder.parent)], "not found or corrupted")

    sneaky(folder / "test_batch", use)


def hostile_pictures():
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.pkl", bytes(10_000_000))
        yield "zip", file.getvalue()
    with io.BytesIO() as file:
        Image.new("1", (1, 1)).save(file, format="BMP")
        head = bytearray(file.getvalue())
    for side in (100_000, 10_000):
        head[18:26] = side.to_bytes(4, "little") * 2
        yield f"{side}x{side}", bytes(head)


def test_a_folder_with_a_hostile_picture_is_one_sentence(data, refused, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    path = folder / "test" / CIFAR10_CLASSES[3] / "1.png"
    for name, content in hostile_pictures():
        path.write_bytes(content)
        print(name)
        refused(["evaluate", "--data", str(folder)], f"{path}: cannot be read as an image")


# --------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "kernel", "cublas", "C++ in torch", "C++", "Python"],
)
def test_out_of_memory_is_one_sentence_that_says_memory(error, capsys, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("smi_fast.inversion.inverter.Inverter.run", fail)
    assert main(["invert", "--iterations", "2", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("smi-fast: error: ")
    assert "memory" in text
    assert text.count("\n") == 1


LIMITED = """
import resource, sys
from smi_fast.cli import main
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 1_000_000_000,) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_a_batch_that_does_not_fit_is_one_sentence(tmp_path):
    command = [
        "invert",
        "--images-per-class",
        "20000",
        "--batch-size",
        "200000",
        "--iterations",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--out", str(tmp_path / "out"), "--quiet"]
    run = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("smi-fast: error: ")
    assert "memory" in run.stderr
    assert run.stderr.count("\n") == 1
