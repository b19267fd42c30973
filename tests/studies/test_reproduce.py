"""smi-fast reproduce: the page says what was measured, figures are right, and an interruption costs nothing."""

import json
import re
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from smi_fast import InvertedDataset, Inverter, StoppingSchedule, accelerate
from smi_fast.quantization import quantize
from smi_fast.studies.experiment import Experiment, Settings, strategic
from smi_fast.studies.page import Section, cell, table, write_page
from smi_fast.studies.reproduce import PRESETS, SECTIONS, inversion_seconds, removal_losses, reproduce, table5

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TINY = Settings(
    iterations=20, lr=0.1, tv_l2=1e-3, images=4, seeds=2, test_images=None, rounds=2, samples=4, steps=3, batch_size=4,
    real_images=6, ablation_seeds=2, ablation_test_images=7, ablation_steps=2, fractions=(0.5,), removal_images=8,
    speed_models=(), speed_batches=(2,), speed_iterations=2,
)  # fmt: skip


def vit(name: str, **other) -> VisionTransformer:
    size = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3) | other
    model = VisionTransformer(**size).eval()
    model.pretrained_cfg = {
        "architecture": name, "input_size": (3, 16, 16), "mean": MEAN, "std": STD, "interpolation": "bicubic",
        "crop_pct": 1.0, "num_classes": 3,
    }  # fmt: skip
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(int(np.random.SeedSequence().entropy % 2**31))
    return vit("teacher"), vit("student")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng()
    for split, label, number in ((s, c, n) for s in ("train", "test") for c in "abc" for n in range(4)):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def out(models, data, tmp_path_factory):
    """The folder of a whole run."""
    out = tmp_path_factory.mktemp("results") / "out"
    teacher, student = models
    note = "It knows nothing."
    page = reproduce(teacher, data, out, student=student, student_note=note, settings=TINY, progress=False)
    assert page == out / "page.md"
    return out


def result(out, name: str) -> Section:
    return Section(**json.loads((out / "sections" / f"{name}.json").read_text()))


def read_test_images(data) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised, without the code under test."""
    files = sorted((data / "test").glob("*/*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels - mean) / std, torch.tensor(["abc".index(file.parent.name) for file in files])


def test_the_page_shows_every_comparison_and_each_of_its_pictures_is_there(out):
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


def test_the_page_says_of_its_figures_over_how_much_they_are(out):
    page = (out / "page.md").read_text()
    assert "over 2 seeds" in page
    assert "the whole test split" in page
    assert "7 random images of the test split" in page
    assert "teacher" in page
    assert "student" in page
    assert str(out) not in page
    assert "with the student student. It knows nothing." in page


def test_the_tables_figures_are_those_of_the_saved_images_and_the_whole_test_split(models, data, out):
    images, labels = read_test_images(data)
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


def test_the_loss_after_a_removal_is_that_of_timms_blocks_on_the_patches_that_are_left(seed, device):
    model = vit("random").to(device)
    images, targets = torch.randn(5, 3, 16, 16), torch.randint(3, (5,))
    batches = [(images[:3], targets[:3]), (images[3:], targets[3:])]
    measured = removal_losses(accelerate(model), batches, counts=(5,))
    x = model.pos_embed[:, 1:] + model.patch_embed(images.to(device))
    prefix = (model.cls_token + model.pos_embed[:, :1]).expand(5, -1, -1)
    before = model.blocks[:-1](torch.cat((prefix, x), 1))
    attn = model.blocks[-1].attn
    q, k, _ = attn.qkv(model.blocks[-1].norm1(before)).reshape(5, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    order = (q[:, :, :1] @ k.mT / 4).softmax(-1).mean(1)[:, 0, 1:].argsort(1)
    for kept, (loss, accuracy) in zip((None, order[:, -5:], order[:, :5]), measured, strict=False):
        part = x if kept is None else x.gather(1, kept[..., None].expand(-1, -1, 32))
        logits = model.forward_head(model.norm(model.blocks(torch.cat((prefix, part), 1)))).cpu()
        assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-3)
        assert accuracy == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())


def test_lowest_attention_keeps_what_attention_stops_and_random_neither(seed):
    kept = {}
    for strategy in ("attention", "lowest attention", "random"):
        fast = strategic(accelerate(vit_of(seed)), strategy, seed)
        inverter = Inverter(fast, stopping=StoppingSchedule({2: 0.5}), iterations=4, seed=seed, progress=False)
        kept[strategy] = inverter.run(torch.zeros(6, dtype=torch.int64)).keep.sort(1).values
    both = torch.cat((kept["attention"], kept["lowest attention"]), 1).sort(1).values
    assert torch.equal(both, torch.arange(16).expand(6, -1))
    assert not torch.equal(kept["random"], kept["attention"])
    assert not torch.equal(kept["random"], kept["lowest attention"])


def vit_of(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return vit("same")


def test_speed_weighs_each_stage_by_its_length_and_ignores_outliers(monkeypatch):
    class Clock:
        """Iterations that take 1 s before the first stopping, 0.5 s and then 0.25 s; the first of a stage takes 9 s."""

        def __init__(self, fast, *, stopping, iterations, progress):
            self.starts, self.iterations = [0, *stopping.stops], iterations

        def run(self, targets, callback):
            assert len(targets) == 8
            now, stage = 0.0, -1
            for iteration in range(self.iterations):
                stage += iteration in self.starts
                now += 9 if iteration in self.starts else (1, 0.5, 0.25)[stage]
                callback(SimpleNamespace(seconds=lambda now=now: now))
            return SimpleNamespace(interrupted=False)

    monkeypatch.setattr(sys.modules["smi_fast.reproduce"], "Inverter", Clock)
    schedule = StoppingSchedule({50: 0.3, 300: 0.3})
    assert inversion_seconds(None, schedule, 4000, 8, 5) == pytest.approx(50 + 250 * 0.5 + 3700 * 0.25)


def test_real_images_are_left_with_the_patches_of_most_attention(models, data, tmp_path):
    run = Experiment(*models, data, None, tmp_path, TINY, False)
    whole = run.real(6, seed=1)
    part = run.attended(whole, 5)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    _, attention = accelerate(models[0])((whole.images() - mean) / std, return_attention=True)
    for number, image in enumerate(part.images()):
        kept = part[number][1].long()
        dropped = torch.tensor([cell for cell in range(16) if cell not in kept])
        assert len(kept) == 5
        assert attention[number, kept].min() >= attention[number, dropped].max()
        seen = torch.zeros(16).index_fill(0, kept, 1).view(1, 4, 1, 4, 1).expand(3, 4, 4, 4, 4).reshape(3, 16, 16)
        assert torch.equal(image, whole.images([number])[0] * seen)
    assert torch.equal(part.targets, whole.targets)


def test_batches_of_different_sizes_share_no_image(models, data, tmp_path):
    settings = replace(TINY, iterations=1)
    run = Experiment(*models, data, None, tmp_path, settings, progress=False)
    two, three = (run.inverted(run.dense, 0, count).images().flatten(1) for count in (2, 3))
    assert torch.cdist(two, three).min() > 3  # of independent noise, about 9


def test_table_5_counts_to_the_first_round_that_reaches_the_dense_best(seed):
    curves = {
        "dense inversion": [[10.0, 30.0, 20.0], [50.0, 40.0, 45.0]],
        "sparse inversion": [[30.0, 5.0, 99.0], [1.0] * 3],
    }
    speeds = {"dense": 2.0, "sparse": 8.0}
    run = SimpleNamespace(
        settings=replace(TINY, rounds=3, samples=10, iterations=40),
        section=lambda name, make: Section("", "", {}, [], curves=curves),
        inverted=lambda variant, *_: SimpleNamespace(metadata={"iterations_per_second": speeds[variant.name]}),
        dense=SimpleNamespace(name="dense"),
        sparse=SimpleNamespace(name="sparse"),
    )
    assert table5(run).rows == [
        ["dense", [20, 10], [80, 40], [40.0, 20.0]],
        ["sparse", [10, None], [40, None], [5.0, None]],
    ]


def test_a_cell_is_mean_and_sample_deviation_and_counts_what_was_reached(seed):
    values = torch.rand(5, dtype=torch.float64).tolist()
    assert cell(values, ".3f") == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert cell([1.25], ".1f") == cell(1.25, ".1f") == "1.2"
    assert cell([4, None, 6], ".0f") == "5 ± 1 (2 of 3 seeds)"
    assert cell([None, None], ".0f") == "not reached"
    assert table({"a": "", "b": "d"}, [["x", 3]]) == "| a | b |\n| :--- | ---: |\n| x | 3 |"


def test_an_interruption_leaves_a_page_of_what_was_finished_and_the_next_call_goes_on(
    models, data, tmp_path, monkeypatch
):
    out, wanted = tmp_path / "out", ["table8", "table6"]

    def interrupt(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(SECTIONS, "table8", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reproduce(models[0], data, out, settings=TINY, sections=["table6", "table8"], progress=False)
    assert "## Table 6" in (out / "page.md").read_text()
    assert "## Table 8" not in (out / "page.md").read_text()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.suffix in (".json", ".safetensors")}
    page = reproduce(models[0], data, out, settings=TINY, sections=wanted, progress=False).read_text()
    assert page.index("## Table 6") < page.index("## Table 8")
    assert {file: file.read_bytes() for file in before} == before


def test_an_interrupted_inversion_is_not_kept(models, data, tmp_path, monkeypatch):
    run = Experiment(models[0], None, data, None, tmp_path, TINY, False)

    def interrupt(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.report.StageMeter.__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.inverted(run.sparse, 0, 4)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_a_student_transfers_are_left_out(models, data, tmp_path):
    page = reproduce(
        models[0], data, tmp_path / "out", settings=TINY, sections=["table4", "table5", "table6"], progress=False
    )
    text = page.read_text()
    assert "## Table 4" not in text
    assert "## Table 5" not in text
    assert "no student" in text


def test_results_of_other_arguments_are_refused_and_stay_as_they_are(models, data, out, tmp_path):
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"holds results of lr 0\.1, not 0\.2"):
        reproduce(*models[:1], data, out, student=models[1], settings=replace(TINY, lr=0.2), progress=False)
    with pytest.raises(ValueError, match="holds results of weights"):
        reproduce(vit("teacher"), data, out, student=models[1], settings=TINY, progress=False)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    (tmp_path / "thesis.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        reproduce(models[0], data, tmp_path, settings=TINY, progress=False)


def test_results_that_are_damaged_are_named(models, data, tmp_path):
    (tmp_path / "about.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"about\.json is damaged"):
        reproduce(models[0], data, tmp_path, settings=TINY, progress=False)


def test_bad_input_is_named_before_anything_is_written(models, data, tmp_path):
    for arguments, message in (
        ({"settings": "fast"}, "'fast'"),
        ({"sections": ["table9"]}, "no section 'table9'"),
        ({"data": tmp_path / "nowhere"}, "nowhere"),
        ({"student": vit("coarse", patch_size=8)}, "patches of 4x4, the student of 8x8"),
        ({"student": vit("wide", num_classes=4)}, "3 classes, the model has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduce(
                models[0], **{"data": data, "out": tmp_path / "out", "settings": TINY, "progress": False} | arguments
            )
    assert not (tmp_path / "out").exists()


def test_the_papers_preset_has_the_published_settings():
    paper = PRESETS["paper"]
    assert (paper.iterations, paper.lr, paper.tv_l2, paper.images) == (4000, 0.25, 1e-4, 32)
    assert (paper.rounds, paper.samples, paper.steps, paper.batch_size) == (1000, 100, 1, 32)
    assert paper.test_images is None


def test_a_page_without_matplotlib_has_its_tables(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    panel = {"x": "x", "y": "y", "lines": {"": [[1], [2], [0]]}}
    write_page(tmp_path / "page.md", "T", "I", {"one": Section("One", "text", {"a": "d"}, [[1]], panels=[panel])})
    assert (tmp_path / "page.md").read_text() == "# T\n\nI\n\n## One\n\ntext\n\n| a |\n| ---: |\n| 1 |\n"
    assert asdict(Section("One", "text", {}, []))["curves"] == {}
