"""The check of a GPU: its steps end in time, lose nothing, go on where they were, and run whole without a GPU."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakecuda_cases import fake_cuda, needs_fake_cuda

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_check")


def play(check, parts, out, limit=60.0):
    """Run parts as a step called "step" on a GPU called "gpu"."""
    check.STEPS["step"] = lambda settings: iter(parts)
    try:
        return check.run_step("step", check.Settings(out, "gpu", limit=limit))
    finally:
        del check.STEPS["step"]


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(check, capsys, tmp_path):
    python = [sys.executable, "-c"]
    left = tmp_path / "left"
    child = f"import pathlib, time; time.sleep(1); pathlib.Path({str(left)!r}).touch()"
    over = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    parts = [
        check.Part("good", [*python, "import os, journal; print('it says', os.environ['WORD'])"],
                   environment={"WORD": "this"}),
        check.Part("bad", [*python, "raise SystemExit(3)"]),
        check.Part("absent", ["no-such-program-here"], "no-such-program-here"),
        check.Part("no script", [*python, "print(1)"], tmp_path / "script.py"),
        check.Part("out of time", [*python, f"raise SystemExit({check.STOPPED})"]),
        check.Part("last", [*python, "print('still here')"]),
    ]  # fmt: skip
    results = play(check, parts, tmp_path)
    assert [result.verdict for result in results] == [
        "passed", "failed: exit status 3", "not run: no no-such-program-here", "not run: no script.py",
        "stopped: run the step again for what is missing", "passed",
    ]  # fmt: skip
    assert [result.failed for result in results] == [False, True, False, False, False, False]
    text = (tmp_path / "gpu-step.log").read_text()
    assert text.index("== good") < text.index("it says this") < text.index("== bad") < text.index("still here")
    assert "bad: failed: exit status 3" in capsys.readouterr().out

    over, never = play(check, [check.Part("over", [*python, over]), parts[0]], tmp_path / "..", limit=0.5)
    assert (over.verdict, never.verdict) == ("failed: ended after 0.5 s", "failed: no time left")
    assert 0.5 <= over.seconds < 30
    time.sleep(1.2)
    assert not left.exists()  # what a command started ends with it


def test_a_step_goes_on_with_the_parts_that_have_not_passed(check, tmp_path, monkeypatch):
    def counting(name, status):
        program = f"open({str(tmp_path / name)!r}, 'a').write('x'); raise SystemExit({status})"
        return check.Part(name, [sys.executable, "-c", program], repeats=name == "report")

    parts = [counting("good", 0), counting("bad", 1), counting("report", 0)]
    play(check, parts, tmp_path)
    again = play(check, parts, tmp_path)
    assert [len((tmp_path / part.name).read_text()) for part in parts] == [1, 2, 2]
    assert [result.verdict for result in again] == ["passed before", "failed: exit status 1", "passed"]
    monkeypatch.setattr(check, "source", lambda **_: "other code")
    assert play(check, parts, tmp_path)[0].verdict == "passed"
    assert len(list(tmp_path.glob("gpu-check.*.json"))) == 1  # what was written with other code is still there


def test_a_command_whose_gpu_is_lost_goes_on_in_another_process(check, tmp_path):
    """The first process ends by a signal, the second as one that lost its GPU, the third as it should."""
    program = f"""
import os, pathlib, signal
count = pathlib.Path({str(tmp_path / "count")!r})
tries = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (tries + 1))
tries or os.kill(os.getpid(), signal.SIGSEGV)
raise SystemExit({check.DEAD} if tries == 1 else 0)
"""
    part = check.Part("part", [sys.executable, "-c", program])
    (result,) = play(check, [part], tmp_path)
    assert result.verdict == "failed: exit status -11"  # it may do the same again, for ever
    (tmp_path / "count").unlink()
    (result,) = play(check, [part._replace(resumes=True)], tmp_path)
    assert result.verdict == "passed"
    assert (tmp_path / "count").read_text() == "xxx"


def test_commands_stop_before_their_step_ends_and_write_under_the_name_of_the_gpu(check, tmp_path):
    settings = check.Settings(tmp_path, "nvidia-h200")
    assert settings.limit <= 9 * 60
    settings, written = settings._replace(end=time.monotonic() + settings.limit), []
    for name, step in check.STEPS.items():
        for part in step(settings):
            options = dict(itertools.pairwise(part.command))
            written += [options[option] for option in ("--results", "--outcomes", "--output") if option in options]
            for option in {"--stop-after", "--seconds"} & options.keys():
                assert float(options[option]) <= settings.limit - 60, (name, part.name)
    assert [Path(path).name for path in dict.fromkeys(written)] == [
        f"nvidia-h200{ending}" for ending in ("-tests.json", "-tune.json", "-kernels.json", ".md", "-loop.json")
    ]


def test_every_file_of_kernels_has_small_tests_for_the_sanitizer(check):
    """Tests that run on the GPU where there is one. A name that no test has would make the step fail."""
    files = [path for path in ROOT.glob("kernels/*.py") if re.search(r"^def _\w+_kernel\(", path.read_text(), re.M)]
    assert check.SMALL.keys() == {path.stem for path in files}
    for module, names in check.SMALL.items():
        text = (ROOT / "tests" / "kernels" / f"test_{module}.py").read_text()
        for name in names.split(" or "):
            assert re.search(rf"def test_\w*{name}\w*\([^)]*\bbackend\b[^)]*\bdevice\b", text), (module, name)


def test_tests_that_passed_do_not_run_again(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    options = "-q", "-p", "resume", "--outcomes", "outcomes.json", "-p", "no:cacheprovider"
    path = os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = [sys.executable, "-m", "pytest", *options]
    expected = (["-n", "1"], "1 failed, 1 passed"), ([], "1 failed, 1 deselected")
    if importlib.util.find_spec("xdist") is None:
        expected = ([], expected[0][1]), expected[1]
    for more, summary in expected:
        done = subprocess.run(
            [*run, *more], cwd=tmp_path, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert summary in done.stdout, done.stdout + done.stderr
    tests = json.loads((tmp_path / "outcomes.json").read_text())["tests"]
    outcomes = sorted((test["test"].rpartition("::")[2], test["outcome"]) for test in tests)
    assert outcomes == [("test_bad", "failed"), ("test_bad", "failed"), ("test_good", "passed")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_and_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_check.py"), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == "There is no NVIDIA GPU that torch can see, so nothing was checked.\n"
    assert not (tmp_path / "out").exists()


# Triton's launcher would load kernels into a driver that there is not, and cuDNN is not part of the fake runtime.
STARTUP = """
import ctypes, os, sys
if not {"bench/report.py", "-c"} & {*sys.orig_argv}:  # which launch nothing
    import torch
    from triton.runtime.jit import JITFunction
    runtime = ctypes.CDLL(os.environ["FAKECUDA_RUNTIME"])
    runtime.fake_launch.argtypes = [ctypes.c_char_p, ctypes.c_size_t]

    def launch_nothing(self, *args, grid, warmup, **options):
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        runtime.fake_launch(self.__name__.encode(), stream)

    JITFunction.run = launch_nothing
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
"""


# The title of each group of kernels, and how many nodes the graph of smi-fast has: its kernels, and the mean of losses.
GROUPS = {
    "patches through a view, forward": 1,
    "step of the pixels": 2,
    "embedding of tokens, forward and backward": 2,
    "cross-entropy, forward and backward": 3,
}


@needs_fake_cuda
def test_the_whole_check_runs_on_a_runtime_that_computes_nothing(tmp_path):
    """All steps, with a case or two each: whatever is measured has its entry, and no step misses a file."""
    (tmp_path / "sitecustomize.py").write_text(STARTUP)
    environment = fake_cuda(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    environment["TORCHDYNAMO_DISABLE"] = "1"  # what is compiled could not run
    out, table = tmp_path / "out", ROOT / "kernels" / "dispatch.json"
    before = table.read_bytes()
    command = [sys.executable, str(BENCH / "gpu_check.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert table.read_bytes() == before
    name = "an-h100-that-computes-nothing"
    verdicts = {
        (record["step"], record["part"]): record["verdict"]
        for record in json.loads((out / f"{name}-check.json").read_text())["parts"]
    }
    for part in (
        ("tune", "tune"), ("kernels", "compile"), ("kernels", "benchmarks"), ("kernels", "report"),
        ("loop", "benchmarks"), ("loop", "report"),
    ):  # fmt: skip
        assert verdicts[part] == "passed", done.stdout + (out / f"{name}-{part[0]}.log").read_text()[-3000:]
    (test,) = json.loads((out / f"{name}-tests.json").read_text())["tests"]
    assert test["outcome"] == "failed"  # it compares numbers, and there are none
    assert "test_gpu_rounds" in test["test"]

    tuned = json.loads((out / f"{name}-dispatch.json").read_text())["sm_90"]
    assert tuned["source"] == "measured on an H100 that computes nothing: all but attention (select_tokens_backward)"
    times = json.loads((out / f"{name}-tune.json").read_text())["timed"]
    assert tuned["select_tokens_backward"][0] in [record["row"] for record in times]

    measured = json.loads((out / f"{name}-kernels.json").read_text())["benchmarks"]
    assert {(entry["extra_info"]["title"], entry["extra_info"]["contestant"]) for entry in measured} == {
        *((title, name) for title in GROUPS for name in ("smi-fast", "torch", "torch.compile")),
        ("patches through a view, forward", "torch, reshaped"),
    }
    for entry in measured:
        # Each event of the runtime is 1 ms behind the last, and a graph has as many calls as fit the time for set-up.
        (cold,) = entry["stats"]["data"]
        assert round(1e-3 / cold, 6) in range(1, 17)
        assert entry["extra_info"]["warm_ms"] == 1 / 16
    ours = [entry["extra_info"] for entry in measured if entry["extra_info"]["contestant"] == "smi-fast"]
    assert {facts["title"]: facts["nodes"] for facts in ours} == GROUPS

    loop = {entry["extra_info"]["contestant"]: entry["extra_info"]
            for entry in json.loads((out / f"{name}-loop.json").read_text())["benchmarks"]}  # fmt: skip
    assert 100 < loop["smi-fast"]["nodes"] < loop["plain PyTorch, compiled"]["nodes"]
    report = (out / f"{name}.md").read_text()
    assert "### patches through a view, forward: 32 x 137 of 196 patches" in report
    assert "### inversion, one iteration: " in report
    assert "needs --smi-checkout" in report
