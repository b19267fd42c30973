"""Plots show the numbers that they are given, leave pyplot alone, and need matplotlib only where it is there."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

from smi_fast.studies.plots import save_accuracy, save_curve, save_panels, save_points, save_ranges

pytest.importorskip("matplotlib")
LOSSES, TOKENS = [5.0 / t for t in range(1, 101)], [65.0 if t < 50 else 46.0 for t in range(100)]
POINTS = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([0, 2])
PLOTS = {
    "curve": lambda path: save_curve(LOSSES, TOKENS, path),
    "accuracy": lambda path: save_accuracy({"student": [(32, 0.5), (64, 0.75)]}, path),
    "ranges": lambda path: save_ranges({"noise": {"input": (-2.0, 3.0), "output": (0.0, 1.0)}}, path),
    "points": lambda path: save_points({"real": POINTS, "sparse": POINTS}, ["cat", "dog", "owl"], path),
    "panels": lambda path: save_panels([{"x": "x", "y": "y", "lines": {"": [[1, 2], [3, 4], [0, 1]]}}], path),
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written."""
    from matplotlib.figure import Figure

    written, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (written.append(self), savefig(self, *a, **k)))
    return written


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_whole_png_or_no_file(name, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        PLOTS[name](tmp_path / "missing" / "plot.png")

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            PLOTS[name](tmp_path / "plot.png")
    assert os.listdir(tmp_path) == []
    assert PLOTS[name](tmp_path / "plot.png") is True
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        picture.verify()


@pytest.mark.parametrize("name", PLOTS)
def test_without_matplotlib_nothing_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert PLOTS[name](tmp_path / "plot.png") is False
    assert os.listdir(tmp_path) == []


def test_pyplot_stays_as_it_is(tmp_path):
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), pyplot.get_backend()
    for name, save in PLOTS.items():
        save(tmp_path / f"{name}.png")
    assert pyplot.get_fignums() == before
    assert pyplot.get_backend() == backend


def test_a_curve_shows_loss_and_tokens(tmp_path):
    save_curve(LOSSES, TOKENS, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()
    assert {(0x1F, 0x5F, 0xA8), (0xD9, 0x82, 0x2B)} <= set(map(tuple, pixels))


def test_a_curve_plots_every_iteration(tmp_path, figures):
    negative = [1.0 - t for t in range(100)]
    for losses, tokens in ((LOSSES, TOKENS), ([5.0], [65.0]), (negative, TOKENS)):
        assert save_curve(losses, tokens, tmp_path / "curve.png")
        left, right = figures.pop().axes
        for axes, values in ((left, losses), (right, tokens)):
            [line] = axes.lines
            assert list(line.get_xdata()) == list(range(len(losses)))
            assert list(line.get_ydata()) == values
        assert right.lines[0].get_drawstyle() == "steps-post"
        assert left.get_yscale() == ("linear" if losses is negative else "log")


def test_a_curve_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no losses"):
        save_curve([], [], tmp_path / "curve.png")


def test_accuracy_is_plotted_in_percent_with_a_legend(tmp_path, figures):
    PLOTS["accuracy"](tmp_path / "plot.png")
    [axes] = figures.pop().axes
    assert list(axes.lines[0].get_xdata()) == [32, 64]
    assert list(axes.lines[0].get_ydata()) == [50, 75]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student"]


def test_ranges_are_bars_from_smallest_to_largest(tmp_path, figures):
    PLOTS["ranges"](tmp_path / "plot.png")
    [axes] = figures.pop().axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(-2, 5), (0, 1)]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["input", "output"]


def test_panels_have_their_lines_with_error_bars(tmp_path, figures):
    PLOTS["panels"](tmp_path / "plot.png")
    [axes] = figures.pop().axes
    [line] = [container.lines[0] for container in axes.containers]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [3, 4])
    assert axes.get_legend() is None


def test_a_line_has_one_colour_in_all_panels(tmp_path, figures):
    line = [[1, 2], [3, 4], [0, 1]]
    panels = [{"x": "x", "y": "y", "lines": dict.fromkeys(names, line)} for names in ("abc", "ca")]
    assert save_panels(panels, tmp_path / "plot.png")
    first, second = ({c.get_label(): c.lines[0].get_color() for c in axes.containers} for axes in figures.pop().axes)
    assert len(set(first.values())) == 3
    assert second == {name: first[name] for name in "ca"}


def test_points_have_a_legend_of_sets_and_classes(tmp_path, figures):
    assert PLOTS["points"](tmp_path / "plot.png")
    [axes] = figures.pop().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["real", "sparse", "cat", "owl"]
