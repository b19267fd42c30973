"""Plots of figures, drawn with matplotlib (the extra `viz`).

Each function returns whether it wrote the PNG: it returns False, without an error, if matplotlib is missing. It raises
FileNotFoundError if the folder of `path` does not exist.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from smi_fast.data.files import atomic_write

BLUE, ORANGE = "#1f5fa8", "#d9822b"


def save_curve(losses: Sequence[float], tokens: Sequence[float], path: str | os.PathLike) -> bool:
    """Plot the loss (left axis) and the tokens per image (right axis, as a step line) against the iteration.

    Args:
        losses, tokens: one number for each iteration.

    Raises:
        ValueError: there are no iterations.
    """
    if not losses:
        raise ValueError("there are no losses to plot")

    def draw(left) -> None:
        from matplotlib.ticker import LogLocator

        right = left.twinx()
        left.plot(range(len(losses)), losses, color=BLUE, linewidth=1.0)
        right.step(range(len(tokens)), tokens, where="post", color=ORANGE, linewidth=1.4)
        left.set_xlabel("iteration")
        left.set_ylabel("loss", color=BLUE)
        right.set_ylabel("tokens per image", color=ORANGE)
        if min(losses) > 0:
            left.set_yscale("log")
            left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            left.yaxis.set_major_formatter("{x:g}")
            left.yaxis.set_minor_formatter("")
        right.set_ylim(0, 1.05 * max(tokens))
        right.spines["top"].set_visible(False)
        left.margins(x=0)

    return _save(path, draw, width=7)


def save_accuracy(curves: dict[str, Sequence[tuple[float, float]]], path: str | os.PathLike) -> bool:
    """Plot accuracy against samples with a line for each name, as in Fig. 4 of Sparse Model Inversion.

    Args:
        curves: maps the name of a line to its points (samples, accuracy in [0, 1]).
    """

    def draw(axes) -> None:
        for name, points in curves.items():
            samples, accuracy = zip(*points, strict=True)
            axes.plot(samples, [100 * value for value in accuracy], marker="o", markersize=3, label=name)
        axes.set_xlabel("samples")
        axes.set_ylabel("test accuracy in %")

    return _save(path, draw)


def save_ranges(sources: dict[str, dict[str, tuple[float, float]]], path: str | os.PathLike) -> bool:
    """Plot the range of activations at each place of a model where a quantiser observes them.

    Args:
        sources: maps each source of calibration, which gets a bar at each place, to a dict from places to ranges
            (smallest, largest).
    """
    places, width = list(next(iter(sources.values()))), 0.8 / len(sources)

    def draw(axes) -> None:
        for number, (name, ranges) in enumerate(sources.items()):
            left = [place + (number - (len(sources) - 1) / 2) * width for place in range(len(places))]
            low, high = zip(*(ranges[place] for place in places), strict=True)
            axes.bar(left, [b - a for a, b in zip(low, high, strict=True)], width, low, label=name)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_xticks(range(len(places)), places, rotation=90, fontsize=6)
        axes.use_sticky_edges = False
        axes.margins(x=0.01, y=0.05)
        axes.set_ylabel("activation")

    return _save(path, draw, width=max(6, 0.16 * len(places)), height=4.2)


def save_panels(panels: Sequence[dict], path: str | os.PathLike) -> bool:
    """Plot lines with error bars, in panels side by side.

    Args:
        panels: {"x": label, "y": label, "lines": {name: (x, mean, standard deviation)}} for each panel. Lines of one
            name have one colour in all panels.
    """
    names = dict.fromkeys(name for panel in panels for name in panel["lines"])
    style = {"marker": "o", "markersize": 3, "linewidth": 1.2, "capsize": 2}

    def draw(*axes) -> None:
        colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
        for ax, panel in zip(axes, panels, strict=True):
            for name, (x, mean, deviation) in panel["lines"].items():
                ax.errorbar(x, mean, deviation, label=name, color=colours[name], **style)
            ax.set_xlabel(panel["x"])
            ax.set_ylabel(panel["y"])

    return _save(path, draw, width=5 * len(panels), columns=len(panels))


def save_points(sets: dict, names: Sequence[str], path: str | os.PathLike) -> bool:
    """Plot points of several sets, each with a marker of its own, in the colours of their classes. Classes with equal
    last digits have one colour.

    Args:
        sets: maps the name of a set to its points (N, 2) and their classes (N,).
        names: the names of all classes.
    """

    def draw(axes) -> None:
        found = sorted({label for _, classes in sets.values() for label in classes.tolist()})
        for (name, (points, classes)), marker in zip(sets.items(), ".sDo^v*", strict=False):
            style = {"c": [f"C{label % 10}" for label in classes.tolist()], "marker": marker}
            edge = {"s": 12, "alpha": 0.35, "linewidths": 0} if marker == "." else {"s": 26, "edgecolors": "black"}
            axes.scatter(*points.T, **style, **{"linewidths": 0.6} | edge)
            axes.scatter([], [], facecolors="white", edgecolors="black", marker=marker, label=name)
        for label in found if len(found) <= 10 else []:
            axes.scatter([], [], color=f"C{label % 10}", marker="s", label=names[label].replace("_", " "))
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)

    return _save(path, draw, width=8, height=5)


def _save(
    path: str | os.PathLike, draw: Callable[..., None], *, width: float = 6, height: float = 3.6, columns: int = 1
) -> bool:
    """Let `draw` draw on as many axes as there are columns, and write the figure as a PNG. Sizes are in inches."""
    try:
        from matplotlib.figure import Figure  # unlike pyplot, it leaves the user's own figures and backend alone
    except ImportError:
        return False
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    draw(*axes)
    for ax in axes:
        if ax.get_legend_handles_labels()[1] and ax.get_legend() is None:
            ax.legend(frameon=False, fontsize="small")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return True
