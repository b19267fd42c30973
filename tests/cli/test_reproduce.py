"""smi-fast reproduce ends on a signal with what it needs to go on; its folder belongs to one run."""

import signal

import pytest

from smi_fast.cli import main


def test_ctrl_c_ends_a_run_that_others_may_not_enter_or_change(data, stopped, tmp_path, capsys):
    out = tmp_path / "out"
    begin = ["reproduce", "--data", str(data), "--student", "none", "--sections", "removal", "--out", str(out)]
    code, error = stopped(begin, out, signal.SIGINT)
    assert code == 130, error
    assert error.endswith(f"smi-fast: interrupted; to go on: smi-fast reproduce --resume {out}\n")
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert main([*begin, "--preset", "paper"]) == 2
    error = capsys.readouterr().err
    assert ", speed_iterations is 6, not 50," in error
    assert error.endswith("; --overwrite begins anew\n")
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "table9"], "there is no section 'table9'"),
        (["--data", "nowhere"], "nowhere is neither a folder nor one of"),
        (["--checkpoint-every", "0"], "--checkpoint-every: must be more than 0"),
        (["--resume", "nowhere"], "--resume: nowhere holds no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(arguments, message, data, refused):
    refused(["reproduce", "--student", "none", "--data", str(data), *arguments], message)
