"""smi-fast distill trains a student, keeps every round on the disk, and says what a failure or Ctrl-C left there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from smi_fast.cli import main
from smi_fast.cli.distill import save_student
from smi_fast.data.sparse import InvertedDataset
from smi_fast.models import cifar10_resnet20, cifar10_vit
from smi_fast.models.loading import load_model, untrained_model
from smi_fast.runs.processes import Processes

pytest.importorskip("matplotlib")


@pytest.fixture
def student(tmp_path, seed):
    """A student with random weights, and the options that name it."""
    model = cifar10_vit(pretrained=False)
    save_file(model.state_dict(), tmp_path / "student.safetensors")
    return model, ["--student", "cifar10_vit", "--student-checkpoint", str(tmp_path / "student.safetensors")]


@pytest.mark.parametrize("stored", [False, True], ids=["fresh", "stored"])
def test_the_head_learns_and_every_round_is_kept(
    stored, student, data, inverted, accuracy_by_hand, tmp_path, capsys
):  # fmt: skip
    (model, options), out = student, tmp_path / "out"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = ["--dataset", str(inverted), "--samples", "10"] if stored else ["--iterations", "4", "--samples", "10"]
    arguments = [*options, "--rounds", "2", "--steps", "3", *images, "--data", str(data)]
    assert main(["distill", *arguments, "--out", str(out), "--quiet"]) == 0
    assert "accuracy" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert [r["samples"] for r in record["rounds"]] == [10, 20]
    assert [r["iterations"] for r in record["rounds"]] == ([0, 0] if stored else [4, 8])
    trained = load_file(out / "student.safetensors")
    changed = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    model.load_state_dict(trained)
    assert record["rounds"][-1]["accuracy"] == accuracy_by_hand(model)
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_records_the_inversion_unless_images_are_stored(data, inverted, tmp_path):
    how = ["--rounds", "1", "--steps", "1", "--samples", "2", "--data", str(data), "--quiet"]
    assert main(["distill", "--iterations", "3", "--tv-l2", "0.5", *how, "--out", str(tmp_path / "fresh")]) == 0
    assert main(["distill", "--dataset", str(inverted), *how, "--out", str(tmp_path / "stored")]) == 0
    fresh, stored = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("fresh", "stored"))
    expected = {"iterations": 3, "lr": 0.1, "stopping": "1:0.3,2:0.3", "adaptive": None}
    assert fresh["inversion"] | expected == fresh["inversion"]
    objective = {"name": "deep_inversion", "tv_l2": 0.5, "l2": 0.0, "norm": "batch"}
    assert fresh["inversion"]["objective"] == objective
    assert fresh["images"] == "inverted, stopping 1:0.3,2:0.3, 3 iterations"
    assert "inversion" not in stored
    assert stored["images"] == str(inverted)


def test_an_untrained_cnn_competes_and_learns_as_a_whole(data, accuracy_by_hand, tmp_path):
    how = ["--stopping", "dense", "--iterations", "2", "--samples", "8", "--rounds", "1", "--steps", "3", "--seed", "5"]
    arguments = ["--student", "cifar10_resnet8", "--adaptive", "10", *how, "--data", str(data)]
    assert main(["distill", *arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (record["student_untrained"], record["fine_tune"]) == (True, True)
    assert (record["inversion"]["adaptive"], record["inversion"]["js"]) == (10.0, "published")
    student, trained = (
        untrained_model("cifar10_resnet8", cifar10_vit(), 5),
        load_file(tmp_path / "out" / "student.safetensors"),
    )
    assert not any(torch.equal(value, trained[name]) for name, value in student.state_dict().items())
    student.load_state_dict(trained)
    assert record["rounds"][-1]["accuracy"] == accuracy_by_hand(student)


def test_the_cnn_inside_teaches_an_untrained_resnet_8(data, tmp_path):
    save_file(cifar10_resnet20(False).state_dict(), tmp_path / "teacher.safetensors")
    teacher = ["--model", "cifar10_resnet20", "--checkpoint", str(tmp_path / "teacher.safetensors")]
    how = ["--stopping", "dense", "--iterations", "2", "--samples", "4", "--rounds", "1", "--steps", "1"]
    out = tmp_path / "out"
    assert main(["distill", *teacher, *how, "--data", str(data), "--out", str(out), "--quiet"]) == 0
    record = json.loads((out / "report.json").read_text())
    assert (record["student"], record["student_untrained"], record["fine_tune"]) == ("cifar10_resnet8", True, True)
    load_model("cifar10_resnet8", checkpoint=out / "student.safetensors")


def test_a_vit_competes_on_sparse_images(data, tmp_path):
    """The competition changes the images, so that the student learns something else."""
    how = ["--iterations", "4", "--stopping", "2:0.5", "--samples", "4", "--rounds", "1", "--steps", "2"]
    heads = []
    for number, competing in enumerate(([], ["--adaptive", "10"], ["--adaptive", "10", "--js", "exact"])):
        out = tmp_path / str(number)
        assert main(["distill", *how, *competing, "--data", str(data), "--out", str(out), "--quiet"]) == 0
        heads.append(load_file(out / "student.safetensors")["head.weight"])
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def results(out) -> dict:
    """The files that a distillation has written, without what differs between any two of them."""
    report = json.loads((out / "report.json").read_text())
    rounds = [{key: value for key, value in r.items() if "seconds" not in key} for r in report["rounds"]]
    images = InvertedDataset.load(out).images() if (out / "images").exists() else None
    return {"rounds": rounds, "images": images, "student": load_file(out / "student.safetensors")}


def assert_same(found: dict, expected: dict) -> None:
    assert found["rounds"] == expected["rounds"]
    assert torch.equal(found["images"], expected["images"])
    assert found["student"].keys() == expected["student"].keys()
    assert all(torch.equal(value, expected["student"][name]) for name, value in found["student"].items())


def test_sigterm_leaves_a_run_that_goes_on_with_the_same_bits(data, tmp_path, capsys, monkeypatch):
    how = ["distill", "--iterations", "40", "--samples", "4", "--rounds", "2", "--steps", "40", "--data", str(data)]
    how += ["--inversion-batch-size", "2", "--quiet", "--device", "cpu"]
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "smi_fast", *how, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not (out / "checkpoints" / "training.state").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "stopping after this iteration" in (error := process.communicate(timeout=120)[1])
    assert f"to go on: smi-fast distill --resume {out}" in error
    assert process.returncode == 143
    assert not (out / "report.json").exists()
    before = torch.get_num_threads()
    try:
        assert main(["distill", "--resume", str(out)]) == 0  # with the number of threads that it was begun with
        assert torch.get_num_threads() == 1
        table = capsys.readouterr().out
        assert main([*how, "--out", str(whole)]) == 0
    finally:
        torch.set_num_threads(before)
    assert_same(results(out), results(whole))
    capsys.readouterr()
    assert main([*how, "--out", str(out)]) == 0  # it is finished, and says so again
    assert capsys.readouterr().out == table
    assert main([*how, "--out", str(out), "--steps", "41"]) == 2
    assert f"{out} holds a run with other settings: steps is 40, not 41" in capsys.readouterr().err
    assert_same(results(out), results(whole))


def test_a_round_that_is_finished_is_kept_in_the_report(data, inverted, tmp_path, monkeypatch):
    """Ended after the first of two rounds, the run goes on with the second one."""
    out, told = tmp_path / "out", []

    def tell(*args):
        told.append(args)
        if len(told) == 2:
            raise KeyboardInterrupt
        return save_student(*args)

    how = ["distill", "--dataset", str(inverted), "--samples", "5", "--rounds", "2", "--steps", "2"]
    how += ["--data", str(data)]
    how += ["--out", str(out), "--quiet"]
    monkeypatch.setattr("smi_fast.cli.distill.save_student", tell)
    assert main(how) == 130
    assert [r["number"] for r in json.loads((out / "report.json").read_text())["rounds"]] == [1]
    assert main(how) == 0
    assert [r["number"] for r in json.loads((out / "report.json").read_text())["rounds"]] == [1, 2]
    assert len(told) == 3


def test_a_run_knows_its_test_images_wherever_they_lie_and_warns_of_another_number_of_processes(
    data, inverted, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "cifar")
    how = ["distill", "--samples", "5", "--rounds", "1", "--steps", "1", "--out", "out", "--quiet"]
    assert main([*how, "--dataset", str(inverted), "--data", str(data)]) == 0
    whole = results(tmp_path / "out")
    how += ["--dataset", os.path.relpath(inverted), "--data"]
    assert main([*how, "./cifar", "--limit", "20"]) == 0
    assert results(tmp_path / "out") | {"student": 0} == whole | {"student": 0}
    capsys.readouterr()
    assert main([*how, "cifar", "--limit", "19"]) == 2
    assert "other settings: test_images is 20, not 19" in capsys.readouterr().err

    def interrupt(*models, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.cli.distill.distill", interrupt)
    monkeypatch.setattr(Processes, "of_environment", lambda: Processes(dist.HashStore(), 0, 2))
    assert main([*how, "cifar"]) == 130
    assert "warning: the run was begun with processes 1 and goes on with 2" in capsys.readouterr().err


def test_a_damaged_dataset_is_found_before_anything_is_written(student, data, inverted, refused, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray((inverted / "images" / "00000.safetensors").read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    refused(["distill", "--dataset", str(damaged), "--data", str(data), *student[1]], "damaged.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1, got 0"),
        (["--student", "cifar10_vit", "--dataset", "EMPTY"], "no .safetensors"),
        (["--lr", "inf"], "--lr: must be a finite number, got inf"),
        (["--dataset", "INVERTED", "--tv-l2", "1"], "--tv-l2 is a setting of an inversion"),
        (["--dataset", "INVERTED", "--inversion-lr", "1"], "--inversion-lr is a setting of an inversion"),
        (["--dataset", "INVERTED", "--stopping", "dense"], "--stopping is a setting of an inversion"),
        (["--stopping", "nonsense"], "cannot read 'nonsense'"),
        (["--student", "deit_tiny_patch16_224"], "--student-pretrained downloads timm's"),
        (
            ["--student", "test_resnet", "--student-checkpoint", "RESNET"],
            "sparse in patches of 4x4, the student takes patches of 32x32",
        ),
        (["--adaptive", "-1"], "weight must be at least 0 and finite, got -1"),
        (["--dataset", "INVERTED", "--adaptive", "10"], "--adaptive is a setting of an inversion"),
        (["--dataset", "INVERTED", "--objective", "psaq"], "--objective is a setting of an inversion"),
        (["--dataset", "INVERTED", "--until", "0.9", "--check-every", "5"], "--until is a setting of an inversion"),
        (
            ["--dataset", "INVERTED", "--inversion-batch-size", "2"],
            "--inversion-batch-size is a setting of an inversion",
        ),
        (["--checkpoint-every", "0"], "--checkpoint-every: must be more than 0 and finite, got 0"),
        (["--js", "exact"], "--js is a setting of the competition"),
        (["--student-untrained", "--student-pretrained"], "either --student-untrained or --student-pretrained"),
        (["--student", "resnet_of_none", "--student-untrained"], "has no model 'resnet_of_none'"),
        (["--student", "cifar10_resnet8"], "sparse in patches of 4x4, the student takes patches of 32x32"),
        (["--samples", "2147483647"], "--samples: 2147483647 images take"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(arguments, message, data, inverted, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    resnet = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), resnet)
    places = {"RESNET": resnet, "INVERTED": inverted, "EMPTY": tmp_path / "empty"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    refused(["distill", "--data", str(data), *arguments], message)
