"""The rows of docs/compatibility.md: what happens to an accelerated model in each tool, as the tests have checked it.

A test declares its row with `@tool`. `python tests/compatibility.py` writes the page from the rows of all tests.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

import smi_fast
from smi_fast import kernels

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
OURS, TIMMS, NEITHER, REFUSED = "our speed", "timm's speed", "the same answer", "refused"
TABLES = {  # the title of each table, and the module whose tests make its rows
    "timm's methods and utilities": "backbones.test_timms_tools",
    "Modules, parameters and training in torch": "backbones.test_torchs_tools",
    "Compilers and tracers": "backbones.test_compilers",
}
INTRODUCTION = """# Which tools take an accelerated model

What `smi_fast.accelerate` returns is a timm model. Each line below is a test that compares what the model gives in a
tool with what timm's own model gives there: the same answer at our speed, the same answer at timm's speed, or a
`smi_fast.UnsupportedModelError` that says why there is none.
"""


@dataclass(frozen=True)
class Row:
    """A line of a table: the tool, what happens (`OURS`, `TIMMS`, `NEITHER` or `REFUSED`), and what there is to say."""

    tool: str
    outcome: str
    remark: str


ROWS: dict[str, list[Row]] = {module: [] for module in TABLES.values()}


def tool(name: str, outcome: str, remark: str = "") -> Callable:
    """Declare the row of a test, and check its outcome: whether attentions of ours run in the test.

    They run if it is OURS, and do not if it is TIMMS. If it is REFUSED, the test raises the error, whose sentence is
    the remark. NEITHER stands for tools that run no forward pass.
    """

    def declare(test: Callable) -> Callable:
        module = "backbones." + test.__module__.rpartition(".")[2]
        ROWS[module] = [row for row in ROWS[module] if row.tool != name] + [Row(name, outcome, remark)]

        @functools.wraps(test)
        def checked(*args, **kwargs):
            ran = Ran()
            with ran:
                if outcome == REFUSED:
                    with pytest.raises(smi_fast.UnsupportedModelError) as error:
                        test(*args, **kwargs)
                    assert str(error.value) == remark
                else:
                    test(*args, **kwargs)
            assert outcome in (NEITHER, REFUSED) or (ran.count > 0) == (outcome == OURS)

        return checked

    return declare


class Ran:
    """Counts the attentions of ours that run while it is entered."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self.patches = [
            mock.patch.object(kernels, name, self.counting(getattr(kernels, name)))
            for name in ("attention", "class_attention")
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()

    def counting(self, function: Callable) -> Callable:
        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counted


def page() -> str:
    """Return the text of docs/compatibility.md."""
    text = INTRODUCTION
    for title, module in TABLES.items():
        importlib.import_module(module)
        text += f"\n## {title}\n\n| tool | what happens | remark |\n| --- | --- | --- |\n"
        text += "".join(f"| {row.tool} | {row.outcome} | {row.remark} |\n" for row in ROWS[module])
    return text


if __name__ == "__main__":
    sys.modules["compatibility"] = sys.modules["__main__"]
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    PAGE.write_text(page())
