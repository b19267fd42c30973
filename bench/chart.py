"""The chart of speed beside the peers: python bench/chart.py [--output docs/images/speed.png]

A bar is a quotient of two medians of one group of a file in bench/results, as bench/report.py reads them. The picture's
own description holds the quotients, so that a test can tell whether it is up to date.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from floors import OURS
from report import groups_of, median

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "speed.png"
COLORS = {"float32": "#80cbc4", "bfloat16": "#00796b"}
TINY, BASE = "deit_tiny_patch16_224", "deit_base_patch16_224"
SAID = {TINY: "DeiT-Tiny", BASE: "DeiT-Base", "published SMI": "the authors' code"}


class Row(NamedTuple):
    """What was timed, and beside which contestant. The group's name has places for the model and the dtype."""

    task: str
    model: str
    contestant: str
    file: str
    group: str

    def __str__(self) -> str:
        return f"{self.task}\n{SAID[self.model]}, beside {SAID.get(self.contestant, self.contestant)}"


LOOP, FORWARD, FIRST = (
    f"amd-epyc-{name}.json" for name in ("zen5-2-threads-loop", "zen5-2-threads-forward", "2-threads")
)
INVERSION = "inversion, one iteration: {}, batch 8, %s of 196 patches, {}"
SPARSE, DENSE = "sparse forward: {}, batch 8, 46 of 196 patches, {}", "dense forward: {}, batch 8, all patches, {}"
MERGED, IMAGES = "forward of 105 tokens in the mean: {}, batch 8, 104 of 196 patches, {}", ", gradients of images"
ROWS = [
    Row("inversion, 46 of 196 patches", TINY, "published SMI", LOOP, INVERSION % 46),
    Row("inversion, all patches", TINY, "published SMI", LOOP, INVERSION % 196),
    Row("forward + backward, 46 patches", BASE, "timm's blocks", FORWARD, SPARSE + IMAGES),
    Row("forward + backward, all patches", BASE, "timm", FORWARD, DENSE + IMAGES),
    Row("forward, 46 patches", BASE, "timm's blocks", FORWARD, SPARSE),
    Row("forward, all patches", BASE, "timm", FORWARD, DENSE),
    Row("forward, 105 tokens a block", TINY, "ToMe", FIRST, MERGED),
]


def ratios(row: Row) -> dict[str, float]:
    """How many times as fast as the contestant smi-fast is, by dtype. The authors' code is in float32 beside both."""
    groups = groups_of(json.loads((ROOT / "bench" / "results" / row.file).read_text()))
    entries = {dtype: groups[row.group.format(row.model, dtype)] for dtype in COLORS}
    return {dtype: median(beside[row.contestant]) / median(beside[OURS]) for dtype, beside in entries.items()}


def description() -> str:
    """What the picture says, as text."""
    return json.dumps({str(row): {dtype: round(ratio, 2) for dtype, ratio in ratios(row).items()} for row in ROWS})


def draw(path: Path) -> None:
    """Draw the chart as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    plt.rcParams.update(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
    )
    picture, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for place, row in enumerate(ROWS):
        for turn, (dtype, ratio) in enumerate(ratios(row).items()):
            y = place + 0.38 * (turn - 0.5)
            axis.barh(y, ratio, 0.34, color=COLORS[dtype])
            axis.text(ratio + 0.04, y, f"{ratio:.1f}", va="center", fontsize=9)
    axis.axvline(1, color="#444444", linewidth=1)
    axis.set_yticks(range(len(ROWS)), map(str, ROWS), fontsize=9)
    axis.tick_params(left=False)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as the peer, which is 1 (measured by turns in one run)")
    axis.set_title(
        "Speed on 2 cores of AMD EPYC CPUs, batch 8. Nothing has been measured on a GPU.", fontsize=10, loc="left"
    )
    axis.legend([Patch(color=color) for color in COLORS.values()], COLORS, loc="lower right", frameon=False)
    picture.savefig(path, dpi=130, metadata={"Description": description()})
    plt.close(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
