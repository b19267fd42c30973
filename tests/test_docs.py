"""The pages of the documentation: their examples run, their commands are understood, and what they link to is there."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

import smi_fast.cli

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
FEWER = ("iterations=600", "iterations=6")
RUN = ("rebirth.md", "runs.md", "sparse.md")  # the other pages' examples need downloads or long runs


@pytest.mark.parametrize("page", RUN)
def test_examples_run(page, seed):
    text = (DOCS / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names = {}
    for block in blocks:
        assert FEWER[0] in block
        exec(block.replace(*FEWER), names)
    assert names["result"].images.isfinite().all()


def test_commands_are_understood():
    lines = [line.strip() for page in PAGES for line in (DOCS / page).read_text().splitlines()]
    commands = [line for line in lines if re.match(r"smi-fast (?!\[)", line)]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command, comments=True)
        assert smi_fast.cli._parser().parse_args(words[1:], argparse.Namespace()).run, command


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_are_there(page):
    text = (DOCS / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        assert link.startswith("http") or (DOCS / link).exists(), link


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in index] == []
