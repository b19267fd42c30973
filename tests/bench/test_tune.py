"""The dispatch table is written from what is measured or compiled, and read as it was written."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from smi_fast.kernels import dispatch
from smi_fast.kernels.dispatch import choose, choose_attention, nearest, override

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("tune")


@pytest.fixture
def empty_table(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "TABLE", tmp_path / "dispatch.json")
    return dispatch.TABLE


def test_the_shipped_table_is_as_the_script_writes_it(tune):
    text = dispatch.TABLE.read_text()
    assert tune.as_json(json.loads(text)) == text


def test_neighbours_that_choose_the_same_become_one_row(tune):
    rows = [{"up_to": 16, "BN": 16}, {"up_to": 32, "BN": 32}, {"up_to": 64, "BN": 32}, {"up_to": 80, "BN": 16}]
    assert tune.merged(rows) == [{"up_to": 16, "BN": 16}, {"up_to": 64, "BN": 32}, {"up_to": 80, "BN": 16}]


def test_the_fastest_faultless_candidate_replaces_its_row_only(tune, empty_table, monkeypatch, tmp_path):
    kept = {"up_to": 4096, "dtype": "half", "head_dim": 128, "BN": 32, "num_warps": 8}
    before = tune.as_json({"sm_90": {"source": "old", "class_attention_forward": [kept]}})
    empty_table.write_text(before)
    monkeypatch.setattr(tune, "occupancies", lambda arch, operation, rows, *_: [1.0] * len(rows))
    # The fastest, of 4 warps, shows a fault in another than the plainest case; of 8 warps, none does.
    monkeypatch.setattr(tune, "faulty", lambda arch, operation, rows, _: [row.get("num_warps") == 4 for row in rows])
    seconds = {4: 1e-6, 8: 2e-6, 2: 3e-6}

    measurements = []

    def measured(operation, row):
        measurements.append(row)
        if row["num_warps"] == 4 and row["BN"] == 64:
            raise RuntimeError("out of resources")
        return seconds.get(row.get("num_warps"), 4e-6) + row.get("BN", 0) * 1e-9

    monkeypatch.setattr(tune, "seconds_on_gpu", measured)
    monkeypatch.setattr(tune, "in_order", lambda: [("some", ["class_attention_forward"], tune.KINDS[0])])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(dispatch, "table", lambda: {"sm_80": {}, "sm_90": {}})
    monkeypatch.setattr(tune, "answers", lambda device: True)
    results, copied = tmp_path / "times.json", tmp_path / "copy.json"
    monkeypatch.setattr("sys.argv", ["tune.py", "--results", str(results), "--copy", str(copied)])
    tune.main()
    table = json.loads(empty_table.read_text())
    assert copied.read_text() == empty_table.read_text()
    assert table["sm_90"]["source"] == "measured on a GPU: some (class_attention_forward)"
    failed = [record for record in json.loads(results.read_text())["timed"] if record["seconds"] is None]
    assert {record["failed"] for record in failed} == {"RuntimeError: out of resources"}
    count = len(measurements)
    empty_table.write_text(before)
    tune.main()  # goes on from the file: nothing is measured again
    assert len(measurements) == count
    assert json.loads(empty_table.read_text()) == table
    best = {"up_to": 4096, **tune.KINDS[0], "BN": 32, "num_warps": 8}
    assert table["sm_90"]["class_attention_forward"] == [kept, best]


TIMED = """
import json, sys
import tune
from resources import job, target
from triton import compile
from triton.runtime import driver

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: target("sm_90"))

if __name__ == "__main__":
    driver.set_active(Driver())
    purpose, (row, *_) = tune.rows_to_fill("select_tokens_backward", {})[0]
    (launch,) = tune.timed_launches("select_tokens_backward", row)
    one = job(launch, "sm_90")
    ahead = compile(one.source, target=target(one.arch), options=one.options)
    timed = launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments)
    print(json.dumps([ahead.hash, timed.hash]))
"""


def test_what_is_compiled_ahead_is_what_triton_looks_for_when_it_is_timed():
    """Under the key of its cache on disk."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCH), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", TIMED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ahead, timed = json.loads(done.stdout)
    assert ahead == timed


def test_without_a_usable_candidate_nothing_is_entered(tune, monkeypatch):
    monkeypatch.setattr(tune, "occupancies", lambda arch, operation, rows, *_: [0.0] * len(rows))
    with pytest.raises(RuntimeError, match="attention_forward"):
        tune.best("sm_90", "attention_forward", tune.KINDS[0], 1, None)


@pytest.mark.parametrize("operation", [
    "attention_forward", "attention_backward", "class_attention_forward", "class_attention_backward",
    "select_tokens", "select_tokens_backward", "gather_patches", "gather_patches_backward", "pixel_step",
    "residual_norm", "residual_norm_backward", "bias_gelu", "bias_gelu_backward",
    "embed_tokens", "embed_tokens_backward", "cross_entropy", "cross_entropy_backward",
    "patch_entropy", "patch_entropy_backward",
])  # fmt: skip
def test_timed_calls_run_and_give_the_shapes_of_the_operation(operation, tune, monkeypatch, seed):
    for name, value in (("BATCH", 2), ("HEADS", 1), ("CHANNELS", 16)):
        monkeypatch.setattr(tune, name, value)
    size = (1, 4, 4) if operation.startswith(("gather", "pixel")) else 20
    monkeypatch.setitem(tune.OPERATIONS, operation, {64: size})
    # Few programs of the pixels' step, because each is interpreted.
    tiles = {"BT": 64, "BE": 16, "PER_SM": 1, "num_warps": 4}
    with override(dict.fromkeys(("prior_sums", "pixel_step"), ("", tiles))):
        results = tune.call_of(operation, {"up_to": 64, "dtype": "float32", "head_dim": 16}, CPU)()
    for x in results if isinstance(results, tuple) else (results,):
        assert x.isfinite().all()
    main = results[0] if isinstance(results, tuple) else results
    expected = {
        "attention_forward": (40, 1, 16),
        "attention_backward": (40, 3, 1, 16),
        "class_attention_forward": (2, 1, 16),
        "class_attention_backward": (2, 1, 16),
        "select_tokens": (2 * 15, 16),
        "select_tokens_backward": (2, 197, 16),
        "gather_patches": (2 * 95, 16),
        "gather_patches_backward": (2, 1, 56, 56),
        "pixel_step": (),
        **dict.fromkeys(("residual_norm", "residual_norm_backward", "bias_gelu", "bias_gelu_backward"), (2, 47, 20)),
        "embed_tokens": (2 * 47, 20),
        "embed_tokens_backward": (2 * 46, 20),
        "cross_entropy": (),
        "cross_entropy_backward": (2, 20),
        "patch_entropy": (2,),
        "patch_entropy_backward": (2 * 96, 1, 20),
    }
    assert main.shape == expected[operation]


def test_every_candidate_holds_what_its_row_is_for(tune):
    """A tile that holds fewer tokens than a sequence has would leave the rest unread and unwritten."""
    for operation in tune.OPERATIONS:
        for purpose, rows in tune.rows_to_fill(operation, tune.KINDS[0] if operation in tune.ATTENTION else {}):
            assert rows
            for row in rows:
                if row.get("form") == "tile" or operation == "select_tokens":
                    assert row["BN"] >= purpose["up_to"]
                if row.get("form") == "rows":
                    assert row["BM"] >= purpose["up_to"]
                if tune.OPERATIONS[operation] is tune.WIDTHS:
                    assert row["BC"] >= purpose["up_to"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "sm_90"), ((8, 7), "sm_86"), ((10, 3), "sm_100"), ((12, 1), "sm_120"), ((7, 5), "sm_80")],
)
def test_an_unknown_gpu_takes_the_nearest_older_architecture(capability, expected):
    assert nearest(*capability) == expected


def test_the_least_sufficient_row_is_chosen_unless_overridden():
    rows = [
        row
        for row in dispatch.table()["sm_90"]["attention_backward"]
        if (row["dtype"], row["head_dim"]) == ("half", 64)
    ]
    for size in (1, 64, 65, 197, 4096):
        row = min((row for row in rows if row["up_to"] >= size), key=lambda row: row["up_to"])
        qkv = torch.empty(size, 3, 2, 48, dtype=torch.bfloat16)
        form, constants = choose_attention("attention_backward", qkv, size)
        assert form == row["form"]
        assert constants.items() <= row.items()
        constants["BN"] = -1  # a copy: the table stays as it is
    assert choose_attention("attention_backward", qkv, 1)[1].get("BN") != -1
    with override({"attention_backward": ("other", {"BN": 3})}):
        assert choose_attention("attention_backward", qkv, 1) == ("other", {"BN": 3})
    assert choose_attention("attention_backward", qkv, 1)[0] != "other"
    with pytest.raises(ValueError, match="4097"):
        choose("attention_backward", CPU, 4097, dtype="half", head_dim=64)
