"""The page of a run shows its images and figures, and needs nothing but its folder."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast import InvertedDataset
from smi_fast.studies import run_page
from smi_fast.studies.pictures import GREY
from smi_fast.studies.run_page import save_page

NAMES = {0: "<script>alert('0')</script>", 2: "golf_ball"}


@pytest.fixture
def dataset(seed) -> InvertedDataset:
    keep = torch.tensor([[0, 1], [1, 3], [2, 0]])
    return InvertedDataset.from_images(torch.rand(3, 3, 8, 8), keep, torch.tensor([0, 0, 2]), (4, 4))


@pytest.fixture
def page(dataset, tmp_path):
    """A function that writes a page, with the losses given, and returns its text."""

    def write(losses=(8.0, 4.0, 2.0), pictures=("grid.png", "process.png", "process.webp")) -> str:
        stage = {"start": 0, "end": 3, "patches": 4, "tokens": 5, "pooling": 1, "iterations_per_second": 7.0}
        costs = {"speedup_over_dense": 1.0, "gflop_per_iteration": 2.0, "gflop_paper": 1.5, "peak_memory_bytes": 2**20}
        report = {
            "model": "a&b", "count": 3, "missing": 5, "classified_as_target": 2 / 3, "mean_confidence": 0.5, "seed": 4,
            "settings": {"lr": 0.1, "objective": {"name": "x<y"}}, "versions": {"torch": "2"}, "loss": list(losses),
            "images": {"target": [0, 0, 2], "predicted": [0, 0, 1], "confidence": [0.7, 0.6, 0.2], "iterations": [3]},
            "stages": [stage | costs],
        }  # fmt: skip
        save_page(tmp_path / "index.html", report, dataset, NAMES, [(0, 3, 5)], pictures)
        return (tmp_path / "index.html").read_text()

    return write


def test_each_image_is_in_the_page_with_its_class_and_confidence(page, dataset):
    figures = re.findall(r"<figure>(.*?)</figure>", page())
    shown = [text for figure in figures for text in re.findall('base64,([^"]+)', figure)]
    for text, image in zip(shown, dataset.images(stopped=GREY), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == np.rint(image.numpy().transpose(1, 2, 0) * 255)).all()
    assert ["0.700" in figures[0], "0.600" in figures[1], "0.200" in figures[2]] == [True] * 3
    assert "golf ball" in figures[2]
    assert ["seen as" in figure for figure in figures] == [False, False, True]
    assert "seen as class 1" in figures[2]


def test_a_page_runs_nothing_and_loads_nothing_from_elsewhere(page):
    text = page()
    assert "<script" not in text
    assert "a&amp;b" in text
    assert "x&lt;y" in text
    links = re.findall(r'(?:src|href)="([^"]+)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert {link for link in links if not link.startswith("data:image/webp")} == {
        "grid.png", "process.png", "process.webp", "report.json"
    }  # fmt: skip
    assert "process.webp" not in page(pictures=("grid.png",))


@pytest.mark.parametrize("losses", [(8.0, 4.0, 2.0), (4.0, 1.0, -2.0), (6.0, None, 2.0)])
def test_a_curve_goes_through_its_points(page, losses):
    line = re.search(r'<polyline points="([^"]+)" stroke="var\(--blue\)"', page(losses))[1]
    x, y = np.array([[float(number) for number in point.split(",")] for point in line.split()]).T
    there = [number for number, loss in enumerate(losses) if loss is not None]
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), np.array(there) / 2, atol=0.01)
    assert y[0] < y[-1]
    middle = (y[1:-1] - y[0]) / (y[-1] - y[0])  # of the logarithms, or of negative losses themselves
    np.testing.assert_allclose(middle, [0.5] * (len(there) - 2), atol=0.01)


def test_a_page_of_many_images_says_how_many_it_shows(page, monkeypatch):
    assert "images are shown" not in page()
    assert "The run is not finished: 5 images are yet to come." in page()
    monkeypatch.setattr(run_page, "MAX_IMAGES", 2)
    assert "2 of 3 images are shown" in page()


def test_a_run_without_a_finite_loss_has_a_page(page):
    assert 'stroke="var(--blue)"' not in page((None, None, None))


def test_grey_images_have_a_page(page, dataset, monkeypatch):
    grey = InvertedDataset.from_images(torch.rand(3, 1, 8, 8), torch.tensor([[0, 1]] * 3), dataset.targets, (4, 4))
    monkeypatch.setattr(dataset, "images", grey.images)
    for text, image in zip(re.findall('base64,([^"]+)', page()), grey.images(stopped=GREY), strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == np.rint(image.numpy().transpose(1, 2, 0) * 255)).all()  # in each of three channels
