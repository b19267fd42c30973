"""An evaluation goes on after the last batch, and measures nothing twice; its workers leave signals to it."""

import os
import signal
from contextlib import suppress

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from smi_fast.runs.evaluation import evaluate
from smi_fast.runs.run import Run
from smi_fast.runs.signals import Stopped


class Counting(nn.Module):
    """Logits that are the images, and the number of images that were seen."""

    seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images


def test_an_evaluation_that_stops_after_every_batch_sees_each_image_once(seed, tmp_path):
    images, labels = torch.randn(11, 3), torch.randint(3, (11,))
    model, test, processes = Counting(), DataLoader(TensorDataset(images, labels), 4), 0
    found = None
    while found is None:
        processes += 1
        with Run(tmp_path / "run", "test", {}) as run, suppress(Stopped):
            run.signals.asked = signal.SIGTERM
            found = evaluate(run, "model", lambda: model, test, progress=False)
    assert processes == 4  # three batches, and the one that finds all of them done
    assert model.seen == 11
    assert found["accuracy"] == (images.argmax(1) == labels).sum().item() / 11
    with Run(tmp_path / "run", "test", {}) as run:
        assert evaluate(run, "model", None, test, progress=False) == found


def test_a_data_loaders_worker_leaves_signals_to_its_parent(tmp_path):
    """Ctrl-C in a terminal reaches the workers too, which have the handlers of the process that forked them."""
    with Run(tmp_path / "run", "test", {}) as run:
        worker = os.fork()
        if not worker:
            signal.raise_signal(signal.SIGINT)
            os._exit(0 if run.signals.asked is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
        signal.raise_signal(signal.SIGINT)
        assert run.signals.asked == signal.SIGINT
