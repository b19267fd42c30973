"""The notebook runs from top to bottom, and is saved with the pictures that it draws."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "quickstart.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def fewer(iterations: re.Match) -> str:
    return f"iterations={int(iterations[1]) // 5}"


def test_all_cells_run_and_the_model_is_sure_of_the_images(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    names = {}
    for cell in CODE:
        exec(re.sub(r"iterations=(\d+)", fewer, "".join(cell["source"])), names)
    assert names["result"].keep.shape == (10, 14)
    assert names["confidence"].min() > 0.5
    assert len(names["reborn"].images) == 40
    assert names["same"] >= 8


def test_it_is_saved_with_its_pictures_and_without_errors():
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 4
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
