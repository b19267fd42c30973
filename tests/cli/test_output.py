"""Folders for results are tested before the work begins and left as they were; a full disk is one sentence."""

import resource

import pytest

from smi_fast.cli import main
from smi_fast.cli.output import check_writable


@pytest.fixture
def awkward(tmp_path):
    """A folder with a file, a link to nothing, and a folder where a command writes a file."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "is a file, not a folder"),
        ("file/below", "cannot be written to: Not a directory"),
        ("link", "is a link to nothing"),
        ("taken", "report.json is a folder"),
        ("nul\0byte", "holds a NUL byte"),
        ("long" * 100, "cannot be written to: File name too long"),
        ("/proc/results", "cannot be written to: No such file or directory"),
    ],
)
def test_a_bad_folder_is_found_before_the_model_is_read(awkward, refused, out, message):
    out = out if out.startswith("/") else str(awkward / out)
    before = sorted(awkward.rglob("*"))
    for command in (["invert"], ["quantize"], ["distill", "--data", "nowhere"]):
        refused([*command, "--model", "nonsense", "--out", out, "--overwrite"], message)
    assert sorted(awkward.rglob("*")) == before


def test_a_folder_is_tested_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "a" / ".." / "b")
    (tmp_path / "runs" / "other").mkdir(parents=True)
    check_writable(tmp_path / "runs" / "new" / "deep")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["runs", "runs/other"]


def test_nothing_is_overwritten_unasked(data, refused, tmp_path):
    (tmp_path / "report.json").write_text("mine")
    for command in (["invert"], ["quantize"], ["distill", "--data", str(data)]):
        refused([*command, "--out", str(tmp_path)], "is not empty; --overwrite replaces the results in it")
    assert (tmp_path / "report.json").read_text() == "mine"


def test_overwriting_replaces_results_and_nothing_else(refused, tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    (out / "process.png").write_text("a picture of an earlier run")
    arguments = ["--iterations", "1", "--stopping", "dense", "--classes", "0", "--images-per-class", "1", "--quiet"]
    assert main(["invert", *arguments, "--out", str(out), "--overwrite"]) == 0
    assert (out / "mine.txt").read_text() == "precious"
    assert (out / "process.png").read_bytes().startswith(b"\x89PNG")
    refused(["invert", "--out", str(out / "mine.txt")], "is a file")


@pytest.fixture
def small_disk():
    """No file can grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["quantize", "distill"])
def test_a_full_disk_is_one_sentence_that_names_the_file(command, data, inverted, tmp_path, capsys, small_disk):
    how = ["--images", "2"] if command == "quantize" else ["--dataset", str(inverted), "--rounds", "1", "--steps", "1"]
    out = tmp_path / "out"
    assert main([command, *how, "--data", str(data), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"smi-fast: error: {out}/")
    assert ".safetensors cannot be written: " in error
    assert error.count("\n") == 1
    assert {path.name for path in out.iterdir()} <= {".lock", "run.json", "checkpoints", "images"}
    assert not [*out.rglob("*.safetensors"), *out.rglob("*.partial")]
