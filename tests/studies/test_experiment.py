"""An experiment inverts each batch once, keeps only what was finished, and shares no image between batches."""

import json
import signal
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from smi_fast import StoppingSchedule
from smi_fast.runs.signals import Stopped
from smi_fast.studies.experiment import Experiment, Variant


def test_an_interrupted_inversion_is_not_kept(run, monkeypatch):
    def interrupt(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.inversion.meter.StageMeter.__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.inverted(run.sparse, 0, 4)
    assert not list(run.out.rglob("*.safetensors"))


def test_an_inversion_that_stops_at_every_iteration_gives_the_same_bits(run, models, data, tiny, tmp_path):
    expected, iterations = run.inverted(run.sparse, 0, 4), tiny.inversion.iterations
    other = Experiment(*models, data, None, tmp_path / "other", tiny, progress=False)
    stops = 0
    while True:
        with other.begin() as job, suppress(Stopped):
            job.signals.asked = signal.SIGINT
            found = other.inverted(other.sparse, 0, 4)
            break
        stops += 1
    assert stops == iterations
    assert torch.equal(found.images(), expected.images())
    assert torch.equal(found.positions, expected.positions)
    assert found.metadata["confidence"] == expected.metadata["confidence"]
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


def test_damaged_images_are_inverted_again_with_a_warning_that_names_their_file(run, seed):
    expected = run.inverted(run.sparse, 0, 4).images()
    [file] = run.out.rglob("*.safetensors")
    flipped = bytearray(file.read_bytes())
    flipped[torch.randint(len(flipped), ()).item()] ^= 1 << torch.randint(8, ()).item()
    for damaged in (flipped, flipped[: len(flipped) // 2]):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{file}.*; its images are inverted again"):
            assert torch.equal(run.inverted(run.sparse, 0, 4).images(), expected)
    assert torch.equal(run.inverted(run.sparse, 0, 4).images(), expected)


def test_batches_of_different_sizes_share_no_image(models, data, tiny, tmp_path):
    settings = replace(tiny, inversion=replace(tiny.inversion, iterations=1))
    run = Experiment(*models, data, None, tmp_path / "out", settings, progress=False)
    with run.begin():
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
    record = json.loads((run.out / "run.json").read_text())["settings"]
    assert record == run.about
    assert record["lr"] == tiny.inversion.lr
    assert record["stopping"] == str(run.sparse.stopping)
    assert record["fractions"] == [0.5]
