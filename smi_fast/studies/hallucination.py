"""Hallucination: how much of a cue that only happens to occur with a class comes back in inverted images.

A frame of one colour is planted in most training images of one class. The model learns it, and is then inverted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi_fast.backbones.base import class_names, frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.data.labelled import accuracy
from smi_fast.data.sparse import InvertedDataset
from smi_fast.studies.experiment import Experiment, Variant, split
from smi_fast.studies.page import Section
from smi_fast.studies.pictures import GREY, save_grid
from smi_fast.studies.student import Student

SHARE = 0.95  # the share of the class's training images that have the cue
COLOUR = (1.0, 0.0, 1.0)  # magenta, the colour of the cue, in [0, 1]
BATCH, LR, WEIGHT_DECAY = 32, 1e-4, 0.05  # of the training, by AdamW
COLUMNS = {
    "inversion": "", "patches kept": ".0f", "of these in the frame, %": ".1f", "colour of the cue in them": ".2f",
    "student, plain images, %": ".2f", "student, reversed cue, %": ".2f",
}  # fmt: skip
WITH_CUE: dict[str, Callable[[Tensor], Tensor]] = {  # a test -> which images have the cue, from which are of its class
    "plain": torch.zeros_like, "its own": torch.clone, "reversed": torch.logical_not,
}  # fmt: skip


def hallucination(run: Experiment) -> Section:
    s, frame = run.settings, Frame(run, run.fast)
    model = copy.deepcopy(run.model)
    model.load_state_dict(run.once("planted", lambda: learn_cue(run, model, frame)))
    fast = accelerate(model)
    right = {
        name: run.once(
            f"cue-on-{name}", lambda name=name: 100 * accuracy(fast, images_with_cue(run, fast, name), progress=False)
        )
        for name in WITH_CUE
    }
    if run.student is not None:
        plain, reversed = (learner(run, fast, name) for name in ("plain", "reversed"))
    rows, shown = [], []
    for name, like, select in (
        ("dense", run.dense, "attention"),
        ("sparse", run.sparse, "attention"),
        ("sparse, random patches", run.sparse, "random"),
    ):
        dataset = run.inverted(Variant(f"cue-{name}", like.stopping, select, model=model), 0, s.images)
        learnt = ["no student"] * 2
        if run.student is not None:
            learnt = run.once(f"cue-student-{name}", lambda dataset=dataset: taught(run, dataset, plain, reversed))
        rows.append([name, *frame.found_in(dataset), *learnt])
        shown.append(dataset.images((dataset.targets == frame.label).nonzero().flatten().tolist(), stopped=GREY))
    save_grid(torch.cat(shown), run.out / "hallucination.png", len(shown[0]), [row[0] for row in rows])
    whose = class_names(run.model)[frame.label]
    return Section(
        "Hallucination: a planted cue",
        f"A magenta frame, which is {frame.share:.1f} % of the patches, is planted in {100 * SHARE:.0f} % of the "
        f"training images of the class {whose} and in no other. The last {s.cue_blocks} blocks and the head of "
        f"{run.about['model']} learn {s.cue_images:,} training images of that kind once. On {split(s.test_images)} the "
        f"model then reaches {right['plain']:.2f} %, with the frame in images of its class {right['its own']:.2f} %, "
        "and with the frame in all other classes but not in its own (reversed) "
        f"{right['reversed']:.2f} %. It is inverted, {s.images} images of all classes. Of those of the class {whose} "
        "the table says which share of the kept patches lies in the frame, and how far the mean colour of these "
        "patches goes from grey (0) to the frame's (1). A student learns all images in "
        f"{s.ablation_steps} steps.",
        COLUMNS,
        rows,
        [
            "The paper (Fig. 1) shows that dense inversion also inverts background that goes with a class in the "
            "training data, and that sparse inversion leaves it out."
        ],
        picture="hallucination.png",
    )


class Frame:
    """The cue: the outermost patches of an image, in one colour, and the class that has it, the first one of those that
    are inverted. Its colour is normalised as a model's images are."""

    def __init__(self, run: Experiment, fast: AcceleratedViT):
        grid, self.label = run.grid, int(run.targets(0, run.settings.images).min())
        inside = torch.zeros(grid.rows, grid.columns, dtype=torch.bool)
        inside[1:-1, 1:-1] = True
        self.patches = (~inside).flatten().nonzero().flatten()
        self.mask = grid.mask(self.patches[None])[0]  # (1, H, W)
        self.share = 100 * len(self.patches) / grid.num_patches
        mean, std = torch.tensor(fast.mean), torch.tensor(fast.std)
        self.colour = ((torch.tensor(COLOUR) - mean) / std).view(-1, 1, 1)

    def planted(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Return normalised images (B, 3, H, W), of which those that `chosen` (B,) bool marks have the cue."""
        return torch.where(self.mask & chosen.view(-1, 1, 1, 1), self.colour, images)

    def found_in(self, dataset: InvertedDataset) -> tuple[float, float, float]:
        """Return of the images of the class how many patches they keep, which share of these lies in the frame, in %,
        and how far the mean colour of the latter goes from grey to the cue's."""
        samples = [dataset[n] for n in (dataset.targets == self.label).nonzero().flatten().tolist()]
        tokens = InvertedDataset.collate(samples)[0]
        in_frame = torch.isin(tokens.positions, self.patches.to(tokens.positions))
        kept, grey = len(tokens.positions) / len(samples), 0.5
        direction = torch.tensor(COLOUR) - grey
        if not in_frame.any():
            return kept, 0.0, 0.0
        colour = tokens.values[in_frame].unflatten(1, (3, -1)).mean((0, 2)) - grey
        return kept, 100 * in_frame.float().mean().item(), (colour @ direction / direction.square().sum()).item()


def learn_cue(run: Experiment, model: nn.Module, frame: Frame) -> dict[str, Tensor]:
    """Teach a model's last blocks and its head training images with the cue, and return its state dict."""
    s, random = run.settings, torch.Generator().manual_seed(0)
    data = run.load("train")
    order = torch.randperm(len(data), generator=random)[: s.cue_images]
    learning = nn.ModuleList([*model.blocks[-s.cue_blocks :], model.norm, model.head])
    with frozen(model):
        learning.requires_grad_(True)
        adam = torch.optim.AdamW(learning.parameters(), LR, weight_decay=WEIGHT_DECAY)
        for batch in run.watched(order.split(BATCH)):
            images, labels = zip(*(data[n] for n in batch.tolist()), strict=True)
            labels = torch.tensor(labels)
            chosen = (labels == frame.label) & (torch.rand(len(labels), generator=random) < SHARE)
            images = frame.planted(torch.stack(images), chosen).to(run.device)
            with torch.autocast(run.device.type, run.dtype or torch.float32, enabled=run.dtype is not None):
                loss = F.cross_entropy(model(images), labels.to(run.device))
            adam.zero_grad()
            loss.backward()
            adam.step()
    return model.state_dict()


def images_with_cue(run: Experiment, fast: AcceleratedViT, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of test images, preprocessed for a model, with the cue in those that this test has it in."""
    frame = Frame(run, fast)
    for images, labels in run.watched(run.test(run.settings.test_images, fast.model)):
        yield frame.planted(images, WITH_CUE[name](labels == frame.label)), labels


def learner(run: Experiment, teacher: AcceleratedViT, name: str) -> Student:
    """Return the student that the model with the cue teaches, with the images of this test."""
    return Student(run.student.model, teacher, lambda: images_with_cue(run, run.student.reader.fast, name))


def taught(run: Experiment, dataset: InvertedDataset, plain: Student, reversed: Student) -> list[float]:
    """Teach a copy of the student the inverted images, and return its accuracy on plain test images and where the cue
    is reversed, in %."""
    s = run.settings
    how = {"rounds": 1, "steps": s.ablation_steps, "batch_size": s.batch_size, "lr": s.student_lr}
    student = plain.copy()
    return [*plain.learn(0, student, dataset=dataset, **how), 100 * reversed.accuracy(student)]
