"""The command line as a whole: help, info, and what errors of every kind look like."""

import pytest
import timm
import torch

import smi_fast
from smi_fast.cli import main


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("a.png: cannot be read as an image")


def test_an_error_of_a_worker_is_its_sentence_without_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr(
        "smi_fast.cli.info.run", lambda args: list(torch.utils.data.DataLoader(Broken(), num_workers=1))
    )
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "smi-fast: error: a.png: cannot be read as an image\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't\n allocate memory"), "can't allocate memory"),
        (smi_fast.UnsupportedModelError("no blocks"), "no blocks"),
        (OSError(28, "No space left on device", "here/x"), "No space left on device: 'here/x'"),
    ],
)
def test_an_expected_error_is_one_sentence(error, message, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr("smi_fast.cli.info.run", fail)
    assert main(["info"]) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_an_error_of_the_program_itself_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("smi_fast.cli.info.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


@pytest.mark.parametrize("command", ["invert", "quantize", "distill", "reproduce", "evaluate"])
def test_help_shows_defaults_where_there_are_any(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in text
    assert "default: False" not in text
    assert "(default: cifar10_vit)" in text


def test_the_help_of_each_command_says_what_it_is_for():
    for name, parser in smi_fast.cli._parser().commands.items():
        assert len((parser.description or "").split()) > 10, name


def test_info_tells_versions_device_backend_and_why(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in (smi_fast.__version__, torch.__version__, timm.__version__, "triton", "cifar10_vit", "%"):
        assert part in text


@pytest.mark.parametrize("arguments", [["--nonsense"], ["nonsense"], []])
def test_an_unknown_command_is_one_sentence(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
