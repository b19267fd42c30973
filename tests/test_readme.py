"""What the README shows runs, and what it counts is so."""

import re
from pathlib import Path

import torch
from test_vit_coverage import NAMES, UNSUPPORTED

README = (Path(__file__).parent.parent / "README.md").read_text()
# without a download, and at a tiny number of iterations
SHORTER = {"pretrained=True": "pretrained=False", "100: 0.3, 200: 0.3, 300: 0.3": "", "50: 0.3": "1: 0.3", "4000": "2"}


def test_the_examples_in_python_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = "\n".join(blocks)
    for text, shorter in SHORTER.items():
        assert text in code
        code = code.replace(text, shorter)
    names = {}
    exec(code, names)
    assert len(blocks) == 8
    assert names["keep"].shape == (2, 137)
    assert names["logits"].shape == (2, 1000)
    assert names["result"].images.shape == (2, 3, 224, 224)
    assert names["result"].keep.shape == (2, 137)
    assert torch.isfinite(names["result"].losses).all()
    assert names["kept"].cu_seqlens.tolist() == [0, 47, 71, 118]
    assert (names["kept"].values[0] == names["tokens"][0]).all()
    assert names["last"].shape == (3, 3, 64)


def test_the_number_of_supported_models_is_the_one_that_the_coverage_test_walks():
    assert f"all {len(NAMES)} names" in README
    assert all(name in README for name in UNSUPPORTED)


def test_the_files_and_pictures_that_it_links_to_are_there():
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) >= 4
    for link in links:
        assert link.startswith("http") or (root / link).exists(), link
