"""The page of a run of `smi-fast invert`, index.html: one file without scripts, which a browser opens from the disk."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from smi_fast.data.files import atomic_write
from smi_fast.data.sparse import InvertedDataset
from smi_fast.studies.pictures import GREY
from smi_fast.studies.report import COLUMNS, stage_rows, what_was_done
from smi_fast.studies.run_pictures import numbers_shown

MAX_IMAGES = 100  # on a page
SMALL = 96  # pixels; the squares of smaller images stay sharp
PLOT = 640, 180  # width and height of a curve in units of its drawing
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --dim: #6a6a70; --line: #d9d9de; --page: #ffffff; --card: #f6f6f8;
  --blue: #1f5fa8; --orange: #b9620a; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --dim: #a0a0a8; --line: #3a3a40; --page: #17171a;
  --card: #222226; --blue: #7db1ee; --orange: #f0a04b; } }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--page);
  max-width: 1160px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; }
p, dl { max-width: 46rem; margin: .5rem 0; }
a { color: var(--blue); }
.dim, figcaption, dd, th { color: var(--dim); }
.images { display: flex; flex-wrap: wrap; gap: 1.25rem 1rem; margin-top: 1rem; }
figure { margin: 0; }
.images figure { width: min-content; }
.images img { display: block; width: 160px; height: auto; border-radius: 3px; }
.images .sharp { image-rendering: pixelated; }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .35rem; }
figcaption b { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.wrong { color: var(--orange); }
.bar { display: block; height: 4px; margin: .3rem 0; border-radius: 2px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--blue); }
.process { max-width: 100%; height: auto; margin-top: 1rem; }
svg { display: block; width: 100%; max-width: 46rem; height: auto; margin: 1rem 0; font-size: 12px; }
svg text { fill: var(--dim); }
svg .axis { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.5; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: 1rem 0; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400;
  white-space: nowrap; }
.settings th, .settings td { text-align: left; white-space: normal; vertical-align: top; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1rem; font-size: .92rem; }
dd { margin: 0; }
"""


def save_page(
    path: Path,
    report: dict[str, Any],
    dataset: InvertedDataset,
    names: dict[int, str],
    tokens: Sequence[tuple[int, int, float]],
    pictures: Sequence[str],
) -> None:
    """Write the page of a run: its images, how they came about, curves, stages and settings.

    Args:
        path: the file. Links are relative to its folder.
        report: what report.json holds.
        dataset: the images of the run.
        names: the names of the classes.
        tokens: (first iteration, end, tokens of an image) for each stage.
        pictures: the names of the pictures beside the page.
    """
    model = escape(str(report.get("model", "a model")))
    shown, about = numbers_shown(dataset)[:MAX_IMAGES], _confidence(report)
    if len(shown) < len(dataset):
        about += f" {len(shown)} of {len(dataset)} images are shown; report.json has all confidences."
    if report["missing"]:
        about += f" The run is not finished: {report['missing']} images are yet to come."
    parts = [
        f"<h1>Images out of {model}</h1>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in what_was_done(report, dataset)),
        _section("Images", about, _figures(report, dataset, names, shown)),
        *_process(pictures),
        _section("Curves", *_curves(report, tokens)),
        _section(
            "Stages",
            "Whenever patches stop, a new and faster stage begins. Its columns:",
            _definitions(COLUMNS),
            f'<div class="scroll">{_table([list(COLUMNS), *stage_rows(report["stages"])])}</div>',
        ),
        _section("Settings", "", _settings(report)),
        _section("Files", "", _files(pictures)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{model} inverted</title>'
    html = f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
    with atomic_write(path) as partial:
        partial.write_text(html + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")


def _section(title: str, text: str, *parts: str) -> str:
    return "\n".join((f"<h2>{title}</h2>", *[f"<p>{text}</p>"] * bool(text), *parts))


def _confidence(report: dict[str, Any]) -> str:
    right = round(report["classified_as_target"] * report["count"])
    return (
        "The number and the bar below an image are the model's confidence: the probability that it gives the image's "
        f"class when it sees the image's kept patches alone. {right} of {report['count']} images are "
        f"classified as their class, and the mean confidence is {report['mean_confidence']:.3f}."
    )


def _figures(report: dict[str, Any], dataset: InvertedDataset, names: dict[int, str], shown: Sequence[int]) -> str:
    """Return the images with their classes, confidence and, where the model sees another class, its name."""
    figures, of = [], report["images"]
    sharp = ' class="sharp"' * (min(dataset.image_size[1:]) < SMALL)
    for number, image in zip(shown, dataset.images(shown, stopped=GREY), strict=True):
        target, predicted, confidence = (of[key][number] for key in ("target", "predicted", "confidence"))
        name, wrong = escape(names[target].replace("_", " ")), ""
        if predicted != target:
            seen = escape(names.get(predicted, f"class {predicted}").replace("_", " "))
            wrong = f'<br><span class="wrong">seen as {seen}</span>'
        figures.append(
            f'<figure><img src="{_data_uri(image)}" alt="{name}"{sharp}><figcaption><b>{name}</b><br>{confidence:.3f}'
            f'<span class="bar"><i style="width:{confidence:.1%}"></i></span>{wrong}</figcaption></figure>'
        )
    return f'<div class="images">{"".join(figures)}</div>'


def _data_uri(image: Tensor) -> str:
    """Return an image (3, H, W), or (1, H, W) if it is grey, in [0, 1] as a URI that holds it: as it is if it is small,
    or else compressed."""
    pixels = image.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=min(pixels.shape[:2]) < SMALL, quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _process(pictures: Sequence[str]) -> Iterable[str]:
    if "process.webp" in pictures:
        text = (
            "The first image of each class, of up to ten classes, from its first iteration to its last. "
            '<a href="process.png">process.png</a> shows the first of them side by side.'
        )
        image = '<img class="process" src="process.webp" alt="An animation of the images as they come about">'
        yield _section("How the images come about", text, image)


def _curves(report: dict[str, Any], tokens: Sequence[tuple[int, int, float]]) -> tuple[str, ...]:
    losses = [(number, loss) for number, loss in enumerate(report["loss"]) if loss is not None]
    steps = [(at, count) for start, end, count in tokens for at in (start, end)]
    text = (
        "The loss is what is minimised: how far the model is from seeing the class, plus the other terms of the method "
        "(such as one that keeps the image smooth). It may rise where patches stop, since the model then sees less. "
        "The curves are of the first batch."
    )
    curves = [_curve(losses, "loss", "var(--blue)", logarithmic=all(loss > 0 for _, loss in losses))] if losses else []
    return text, *curves, _curve(steps, "tokens of an image", "var(--orange)", zero=True)


def _curve(
    points: Sequence[tuple[float, float]], what: str, colour: str, *, logarithmic: bool = False, zero: bool = False
) -> str:
    """Return an SVG of one curve, with the iteration along it and the smallest and largest values at its axis."""
    (width, height), (left, bottom, top) = PLOT, (52, 20, 22)
    last = max(1, points[-1][0])
    low, high = 0.0 if zero else min(y for _, y in points), max(y for _, y in points)
    scale = math.log if logarithmic else float
    span = scale(high) - scale(low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (width - left - 8) * x / last, height - bottom - (height - bottom - top) * (
            scale(y) - scale(low)
        ) / span

    thinned = points[:: max(1, len(points) // 1500)]
    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in thinned)
    ticks = "".join(
        f'<text x="{left - 6}" y="{place(0, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>' for y in {low, high}
    ) + "".join(
        f'<text x="{place(x, low)[0]:.1f}" y="{height - 4}" text-anchor="middle">{x:.0f}</text>'
        for x in {0, last // 2, last}
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{what} by iteration">{ticks}'
        f'<text x="{left}" y="12">{what}{" (logarithmic)" * logarithmic}, by iteration</text>'
        f'<path class="axis" fill="none" d="M{left} {top}V{height - bottom}H{width - 8}"/>'
        f'<polyline points="{line}" stroke="{colour}"/></svg>'
    )


def _table(rows: Sequence[Sequence[str]], attributes: str = "") -> str:
    head, *body = rows
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in body]
    return f"<table{attributes}>{''.join(lines)}</table>"


def _definitions(terms: dict[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(what)}</dd>' for term, what in terms.items())}</dl>"


def _settings(report: dict[str, Any]) -> str:
    """Return a table of what decided the images."""
    about = ("model", "weights", "dtype", "backend", "device", "seed")
    rows = {name: report[name] for name in about if name in report} | dict(report.get("settings", {}))
    rows |= {f"version of {name}": version for name, version in report.get("versions", {}).items()}
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_value(value))}</td></tr>" for name, value in rows.items())
    return f'<table class="settings">{cells}</table>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items()) or "none"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _files(pictures: Sequence[str]) -> str:
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in (*pictures, "report.json"))
    return (
        f"<p>{links} and the folder images, which holds the sparse images: "
        "<code>smi_fast.InvertedDataset.load</code> reads them.</p>"
    )
