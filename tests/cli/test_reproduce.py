"""smi-fast reproduce ends on a signal with what it needs to go on; its folder belongs to one run."""

import argparse
import signal

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from smi_fast.cli import main
from smi_fast.cli.reproduce import student_of

STUDENT = "vit_tiny_patch16_224"


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


def test_a_student_gets_the_teachers_images_and_the_same_new_head_each_time(seed, tmp_path):
    save_file(timm.create_model(STUDENT, num_classes=5).state_dict(), tmp_path / "student.safetensors")
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=3)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "input_size": (3, 96, 96)}
    args = argparse.Namespace(
        student=STUDENT,
        student_pretrained=False,
        student_checkpoint=tmp_path / "student.safetensors",
        device="cpu",
        image_size=None,
    )
    (student, note), (again, _) = student_of(args, teacher), student_of(args, teacher)
    assert note == "Its head is new."
    assert student(torch.randn(2, 3, 96, 96)).shape == (2, 3)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())
    expected = timm.create_model(STUDENT, num_classes=5)
    expected.load_state_dict(load_file(tmp_path / "student.safetensors"))
    expected.set_input_size(img_size=96)
    assert torch.equal(student.pos_embed, expected.pos_embed)
