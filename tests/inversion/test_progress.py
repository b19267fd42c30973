"""The progress of an inversion shows its loss and its tokens, without a terminal in whole lines."""

import re

import pytest
import torch
from inversion_cases import small_model

from smi_fast import Inverter, deep_inversion
from smi_fast.inversion.progress import Bar
from smi_fast.inversion.state import Stage


@pytest.fixture(autouse=True)
def _every_line(monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")


def test_without_a_terminal_each_line_has_iteration_tokens_and_loss(capsys, seed):
    inverter = Inverter(small_model(), stopping={3: 0.5}, iterations=6)
    result = inverter.run([0, 1], seed)
    text = capsys.readouterr().err
    assert not {"\r", "\x1b"} & set(text)
    lines = text.splitlines()
    assert lines[0].startswith("inverting:  17% 1/6 [")
    assert f"loss={result.losses[0]:.3f}, tokens=17]" in lines[0]
    assert re.match(r"inverting: 100% 6/6 \[00:\d\d<00:00, +[\d.]+(it/s|s/it), ", lines[-1])
    assert lines[-1].endswith(f", loss={result.losses[-1]:.3f}, tokens=9]")  # 8 patches and the class token
    assert text.endswith("\n")


def test_a_run_that_goes_on_begins_its_count_where_it_was(capsys, seed):
    inverter, states = Inverter(small_model(), stopping="dense", iterations=6), []
    inverter.run([0], seed, lambda step: states.append(step.state_dict()))
    capsys.readouterr()
    inverter.run([0], seed, state=states[3])
    assert capsys.readouterr().err.startswith("inverting:  83% 5/6 [")


def test_a_stream_counts_its_images(capsys, seed):
    objective = deep_inversion(norm="image")
    inverter = Inverter(small_model(), objective=objective, until=0.99, stopping="dense", iterations=6)
    inverter.stream([0, 1, 2], 2, seed)
    assert re.match(r"inverting: 100% 3/3 \[.*image", capsys.readouterr().err.splitlines()[-1])


def test_a_bar_for_several_processes_goes_to_what_they_have_done_together(capsys):
    with Bar.of(4000, 100, shown=True) as bar:
        bar.to(350)
        bar.advance(Stage(0, 10, 4, 5), torch.tensor(2.5))
    assert bar.n == 351
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("inverting:   9% 350/4000")
    assert lines[-1].startswith("inverting:   9% 351/4000")
    assert "loss=2.500, tokens=5" in lines[-1]


def test_what_is_not_shown_writes_nothing_and_never_waits_for_a_loss(capsys):
    with Bar.of(10, 0, shown=False) as bar:
        bar.advance(Stage(0, 10, 4, 5), loss=None)
        bar.to(5)
    assert capsys.readouterr().err == ""
