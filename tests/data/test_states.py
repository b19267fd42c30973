"""States come back from their files as they were, or the file is named as damaged."""

import math

import pytest
import torch
from torch import nn

from smi_fast.data.states import load_state, model_checksum, save_state


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.fixture
def state(seed):
    shared = torch.randn(4, 6)
    return {
        "text": "α \0 \"", "numbers": [1, -(2**70), 0.1, math.inf, math.nan, True, None], "empty": {}, "none": [],
        "tensors": {"views": [shared, shared[1], shared.T], "scalar": torch.tensor(3, dtype=torch.int64)},
        "dtypes": [torch.randn(3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool)],
        "by number": {0: {"exp_avg": torch.zeros(0, 3)}, 1: "one"}, "tensor": {"tensor": 5}, "dict": {"dict": []},
        "tuple": (1, (2, 3)),
    }  # fmt: skip


def test_a_state_comes_back_as_it_was(state, tmp_path):
    save_state(tmp_path / "a.state", state)
    found = load_state(tmp_path / "a.state")
    assert same(state, found)
    found["tensors"]["views"][0].zero_()  # memory of its own
    assert same(state, load_state(tmp_path / "a.state"))


def test_an_optimizer_goes_on_from_a_file(seed, tmp_path):
    def trained(steps: int, layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            layer(torch.full((2, 3), float(step))).square().sum().backward()
            optimizer.step()

    torch.manual_seed(seed)
    ours = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1)
    trained(3, ours, optimizer)
    save_state(tmp_path / "a", {"model": ours.state_dict(), "optimizer": optimizer.state_dict()})
    theirs, saved = nn.Linear(3, 2), load_state(tmp_path / "a")
    again = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    theirs.load_state_dict(saved["model"]), again.load_state_dict(saved["optimizer"])
    trained(3, ours, optimizer), trained(3, theirs, again)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_every_flipped_bit_and_every_cut_is_found(tmp_path, seed):
    file, damaged = tmp_path / "a.state", tmp_path / "b.state"
    state = {"iteration": 7, "images": torch.randn(2, 3), "name": "x"}
    save_state(file, state)
    whole = file.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        for changed in (content, whole[:place]):
            damaged.write_bytes(changed)
            try:
                found = load_state(damaged)
            except ValueError as error:
                found = str(error)
            assert str(damaged) in found if isinstance(found, str) else same(found, state)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, torch.float32, lambda: 0])
def test_what_no_file_can_hold_is_named(value, tmp_path):
    with pytest.raises(TypeError, match=f"a state cannot hold .* {type(value).__name__}"):
        save_state(tmp_path / "a", {"deep": [value]})
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.state"):
        load_state(tmp_path / "none.state")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text: not a complete saved state"):
        load_state(tmp_path / "text")


def test_a_checksum_of_weights_changes_with_any_of_them(seed):
    layer = nn.BatchNorm1d(3)
    before = model_checksum(layer)
    layer.running_mean[2] += 1e-6
    assert model_checksum(layer) != before
