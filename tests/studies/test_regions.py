"""Inverting a region changes the pixels of this region only, and nothing else of a run."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from smi_fast.studies import regions


def test_only_the_pixels_of_the_region_change(run, monkeypatch):
    # Adam sees nothing but the loss that is measured, so that it falls whatever the weights are.
    settings = run.settings.inversion.replaced({"tv_l2": 0.0, "jitter": 0, "flip": 0.0})
    run.settings, seen, loss = replace(run.settings, inversion=settings), [], regions._loss
    monkeypatch.setattr(
        regions,
        "_loss",
        lambda fast, pixels, targets: seen.append(pixels.detach().clone()) or loss(fast, pixels, targets),
    )
    region, targets = torch.tensor([[0, 5], [10, 15]]), torch.tensor([0, 2])
    before, after = regions.invert_region(run, region, targets)
    first, last = seen
    changed = F.max_pool2d((first != last).float().amax(1, keepdim=True), 4).flatten(1)
    assert [row.nonzero().flatten().tolist() for row in changed] == region.tolist()
    assert (last - first).abs().max() > 0.1
    for pixels, measured in ((first, before), (last, after)):
        assert measured == loss(run.fast, pixels, targets)
        assert abs(measured - F.cross_entropy(run.model(pixels), targets).item()) < 1e-4
    assert after < before


def test_the_foreground_and_the_background_divide_an_image(run):
    rows = {row[0]: row[1] for row in regions.table2(run).rows}
    assert rows["foreground"] + rows["background"] == rows["the whole image"] == 16
    assert rows["foreground"] == run.final_count
