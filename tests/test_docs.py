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


def run(page: str) -> dict:
    """Run the examples of a page with fewer iterations, and return the names that they define."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    names = {}
    for block in blocks:
        assert FEWER[0] in block
        exec(block.replace(*FEWER), names)
    return names


@pytest.mark.parametrize("page", RUN)
def test_examples_run(page, seed):
    assert run(page)["result"].images.isfinite().all()


def test_the_example_of_a_long_run_writes_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("long_runs.md")["target"] == 3
    assert len(list((tmp_path / "results" / "from-python" / "images").iterdir())) == 2


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
