"""reproduce(): the page shows every comparison and says what was measured, and an interruption costs nothing."""

import json
import re
import shutil
import signal
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast import InvertedDataset
from smi_fast.data.files import read_sealed
from smi_fast.quantization import quantize
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped
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
    for name in (
        "Table 1",
        "Table 2",
        "Table 3",
        "Table 4 and Fig. 4",
        "Table 5",
        "Tables 6 and 7",
        "Table 8",
        "Fig. 8",
    ):
        assert f"## {name}:" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    drawn = {"table3", "table4", "figure8", "hallucination", "which_patches"}
    assert {picture.removesuffix(".png") for picture in pictures} - {"figure9"} == drawn  # it needs scikit-learn
    for picture in pictures:
        assert Image.open(out / picture).size[0] > 100


def test_the_page_says_over_how_much_its_figures_are(out):
    page = (out / "page.md").read_text()
    assert "over 2 seeds" in page
    assert "the whole test split" in page
    assert "7 random images of the test split" in page
    assert "teacher" in page
    assert str(out) not in page
    assert "The student is student. It knows nothing. The sections took" in page


def test_accuracies_are_those_of_the_saved_images(models, data, out):
    images, labels = read_test_images(data, models[0])
    rows = {row[0]: row for row in result(out, "table3").rows}
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:7]
    images, labels = images[chosen], labels[chosen]
    for kind in ("dense", "sparse"):
        for seed in range(2):
            batch = InvertedDataset.load(out / "inverted" / f"{kind}-4" / f"{seed:05}.safetensors")
            for bits, measured in zip(((8, 8), (4, 8), (4, 4)), rows[f"{kind} inversion"][7:10], strict=True):
                logits = quantize(models[0], batch, *bits)(images)
                assert measured[seed] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert len(batch) == 4
    assert batch.positions.numel() == 4 * 2
    assert rows["sparse inversion"][1] == pytest.approx(100 * (1 - 2 / 16))


def test_the_next_call_goes_on_after_an_interruption(models, data, tiny, tmp_path, monkeypatch):
    out, wanted = tmp_path / "out", ["table8", "figure8"]

    def interrupt(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(SECTIONS, "table8", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reproduce(models[0], data, out, settings=tiny, sections=["figure8", "table8"], progress=False)
    assert "## Fig. 8" in (out / "page.md").read_text()
    assert "## Table 8" not in (out / "page.md").read_text()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.suffix in (".json", ".safetensors")}
    page = reproduce(models[0], data, out, settings=tiny, sections=wanted, progress=False).read_text()
    assert page.index("## Fig. 8") < page.index("## Table 8")
    assert {file: file.read_bytes() for file in before} == before


def test_a_run_that_stops_after_every_checkpoint_ends_with_the_same_figures(models, data, tiny, tmp_path, monkeypatch):
    inversion = replace(tiny.inversion, iterations=2)
    settings = replace(
        tiny, inversion=inversion, images=2, samples=2, seeds=1, rounds=1, more_rounds=2, steps=2, test_images=3
    )
    how = {"student": models[1], "settings": settings, "progress": False, "sections": ["table3", "table4", "removal"]}
    reproduce(models[0], data, tmp_path / "whole", **how)
    save, stops = Run.save, 0

    def saved(run, name, state):
        save(run, name, state)
        if state.get("step") != settings.steps:  # then the student is measured, which no checkpoint divides
            run.signals.asked = signal.SIGTERM

    monkeypatch.setattr(Run, "save", saved)
    while not (tmp_path / "out" / "sections" / "removal.json").exists():
        with suppress(Stopped):
            reproduce(models[0], data, tmp_path / "out", **how, checkpoint_every=1e-9)
        stops += 1
        assert stops < 120
    evaluations, iterations, transfers, removals = 2 + 7 * 3, 5 * 2 + 2 * 2, (6 + 3 + 1) * 2, 2
    assert stops >= evaluations + iterations + transfers + removals
    whole, ours = ({name: result(tmp_path / out, name) for name in how["sections"]} for out in ("whole", "out"))
    assert ours["removal"].rows == whole["removal"].rows
    assert (ours["table4"].rows, ours["table4"].curves) == (whole["table4"].rows, whole["table4"].curves)
    for mine, theirs in zip(ours["table3"].rows, whole["table3"].rows, strict=True):
        assert (mine[:2], mine[7:]) == (theirs[:2], theirs[7:])  # between them are speeds and memory
    for kind in ("dense", "sparse"):
        mine, theirs = (InvertedDataset.load(tmp_path / out / "inverted" / f"{kind}-2") for out in ("out", "whole"))
        assert torch.equal(mine.images(), theirs.images())


def test_a_damaged_section_is_made_again_with_a_warning_that_names_its_file(models, data, tiny, tmp_path):
    how = {"settings": tiny, "progress": False, "sections": ["figure8"]}
    reproduce(models[0], data, tmp_path, **how)
    file, expected = tmp_path / "sections" / "figure8.json", replace(result(tmp_path, "figure8"), seconds=0)
    record = json.loads(file.read_text())
    record["rows"][0][1] += 1
    for damaged in (json.dumps(record), file.read_text()[:100]):
        file.write_text(damaged)
        with pytest.warns(UserWarning, match=rf"{file} is damaged.*; the section is made again"):
            reproduce(models[0], data, tmp_path, **how)
        assert replace(result(tmp_path, "figure8"), seconds=0) == expected


def test_a_second_run_in_the_folder_is_refused(models, data, tiny, tmp_path, monkeypatch):
    messages = []

    def again(run):
        with pytest.raises(ValueError, match="is in use by another run of this process") as error:
            reproduce(models[0], data, tmp_path, settings=tiny, sections=["figure8"], progress=False)
        messages.append(str(error.value))
        return Section("", "", {}, [])

    monkeypatch.setitem(SECTIONS, "figure8", again)
    reproduce(models[0], data, tmp_path, settings=tiny, sections=["figure8"], progress=False)
    assert len(messages) == 1


def test_overwrite_begins_anew_and_leaves_other_files(models, data, tiny, tmp_path):
    settings = replace(tiny, inversion=replace(tiny.inversion, iterations=2))
    how = {"sections": ["removal"], "progress": False}
    reproduce(models[0], data, tmp_path, settings=settings, **how)
    (tmp_path / "thesis.md").write_text("mine")
    (tmp_path / "sections" / ".0123456789abcdef0123456789abcdef.partial").write_text("of a killed process")
    other = replace(settings, removal_images=5)
    reproduce(models[0], data, tmp_path, settings=other, overwrite=True, **how)
    assert "5 random images" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "thesis.md").read_text() == "mine"
    assert not list(tmp_path.rglob("*.partial"))


def test_without_a_student_transfers_are_left_out(models, data, tiny, tmp_path):
    sections = ["table4", "table5", "figure8"]
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
    with pytest.raises(ValueError, match=r"other settings: lr is 0\.1, not 0\.2"):
        reproduce(teacher, data, out, student=student, settings=other, progress=False)
    with pytest.raises(ValueError, match="other settings: seeds is 2, not 3"):
        reproduce(teacher, data, out, student=student, settings=replace(tiny, seeds=3), progress=False)
    with pytest.raises(ValueError, match="other settings: weights is"):
        reproduce(vit("teacher"), data, out, student=student, settings=tiny, progress=False)
    others = shutil.copytree(data, tmp_path / "others" / data.name)
    (others / "train" / "a" / "0.png").rename(others / "train" / "a" / "9.png")
    with pytest.raises(ValueError, match="other settings: train_split_files is"):
        reproduce(teacher, others, out, student=student, settings=tiny, progress=False)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    shutil.rmtree(others.parent)
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        reproduce(teacher, data, tmp_path, settings=tiny, progress=False)


def test_another_machine_or_folder_of_the_images_is_no_other_run(models, data, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "images")
    how = {"settings": tiny, "progress": False, "sections": ["figure8"]}
    reproduce(models[0], data, "out", **how)
    monkeypatch.setitem(SECTIONS, "figure8", None)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.9")
    with pytest.warns(UserWarning, match="begun with versions .* and goes on with"):
        page = reproduce(models[0], "./images", "out", **how)
    assert "the data are images. The sections took" in page.read_text()
    assert "python 3.99.9" in page.read_text()


def test_damaged_results_are_named(models, data, tiny, tmp_path):
    (tmp_path / "run.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
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
    assert (paper.images, paper.rounds, paper.samples, paper.batch_size, paper.student_lr) == (32, 110, 128, 128, 0.1)
    assert paper.test_images is None
