"""Pictures hold the right pixels in the right places, and are written completely or not at all."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast.studies import pictures
from smi_fast.studies.pictures import FONT, GAP, fitted, save_animation, save_classes, save_grid, save_process


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
def test_small_images_are_enlarged_pixel_by_pixel(seed, tmp_path, side, factor):
    image = random_images(seed, 1, 3, side, side)
    save_grid(image, tmp_path / "grid.png", 1)
    tile = read(tmp_path / "grid.png")[GAP:-GAP, GAP:-GAP]
    assert np.abs(tile - np.kron(as_bytes(image[0]), np.ones((factor, factor, 1), int))).max() <= 1


def test_labels_stand_left_of_their_rows(seed, tmp_path):
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
def test_a_process_has_a_row_an_image(seed, tmp_path, side):
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


def places(picture, image):
    """Where an image (3, H, W) stands in a picture: the (y, x) of its upper left corner."""
    pixels, (height, width) = as_bytes(image), image.shape[1:]
    likely = np.argwhere((np.abs(picture[: 1 - height, : 1 - width] - pixels[0, 0]) <= 1).all(2))
    return [(y, x) for y, x in likely if np.abs(picture[y : y + height, x : x + width] - pixels).max() <= 1]


def test_images_of_a_class_stand_side_by_side_under_its_name(seed, tmp_path):
    images = random_images(seed, 6, 3, 96, 96)
    save_classes(images, ["church"] * 2 + ["tench"] * 2 + [""] * 2, tmp_path / "classes.png")
    picture = read(tmp_path / "classes.png")
    found = [place for image in images for place in places(picture, image)]
    assert len(found) == 6
    y = found[0][0]
    assert [place[0] for place in found] == [y] * 6
    assert [second[1] - first[1] for first, second in zip(found[::2], found[1::2], strict=True)] == [96 + GAP] * 3
    for number, (_, left) in enumerate(found[::2]):
        title = picture[:y, left : left + 192]
        assert (title.min() < 128) == (number < 2)


def test_titles_stand_over_the_columns_of_a_grid(seed, tmp_path):
    images = random_images(seed, 4, 3, 96, 96)
    save_grid(images, tmp_path / "grid.png", 2, titles=["golf_ball of a very long name indeed", ""])
    picture = read(tmp_path / "grid.png")
    (place,), (right,) = places(picture, images[0]), places(picture, images[1])
    assert picture[: place[0], : place[1] + 96].min() < 128
    assert picture[: place[0], right[1] :].min() == 255


def test_many_classes_break_into_lines(seed, tmp_path):
    images = random_images(seed, 10, 3, 224, 224)
    save_classes(images, [f"name {number}" for number in range(10)], tmp_path / "classes.png")
    picture = read(tmp_path / "classes.png")
    assert picture.shape[1] <= pictures.WIDTH
    (first,), (last,) = places(picture[:260], images[0]), places(picture[260:], images[9])
    assert last[1] - first[1] == 4 * (224 + 3 * GAP)


def test_very_many_images_are_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 4 * 96 * 96)
    images = torch.rand(12, 3, 96, 96)
    save_grid(images, tmp_path / "grid.png", 4)
    picture = read(tmp_path / "grid.png")
    assert picture.shape == (GAP + 3 * (48 + GAP), GAP + 4 * (48 + GAP), 3)
    means = np.stack([as_bytes(image) for image in images[:1]])[0].reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(picture[GAP : GAP + 48, GAP : GAP + 48] - means).max() <= 1


@pytest.mark.parametrize("width", [60, 100, 300])
def test_a_long_name_is_broken_or_cut_to_its_width(width):
    name = "black-and-tan coonhound_with a very long name indeed"
    lines = fitted(name, width).split("\n")
    assert len(lines) <= 2
    assert all(FONT.getlength(line) <= width for line in lines)
    whole = " ".join(lines)
    assert whole == name.replace("_", " ") if width == 300 else whole.endswith("…")
    assert fitted("tench", width) == "tench"


def test_an_animation_shows_each_snapshot_as_it_is(seed, tmp_path):
    snapshots = [random_images(seed + s, 2, 3, 32, 32) for s in range(3)]
    save_animation(snapshots, tmp_path / "process.webp", ["start", "middle", "end"], ["cat", "ship"])
    with Image.open(tmp_path / "process.webp") as film:
        assert (film.format, film.n_frames, film.info["loop"]) == ("WEBP", 3, 0)
        for number, snapshot in enumerate(snapshots):
            film.seek(number)
            frame = np.asarray(film.convert("RGBA")).astype(int)
            opaque = frame[..., 3] == 255
            rows, columns = np.nonzero(opaque[-100:].all(1)), np.nonzero(opaque[-60])
            assert rows[0].size == 0  # between the images the ground is seen through
            size = 96
            left = columns[0].min()
            bottom = np.nonzero(opaque[:, left + 50])[0].max() + 1
            tile = frame[bottom - size : bottom, left : left + size, :3]
            assert np.abs(tile - np.kron(as_bytes(snapshot[0]), np.ones((3, 3, 1), int))).max() <= 1


def test_a_long_title_widens_an_animation_instead_of_being_cut(seed, tmp_path):
    for title in ("iteration 1", "iteration 1 · " * 4):
        save_animation([random_images(seed, 1, 3, 32, 32)], tmp_path / "process.webp", [title], ["cat"])
        with Image.open(tmp_path / "process.webp") as film:
            opacity = np.asarray(film.convert("RGBA"))[: pictures.HEAD, :, 3]
        written = np.nonzero(opacity.any(0))[0]
        assert len(written) > 0
        assert written.max() < opacity.shape[1] - GAP
        assert written.max() > 0.9 * pictures.LARGE_FONT.getlength(title.rstrip(" ·"))


def test_an_animation_of_large_images_is_coarser_if_it_would_be_too_large(seed, tmp_path, monkeypatch):
    snapshots, sizes = [random_images(seed + s, 2, 3, 96, 96) for s in range(2)], []
    for largest in (10**6, 1):
        monkeypatch.setattr(pictures, "MAX_BYTES", largest)
        save_animation(snapshots, tmp_path / "process.webp", ["start", "end"], ["cat", "ship"])
        sizes.append((tmp_path / "process.webp").stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_grid(torch.zeros(1, 3, 8, 8), path, 1),
        lambda path: save_classes(torch.zeros(1, 3, 8, 8), ["cat"], path),
        lambda path: save_process([torch.zeros(1, 3, 8, 8)], path, ["start"]),
        lambda path: save_animation([torch.zeros(1, 3, 8, 8)], path, ["start"], ["cat"]),
    ],
    ids=["grid", "classes", "process", "animation"],
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
        (lambda path: save_grid(IMAGES[0], path, 1), r"\(N, 3, H, W\) or \(N, 1, H, W\) with N > 0, not \(3, 8, 8\)"),
        (lambda path: save_grid(IMAGES[:0], path, 1), "with N > 0"),
        (lambda path: save_grid(IMAGES[:, :2], path, 1), r"not \(3, 2, 8, 8\)"),
        (lambda path: save_grid(IMAGES, path, 0), "columns must be at least 1, not 0"),
        (lambda path: save_grid(IMAGES, path, 2, labels=["a"]), "1 labels for 2 rows"),
        (lambda path: save_grid(IMAGES, path, 3, titles=["a"]), "1 titles for 3 columns"),
        (lambda path: save_classes(IMAGES, ["a"], path), "1 names for 3 images"),
        (lambda path: save_process([IMAGES], path, ["a"], ["b"]), "1 names for 3 images"),
        (lambda path: save_animation([IMAGES], path, [], []), "0 titles for 1 snapshots"),
        (lambda path: save_process([], path, []), "0 titles for 0 snapshots"),
        (lambda path: save_process([IMAGES], path, ["a", "b"]), "2 titles for 1 snapshots"),
        (lambda path: save_process([IMAGES, IMAGES[:1]], path, ["a", "b"]), "snapshots differ in shape"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "picture.png")
    assert os.listdir(tmp_path) == []


def test_grey_images_are_shown_in_grey(seed, tmp_path):
    grey = random_images(seed, 2, 1, 96, 96)
    save_grid(grey, tmp_path / "grey.png", 2)
    save_grid(grey.repeat(1, 3, 1, 1), tmp_path / "same.png", 2)
    assert (read(tmp_path / "grey.png") == read(tmp_path / "same.png")).all()
