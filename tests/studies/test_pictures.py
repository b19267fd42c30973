"""Pictures hold the right pixels in the right places, are written completely, and need matplotlib only for curves."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast.studies.pictures import GAP, save_curve, save_grid, save_process

HISTORY = [dict(iteration=t, loss=5.0 / t, tokens=65.0 if t < 50 else 46.0) for t in range(1, 101)]


def random_images(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def read(path):
    """A PNG as (H, W, 3) uint8."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture).astype(int)


def as_bytes(image):
    """(3, H, W) in [0, 1] as (H, W, 3) in 0 ... 255, rounded to nearest."""
    return np.rint(np.clip(image.double().numpy(), 0, 1).transpose(1, 2, 0) * 255).astype(int)


@pytest.mark.parametrize(("n", "columns", "rows"), [(6, 3, 2), (7, 3, 3), (1, 1, 1), (2, 5, 1)])
def test_a_grid_holds_every_image_in_row_major_order_on_white(seed, tmp_path, n, columns, rows):
    images = random_images(seed, n, 3, 96, 112) * 1.2 - 0.1  # what leaves [0, 1] is clamped
    save_grid(images, tmp_path / "grid.png", columns)
    picture = read(tmp_path / "grid.png")
    columns = min(n, columns)
    assert picture.shape == (GAP + rows * (96 + GAP), GAP + columns * (112 + GAP), 3)
    for i, image in enumerate(images):
        y, x = GAP + i // columns * (96 + GAP), GAP + i % columns * (112 + GAP)
        tile = picture[y : y + 96, x : x + 112]
        assert np.abs(tile - as_bytes(image)).max() <= 1  # float32 against float64
        picture[y : y + 96, x : x + 112] = 255
    assert (picture == 255).all()


@pytest.mark.parametrize(("side", "factor"), [(96, 1), (95, 2), (32, 3), (16, 6), (1, 96)])
def test_small_images_are_enlarged_by_an_integer_factor_each_pixel_a_square(seed, tmp_path, side, factor):
    image = random_images(seed, 1, 3, side, side)
    save_grid(image, tmp_path / "grid.png", 1)
    tile = read(tmp_path / "grid.png")[GAP:-GAP, GAP:-GAP]
    assert np.abs(tile - np.kron(as_bytes(image[0]), np.ones((factor, factor, 1), int))).max() <= 1


def test_labels_stand_left_of_their_rows_and_move_the_images_only(seed, tmp_path):
    images = random_images(seed, 4, 3, 96, 96)
    save_grid(images, tmp_path / "plain.png", 2)
    save_grid(images, tmp_path / "labelled.png", 2, labels=["dense", ""])
    plain, labelled = read(tmp_path / "plain.png"), read(tmp_path / "labelled.png")
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 0
    assert (labelled[:, margin:] == plain).all()
    first, second = labelled[: GAP + 96, :margin], labelled[GAP + 96 :, :margin]
    assert first.min() < 128
    assert (second == 255).all()


@pytest.mark.parametrize("side", [32, 224])
def test_a_process_has_an_image_a_row_and_a_snapshot_a_column_under_its_title(seed, tmp_path, side):
    snapshots = [random_images(seed + s, 2, 3, side, side) for s in range(3)]
    titles = [f"iteration {60 * s} · {45 - s} patches" for s in range(3)]
    save_process(snapshots, tmp_path / "process.png", titles)
    picture = read(tmp_path / "process.png")
    size = side * max(1, 96 // side)
    cell, top = (picture.shape[1] - GAP) // 3, picture.shape[0] - 2 * (size + GAP)
    assert cell >= size + GAP
    for column, snapshot in enumerate(snapshots):
        x = GAP + column * cell + (cell - GAP - size) // 2
        title = picture[:top, x : x + size]
        assert title.min() < 128
        for row, image in enumerate(snapshot):
            tile = picture[top + row * (size + GAP) :][:size, x : x + size]
            expected = np.kron(as_bytes(image), np.ones((size // side, size // side, 1), int))
            assert np.abs(tile - expected).max() <= 1
    for column in range(4):  # no title runs into the gap beside its column
        assert (picture[:top, column * cell : column * cell + GAP] == 255).all()


def test_a_long_title_widens_its_columns_instead_of_being_cut(seed, tmp_path):
    snapshots = [random_images(seed, 1, 3, 96, 96)] * 2
    save_process(snapshots, tmp_path / "process.png", ["a title without a place to break it", "short"])
    picture = read(tmp_path / "process.png")
    cell = (picture.shape[1] - GAP) // 2
    assert cell > 96 + GAP
    for column in range(2):  # the images stand in the middle of their columns
        x = GAP + column * cell + (cell - GAP - 96) // 2
        assert np.abs(picture[-96 - GAP : -GAP, x : x + 96] - as_bytes(snapshots[0][0])).max() <= 1
    assert (picture[:, :GAP] == 255).all()
    assert (picture[:, -GAP:] == 255).all()


def colours(picture):
    """The saturated colours of a picture, that is without its greys."""
    pixels = picture.reshape(-1, 3)
    return {tuple(c) for c in np.unique(pixels[np.ptp(pixels, axis=1) > 100], axis=0).tolist()}


def test_a_curve_shows_loss_and_tokens(tmp_path):
    assert save_curve(HISTORY, tmp_path / "curve.png") is True
    with Image.open(tmp_path / "curve.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert {(0x1F, 0x5F, 0xA8), (0xD9, 0x82, 0x2B)} <= colours(pixels)


def test_the_curve_plots_the_numbers_of_the_history(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    negative = [record | dict(loss=1 - record["iteration"]) for record in HISTORY]
    for history in (HISTORY, HISTORY[:1], negative):
        assert save_curve(history, tmp_path / "curve.png")
        left, right = figures.pop().axes
        for axes, key in ((left, "loss"), (right, "tokens")):
            [line] = axes.lines
            assert list(line.get_xdata()) == [record["iteration"] for record in history]
            assert list(line.get_ydata()) == [record[key] for record in history]
        assert right.lines[0].get_drawstyle() == "steps-post"
        assert left.get_yscale() == ("linear" if history is negative else "log")


def test_a_curve_leaves_the_state_of_pyplot_alone(tmp_path):
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), pyplot.get_backend()
    save_curve(HISTORY, tmp_path / "curve.png")
    assert pyplot.get_fignums() == before
    assert pyplot.get_backend() == backend


def test_without_matplotlib_no_curve_is_written_and_nothing_is_raised(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert save_curve(HISTORY, tmp_path / "curve.png") is False
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_grid(torch.zeros(1, 3, 8, 8), path, 1),
        lambda path: save_process([torch.zeros(1, 3, 8, 8)], path, ["start"]),
        lambda path: save_curve(HISTORY, path),
    ],
    ids=["grid", "process", "curve"],
)
def test_pictures_are_written_completely_or_not_at_all(tmp_path, monkeypatch, save):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        save(tmp_path / "missing" / "picture.png")

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save(path)
    assert path.read_bytes() == b"old"
    save(path)
    with Image.open(path) as picture:
        picture.verify()
    assert os.listdir(tmp_path) == ["picture.png"]


IMAGES = torch.zeros(3, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: save_grid(IMAGES[0], path, 1), r"must be \(N, 3, H, W\) with N > 0, not \(3, 8, 8\)"),
        (lambda path: save_grid(IMAGES[:0], path, 1), "with N > 0"),
        (lambda path: save_grid(IMAGES[:, :1], path, 1), r"not \(3, 1, 8, 8\)"),
        (lambda path: save_grid(IMAGES, path, 0), "columns must be at least 1, not 0"),
        (lambda path: save_grid(IMAGES, path, 2, labels=["a"]), "1 labels for 2 rows"),
        (lambda path: save_process([], path, []), "0 titles for 0 snapshots"),
        (lambda path: save_process([IMAGES], path, ["a", "b"]), "2 titles for 1 snapshots"),
        (lambda path: save_process([IMAGES, IMAGES[:1]], path, ["a", "b"]), "snapshots differ in shape"),
        (lambda path: save_curve([], path), "the history is empty"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "picture.png")
    assert os.listdir(tmp_path) == []
