"""reproduce(): the page shows every comparison and says what was measured, and an interruption costs nothing."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast import InvertedDataset
from smi_fast.data.files import read_sealed
from smi_fast.quantization import quantize
from smi_fast.studies.page import Section
from smi_fast.studies.reproduce import PRESETS, SECTIONS, reproduce


@pytest.fixture(scope="module")
def out(models, data, tiny, tmp_path_factory):
    """The folder of a whole run."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("results") / "out"
    note = "It knows nothing."
    page = reproduce(models[0], data, out, student=models[1], student_note=note, settings=tiny, progress=False)
    assert page == out / "page.md"
    return out


def result(out, name: str) -> Section:
    return Section(**read_sealed(out / "sections" / f"{name}.json"))


def read_test_images(data, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised test images and their labels, without the code under test."""
    files = sorted((data / "test").glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std, torch.tensor(["abc".index(file.parent.name) for file in files])


def test_the_page_shows_every_comparison_with_its_pictures(out):
    page = (out / "page.md").read_text()
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == [
        result(out, name).title for name in SECTIONS
    ]
    for number in ("Table 2", "Table 3", "Table 4", "Table 5", "Table 6", "Table 7", "Table 8", "Fig. 8"):
        assert f"## {number}:" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == ["table3.png", "table4.png", "table7.png", "figure8.png"]
    for picture in pictures:
        assert Image.open(out / picture).size[0] > 100


def test_the_page_says_over_how_much_its_figures_are(out):
    page = (out / "page.md").read_text()
    assert "over 2 seeds" in page
    assert "the whole test split" in page
    assert "7 random images of the test split" in page
    assert "teacher" in page
    assert str(out) not in page
    assert "with the student student. It knows nothing." in page


def test_accuracies_are_those_of_the_saved_images(models, data, out):
    images, labels = read_test_images(data, models[0])
    rows = {row[0]: row for row in result(out, "table3").rows}
    for kind in ("dense", "sparse"):
        for seed in range(2):
            batch = InvertedDataset.load(out / "inverted" / f"{kind}-4" / f"{seed:05}.safetensors")
            for bits, measured in zip((8, 4), rows[f"{kind} inversion"][-2:], strict=True):
                logits = quantize(models[0], batch, bits, 8)(images)
                assert measured[seed] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert len(batch) == 4
    assert batch.positions.numel() == 4 * 2
    assert rows["sparse inversion"][1] == pytest.approx(100 * (1 - 2 / 16))


def test_the_next_call_goes_on_after_an_interruption(models, data, tiny, tmp_path, monkeypatch):
    out, wanted = tmp_path / "out", ["table8", "table6"]

    def interrupt(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(SECTIONS, "table8", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reproduce(models[0], data, out, settings=tiny, sections=["table6", "table8"], progress=False)
    assert "## Table 6" in (out / "page.md").read_text()
    assert "## Table 8" not in (out / "page.md").read_text()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.suffix in (".json", ".safetensors")}
    page = reproduce(models[0], data, out, settings=tiny, sections=wanted, progress=False).read_text()
    assert page.index("## Table 6") < page.index("## Table 8")
    assert {file: file.read_bytes() for file in before} == before


def test_without_a_student_transfers_are_left_out(models, data, tiny, tmp_path):
    sections = ["table4", "table5", "table6"]
    text = reproduce(
        models[0], data, tmp_path / "out", settings=tiny, sections=sections, progress=False
    ).read_text()  # fmt: skip
    assert "## Table 4" not in text
    assert "## Table 5" not in text
    assert "no student" in text


def test_results_of_other_arguments_are_refused_and_stay(models, vit, data, tiny, out, tmp_path):
    teacher, student = models
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    other = replace(tiny, inversion=replace(tiny.inversion, lr=0.2))
    with pytest.raises(ValueError, match=r"holds results of lr 0\.1, not 0\.2"):
        reproduce(teacher, data, out, student=student, settings=other, progress=False)
    with pytest.raises(ValueError, match="holds results of seeds 2, not 3"):
        reproduce(teacher, data, out, student=student, settings=replace(tiny, seeds=3), progress=False)
    with pytest.raises(ValueError, match="holds results of weights"):
        reproduce(vit("teacher"), data, out, student=student, settings=tiny, progress=False)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        reproduce(teacher, data, tmp_path, settings=tiny, progress=False)


def test_damaged_results_are_named(models, data, tiny, tmp_path):
    (tmp_path / "about.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"about\.json is damaged"):
        reproduce(models[0], data, tmp_path, settings=tiny, progress=False)


def test_bad_input_is_named_before_anything_is_written(models, vit, data, tiny, tmp_path):
    fixed = {"data": data, "out": tmp_path / "out", "settings": tiny, "progress": False}
    for arguments, message in (
        ({"settings": "fast"}, "'fast'"),
        ({"sections": ["table9"]}, "no section 'table9'"),
        ({"data": tmp_path / "nowhere"}, "nowhere"),
        ({"student": vit("coarse", patch_size=8)}, "patches of 4x4, the student of 8x8"),
        ({"student": vit("wide", num_classes=4)}, "3 classes, the model has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduce(models[0], **fixed | arguments)
    assert not (tmp_path / "out").exists()


def test_the_papers_preset_has_the_published_settings():
    paper = PRESETS["paper"]
    assert (paper.inversion.iterations, paper.inversion.lr, paper.inversion.objective.tv_l2) == (4000, 0.25, 1e-4)
    assert (paper.images, paper.rounds, paper.samples, paper.steps, paper.batch_size) == (32, 1000, 100, 1, 32)
    assert paper.test_images is None
