"""The pages of the documentation: their examples run, their commands are understood, and what they link to is there."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch
from backbones.test_coverage import NAMES, UNSUPPORTED
from page_cases import ROOT, run_python, work_offline

import smi_fast.cli
from smi_fast import kernels

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OTHERS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/METHOD.md",
    "bench/LOG.md",
    "smi_fast/models/README.md",
]
EVERYWHERE = [*OTHERS, *(f"docs/{page}" for page in PAGES)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    work_offline(monkeypatch)


@pytest.mark.parametrize("page", ["adaptive.md", "psaq.md", "rebirth.md", "runs.md", "sparse.md"])
def test_examples_of_methods_run(page, seed):
    assert run_python(f"docs/{page}")["result"].images.isfinite().all()


def test_the_example_of_a_long_run_writes_its_folder(tmp_path):
    assert run_python("docs/long_runs.md")["target"] == 3
    assert len(list((tmp_path / "results" / "from-python" / "images").iterdir())) == 2


def test_the_example_of_the_forward_pass_computes_on_kept_patches(seed):
    names = run_python("docs/forward.md")
    fast, images, keep = names["fast"], names["images"], names["keep"]
    assert keep.shape == (8, 58)
    assert names["tokens"]["blocks.3"].values.shape == (8 * 59, 192)
    blackened = images.clone()  # what is not kept is not read
    for image, kept in zip(blackened, keep, strict=True):
        stopped = torch.ones(196, dtype=torch.bool).index_fill_(0, kept, False).view(14, 14)
        image[:, stopped.repeat_interleave(16, 0).repeat_interleave(16, 1)] = 0
    torch.testing.assert_close(fast(blackened, keep=keep), fast(images, keep=keep))


def test_the_examples_of_an_inversion_keep_the_patches_of_the_schedule(seed):
    names = run_python("docs/inversion.md")
    assert names["importance"].shape == (8, 196)
    assert names["result"].images.shape == (2, 3, 224, 224)
    assert names["result"].keep.shape == names["keep"].shape == (2, 66)  # three of the four stoppings
    assert names["result"].losses.isfinite().all()


def test_the_example_of_a_dataset_reads_what_it_saved(seed):
    names = run_python("docs/dataset.md")
    assert sorted(target for _, _, target in names["dataset"]) == [3, 8]
    assert names["logits"].shape == (2, 10)


def test_the_example_of_the_kernels_selects_packed_tokens(seed):
    names = run_python("docs/kernels.md")
    assert names["kept"].cu_seqlens.tolist() == [0, 47, 71, 118]
    assert (names["kept"].values[0] == names["tokens"][0]).all()
    assert names["last"].shape == (3, 3, 64)
    assert names["hidden"].shape == (364, 768)


def commands(page: str) -> list[str]:
    """The commands of smi-fast in the code of a page: in its blocks, and in lines that are set in by four blanks."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    code = re.findall(r"^```(?:sh|text)?\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in code for line in "".join(block).splitlines()]
    return [line for line in lines if re.match(r"smi-fast (?!\[)", line)]


def test_commands_are_understood():
    found = [command for page in EVERYWHERE for command in commands(page)]
    assert len(found) >= 12
    for command in found:
        words = shlex.split(command, comments=True)
        assert smi_fast.cli._parser().parse_args(words[1:], argparse.Namespace()).run, command


@pytest.mark.parametrize("page", EVERYWHERE)
def test_linked_files_are_there(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        elsewhere = link.startswith(("http", "../../actions/"))  # README's badge: an address of GitHub's
        assert elsewhere or ((ROOT / page).parent / link).exists(), link


def test_an_index_names_every_page():
    """docs/README.md, or the README.md of a folder on the way to the page."""
    pages = [DOCS / page for page in PAGES if page != "README.md"]
    indices = {index.parent: index.read_text() for index in DOCS.rglob("README.md")}
    assert [page for page in pages if not any(links_to(page, folder, text) for folder, text in indices.items())] == []


def links_to(page: Path, folder: Path, text: str) -> bool:
    return page.is_relative_to(folder) and f"({page.relative_to(folder).as_posix()})" in text


def test_the_site_leads_to_every_page():
    site = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in PAGES if f": {page}\n" not in site] == []


def test_the_reference_has_each_public_name_once():
    named = re.findall(r"^::: ([\w.]+)$", "\n".join(path.read_text() for path in DOCS.glob("api/*.md")), re.MULTILINE)
    named = [re.sub(r"^kernels\.(\w+)\.\1$", r"kernels.\1", name) for name in named]  # a function, not its module
    public = [f"smi_fast.{name}" for name in smi_fast.__all__] + [f"kernels.{name}" for name in kernels.__all__]
    assert sorted(named) == sorted(public)


def test_the_supported_models_are_those_of_the_coverage_test():
    support = (DOCS / "support.md").read_text()
    assert f"all {len(NAMES)} names" in support
    assert all(name in support for name in UNSUPPORTED)
