"""What README shows runs, word for word, and what it names is there."""

import re
import shutil
from pathlib import Path

from page_cases import FEWER_ITERATIONS, ROOT, run_commands, run_python, work_offline

import smi_fast

README = (ROOT / "README.md").read_text()
WRITES_TO = {"data", "results"}


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def copy_of_the_checkout(folder: Path) -> None:
    for name in ("README.md", "pyproject.toml", "docs", "examples", "kernels", "smi_fast"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)


def test_all_blocks_run_in_a_clean_folder_and_again_in_a_checkout(tmp_path, monkeypatch, seed):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    work_offline(monkeypatch)
    for again in (False, True):
        if again:
            copy_of_the_checkout(here)
        before = files(here)
        names = run_python("README.md")
        assert names["result"].images.shape == (2, 3, 32, 32)
        assert names["result"].losses.isfinite().all()
        assert names["keep"].shape == (8, 19)
        assert names["logits"].shape == (8, 10)
        run_commands("README.md", tmp_path / "stubs")
        if not again:
            run_commands("docs/command_line.md", tmp_path / "stubs")
        assert len(smi_fast.InvertedDataset.load("results/demo")) == 20
        assert {path.parts[0] for path in files(here) - before} <= WRITES_TO
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(f"/{folder}/" in ignored for folder in WRITES_TO)


def test_the_example_is_short_and_says_how_many_iterations():
    [block] = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert any(text in block for text in FEWER_ITERATIONS)
    assert sum(bool(line) for line in block.splitlines()) <= 10


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    texts = [path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"))]
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", "\n".join(texts), flags=re.MULTILINE))
    assert {"demo", "docs", "test", "lint"} <= named
    assert named <= targets


def test_readme_fits_three_screens():
    assert len(README.splitlines()) <= 150
