"""What a killed process leaves behind stands in nobody's way, and is removed by the run that goes on."""

import argparse

import pytest
import torch
from dataset_cases import make
from inversion_cases import small_model

import smi_fast
from smi_fast import InvertedDataset
from smi_fast.cli.output import check_out
from smi_fast.runs.inversion import invert
from smi_fast.runs.run import Run

LITTER = f".{'0a' * 16}.partial"


def test_a_folder_with_nothing_but_a_write_that_was_killed_is_free_for_a_run(tmp_path):
    (tmp_path / LITTER).mkdir()
    check_out(argparse.Namespace(out=tmp_path, overwrite=False), [])
    with Run(tmp_path, "test", {}):
        assert not (tmp_path / LITTER).exists()
        (tmp_path / LITTER).mkdir()
    with pytest.raises(ValueError, match="other settings"), Run(tmp_path, "test", {"seed": 1}):
        pass
    assert (tmp_path / LITTER).exists()  # what is refused changes nothing


def test_images_of_a_folder_that_was_being_removed_are_no_dataset(tmp_path):
    (tmp_path / LITTER).mkdir()
    make(0).save(tmp_path / LITTER / "00000.safetensors")
    with pytest.raises(FileNotFoundError):
        InvertedDataset.load(tmp_path)


def test_the_checkpoint_of_a_batch_that_is_finished_does_not_stay(tmp_path, seed):
    inverter = smi_fast.Inverter(small_model(), stopping="dense", iterations=2, progress=False)
    invert(inverter, torch.arange(2), tmp_path, batch_size=1)
    left = tmp_path / "checkpoints" / "00001.state"
    left.parent.mkdir(exist_ok=True)
    left.write_text("as a process leaves it that is killed after it has written the file of the batch")
    invert(inverter, torch.arange(2), tmp_path, batch_size=1)
    assert not left.exists()


def test_a_dataset_of_many_files_holds_only_what_they_agree_on(tmp_path):
    for number in range(3):
        dataset = make(0)
        dataset.metadata = {"seed": 7, "batch": number, "loss": [0.5] * 100}
        dataset.save(tmp_path / f"{number}.safetensors")
    loaded = InvertedDataset.load(tmp_path)
    assert loaded.metadata == {"seed": 7, "loss": [0.5] * 100}
    assert len(loaded) == 3 * len(dataset)
