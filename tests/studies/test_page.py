"""Pages in Markdown: cells, tables, and what is left of a page without matplotlib."""

import sys
from dataclasses import asdict

import numpy as np
import torch

from smi_fast.studies.page import Section, cell, table, write_page


def test_a_cell_is_mean_and_deviation(seed):
    values = torch.rand(5, dtype=torch.float64).tolist()
    assert cell(values, ".3f") == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert cell([1.25], ".1f") == cell(1.25, ".1f") == "1.2"
    assert cell([4, None, 6], ".0f") == "5 ± 1 (2 of 3 seeds)"
    assert cell([None, None], ".0f") == "not reached"
    assert table({"a": "", "b": "d"}, [["x", 3]]) == "| a | b |\n| :--- | ---: |\n| x | 3 |"


def test_a_page_without_matplotlib_has_its_tables(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = {"x": "x", "y": "y", "lines": {"": [[1], [2], [0]]}}
    write_page(tmp_path / "page.md", "T", "I", {"one": Section("One", "text", {"a": "d"}, [[1]], panels=[panel])})
    assert (tmp_path / "page.md").read_text() == "# T\n\nI\n\n## One\n\ntext\n\n| a |\n| ---: |\n| 1 |\n"
    assert asdict(Section("One", "text", {}, []))["curves"] == {}
