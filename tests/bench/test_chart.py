"""The chart of speed says what the files of results hold, and the picture in the documentation is up to date."""

import json
from pathlib import Path

import chart
from PIL import Image

RESULTS = Path(chart.__file__).parent / "results"


def test_bars_are_quotients_of_medians_in_one_group():
    entries = json.loads((RESULTS / "amd-epyc-zen5-2-threads-loop.json").read_text())["benchmarks"]
    name = "inversion, one iteration: deit_tiny_patch16_224, batch 8, 46 of 196 patches, bfloat16"
    times = {e["extra_info"]["contestant"]: e["stats"]["median"] for e in entries if e["group"] == name}
    assert chart.ratios(chart.ROWS[0])["bfloat16"] == times["published SMI"] / times["smi-fast"]


def test_the_picture_shows_the_results_that_are_there():
    with Image.open(chart.PICTURE) as picture:
        assert picture.text["Description"] == chart.description()
