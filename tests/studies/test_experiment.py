"""An experiment inverts each batch once, keeps only what was finished, and shares no image between batches."""

import json
from dataclasses import replace

import pytest
import torch

from smi_fast import StoppingSchedule
from smi_fast.studies.experiment import Experiment, Variant


@pytest.fixture
def run(models, data, tiny, tmp_path):
    return Experiment(*models, data, None, tmp_path, tiny, progress=False)


def test_an_interrupted_inversion_is_not_kept(run, tmp_path, monkeypatch):
    def interrupt(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.inversion.meter.StageMeter.__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.inverted(run.sparse, 0, 4)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_batches_of_different_sizes_share_no_image(models, data, tiny, tmp_path):
    settings = replace(tiny, inversion=replace(tiny.inversion, iterations=1))
    run = Experiment(*models, data, None, tmp_path, settings, progress=False)
    two, three = (run.inverted(run.dense, 0, count).images().flatten(1) for count in (2, 3))
    assert torch.cdist(two, three).min() > 3  # about 9 for independent noise


def test_variants_keep_the_patches_that_they_select(run):
    """At the first stopping, lowest attention keeps what attention stops, and random choice does neither."""
    stopping, kept = StoppingSchedule({2: 0.5}), {}
    for select in ("attention", "lowest", "random"):
        dataset = run.inverted(Variant(select, stopping, select), 0, 6)
        kept[select] = dataset.positions.view(6, 8).sort(1).values
    both = torch.cat((kept["attention"], kept["lowest"]), 1).sort(1).values
    assert torch.equal(both, torch.arange(16, dtype=torch.int32).expand(6, -1))
    assert not torch.equal(kept["random"], kept["attention"])
    assert not torch.equal(kept["random"], kept["lowest"])


def test_a_batch_holds_all_classes_in_turn_and_what_it_cost(run):
    dataset = run.inverted(run.sparse, 0, 5)
    assert sorted(dataset.targets[:3].tolist()) == [0, 1, 2]
    assert torch.equal(dataset.targets[3:], dataset.targets[:2])
    assert dataset.metadata["stopping"] == str(run.sparse.stopping)
    for cost in ("iterations_per_second", "gflop", "memory", "last_memory"):
        assert dataset.metadata[cost] > 0
    assert 0 < dataset.metadata["confidence"] < 1


def test_the_settings_are_recorded_as_json(run, tiny):
    record = run.about["settings"]
    assert json.loads(json.dumps(record)) == record
    assert record["lr"] == tiny.inversion.lr
    assert record["stopping"] == str(run.sparse.stopping)
    assert record["fractions"] == [0.5]
