"""A file of options is read as if its options stood on the command line."""

import json

import pytest

import smi_fast
from smi_fast.cli import _parser, main
from smi_fast.cli.config import with_config


@pytest.fixture
def words(tmp_path):
    """A function that returns the words that stand for a file, and for what is given besides."""

    def read(text, *given, command="invert"):
        (tmp_path / "options.yaml").write_text(text)
        return with_config([command, *given, "--config", str(tmp_path / "options.yaml")], _parser().commands)

    return read


def test_values_are_words_as_they_are_written(words):
    text = """
    iterations: 0600
    tv_l2: 1e-3
    lr: -0.10  # refused later, by its name
    stopping: 50:0.3,100:mass=0.9
    classes: [church, 3, 7-9]
    quiet: true
    published: false
    out: no
    """
    assert words(text, "--seed", "1") == [
        "invert", "--iterations", "0600", "--tv-l2", "1e-3", "--lr=-0.10", "--stopping", "50:0.3,100:mass=0.9",
        "--classes", "church,3,7-9", "--quiet", "--out", "no", "--seed", "1",
    ]  # fmt: skip
    assert words("# nothing") == ["invert"]


def test_the_command_line_wins_over_the_file_and_a_resumed_run_knows_both(tmp_path, capsys):
    out, file = tmp_path / "o", tmp_path / "options.yaml"
    file.write_text(f"iterations: 3\nseed: 5\nclasses: [ship]\nimages-per-class: 1\nquiet: true\nout: {out}\n")
    assert main(["invert", "--config", str(file), "--iterations", "2", "--stopping", "dense"]) == 0
    assert smi_fast.InvertedDataset.load(out).targets.tolist() == [8]
    manifest = json.loads((out / "run.json").read_text())
    assert (manifest["settings"]["iterations"], manifest["settings"]["seed"]) == (2, 5)
    file.unlink()
    assert main(["invert", "--resume", str(out)]) == 0
    assert main(["invert", "--resume", str(out), "--seed", "6"]) == 2
    assert "seed is 5, not 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteration: 5", "names 'iteration', which is no option for a file; did you mean iterations?"),
        ("resume: folder", "names 'resume', which is no option for a file"),
        ("lr: 1\nLR: 2", "names 'LR', which is no option for a file"),
        ("tv-l2: 1\ntv_l2: 2", "names tv-l2 twice"),
        ("lr: {a: 1}", "gives lr no value or list of values"),
        ("lr:", "gives lr no value or list of values"),
        ("classes: [[1]]", "gives classes no value or list of values"),
        ("quiet: 1", "quiet is true or false, "),
        ("- lr", "does not map names of options to values"),
        ("[lr]: 1", "has a list or a map in place of the name of an option"),
        ("lr: [1", "cannot be read: while parsing a flow sequence"),
        ("lr: fast", "--lr: must be a number, got 'fast'"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, refused, text, message):
    (tmp_path / "options.yaml").write_text(text)
    refused(["invert", "--config", str(tmp_path / "options.yaml")], message)


def test_a_missing_file_and_a_command_without_one_are_one_sentence(tmp_path, refused):
    refused(["invert", "--config", str(tmp_path / "nowhere")], "nowhere cannot be read: No such file or directory")
    refused(["invert", "--config"], "--config: expected one argument")
    refused(["evaluate", "--data", "x", "--config", "y"], "unrecognized arguments: --config y")
