"""Training: a student's training over all rounds, in a form that can be saved at any step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast.bars import ProgressBar
from smi_fast.distillation.group import Group
from smi_fast.distillation.losses import transfer_loss
from smi_fast.distillation.pool import Pool
from smi_fast.seeds import batch_seed


@dataclass(frozen=True)
class Round:
    """The figures of a round of inversion and training."""

    number: int  # from 1
    samples: int  # images in the pool
    iterations: int  # of inversion so far, of all batches; 0 if the images come from a dataset
    steps: int  # of the student's optimiser so far
    loss: float  # mean of the round
    accuracy: float | None  # on the test data, if there are any; under torchrun, in the first process only
    inversion_seconds: float  # of this round, of all batches
    transfer_seconds: float  # of this round: teacher, student and evaluation


class Training:
    """The student, its optimiser, and everything else that a step hands on to the next one, apart from the pool.

    Torch's own random numbers, which decide dropout, are no part of it: they begin anew in each step, from a seed that
    follows from the run's seed, the number of the step and the process. So it does not matter what has drawn numbers
    before, such as an evaluation in one of the processes.

    Args:
        pool: the images, which the caller extends before each round.
        trainable: the part of the pool's student that learns.
        optimizer: has the parameters of `trainable`.
        generator: decides which images are drawn.
        group: the processes that train together.
        steps: the number of steps in a round.
        temperature: see `transfer_loss`.
        seed: decides dropout.
        settings: what must be equal in a run that goes on from the state of this one, in JSON's types.

    Attributes:
        history: the rounds that are finished.
        step: the number of steps that are done in this round.
    """

    def __init__(
        self,
        pool: Pool,
        trainable: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        group: Group,
        *,
        steps: int,
        temperature: float,
        seed: int,
        settings: Mapping[str, Any],
    ):
        self.pool, self.trainable, self.optimizer, self.generator, self.group = (
            pool, trainable, optimizer, generator, group
        )  # fmt: skip
        self.steps, self.temperature, self.seed, self.settings = steps, temperature, seed, dict(settings)
        self._logits = partial(group.call, _Learner(pool, trainable))
        self.history: list[Round] = []
        self.step = 0
        self._begun = generator.get_state()  # as it was when the round began
        self._total = torch.zeros((), device=pool.student.device)  # of the losses of the round
        self._seconds = 0.0  # that earlier processes have spent on the round
        self._kept = copy.deepcopy(trainable.state_dict())  # what an interruption leaves

    def begin(self) -> None:
        """Let the clock of the round run."""
        self._started = time.perf_counter() - self._seconds

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def seconds(self) -> float:
        """The seconds since the round began."""
        return time.perf_counter() - self._started

    def round(self, bar: ProgressBar, pause: Callable[[], None]) -> float:
        """Train the student on the pool until the round's steps are done, and return their mean loss. `pause` is called
        before the first step and after each."""
        student = self.pool.student.fast
        student.train(not self.pool.linear_probing)
        self.generator.set_state(self._begun)
        draws = islice(self.pool.draw(self.steps, self.generator), self.step, None)
        bar.update(self.step)
        pause()
        for batch in draws:
            self._total += self._train(batch)
            self.step += 1
            bar.update()
            pause()
        self.group.share_buffers(self.trainable)
        student.eval()
        return self._total.item() / self.steps

    def _train(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Take a step of the optimiser, and return the loss."""
        if not self.pool.linear_probing:  # otherwise the student is in evaluation mode
            number = len(self.history) * self.steps + self.step
            torch.manual_seed(batch_seed(self.seed, number, self.group.rank))
        (index, view), share = self.group.share(batch)
        loss = share * transfer_loss(self._logits(index, view), self.pool.logits[view, index], self.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.group.mean(loss.detach())

    def finish(self, loss: float, iterations: int, accuracy: float | None, inversion_seconds: float) -> Round:
        """Write the figures of the round into the history, and return them."""
        number = len(self.history) + 1
        finished = Round(
            number, samples=len(self.pool), iterations=iterations, steps=number * self.steps, loss=loss,
            accuracy=accuracy, inversion_seconds=inversion_seconds, transfer_seconds=self.seconds,
        )  # fmt: skip
        self.history.append(finished)
        self.step, self._seconds, self._begun = 0, 0.0, self.generator.get_state()
        self._total.zero_()
        if self.group.run is None:
            self._kept = copy.deepcopy(self.trainable.state_dict())
        return finished

    def restore(self) -> None:
        """Leave the student as the last finished round has left it. In a run leave it as it was at first, so that the
        same call can go on."""
        self.trainable.load_state_dict(self._kept)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to go on from this step, as `save_state` takes it."""
        return {
            "settings": self.settings,
            "student": self.trainable.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self._begun,
            "step": self.step,
            "total": self._total,
            "seconds": self.seconds if self.step else 0.0,
            "history": [asdict(finished) for finished in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: the state is of a run with other settings. The message names them.
        """
        ours, theirs = self.settings, state["settings"]
        for name in (*ours, *theirs):
            if ours.get(name) != theirs.get(name):
                raise ValueError(f"the run was begun with {name} {theirs.get(name)}, not {ours.get(name)}")
        self.trainable.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._begun, self.step, self._seconds = state["generator"], state["step"], state["seconds"]
        self._total.copy_(state["total"])
        self.history[:] = [Round(**record) for record in state["history"]]


class _Learner(nn.Module):
    """The student as DistributedDataParallel takes it: a module with the parameters that learn, whose call gives the
    logits of images of the pool."""

    def __init__(self, pool: Pool, trainable: nn.Module):
        super().__init__()
        self.pool, self.trainable = pool, trainable

    def forward(self, index: Tensor, view: Tensor) -> Tensor:
        return self.pool.student_logits(index, view)
