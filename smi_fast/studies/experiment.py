"""Experiment: what comparisons of inversions share: models, data, and images, inverted once and kept on the disk."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from smi_fast.backbones.base import frozen
from smi_fast.backbones.vit import AcceleratedViT, accelerate
from smi_fast.data.files import atomic_write, checksum, read_json, write_json
from smi_fast.data.labelled import accuracy, load_data
from smi_fast.data.sparse import InvertedDataset
from smi_fast.distillation.rounds import Reader, distill
from smi_fast.inversion import meter as report
from smi_fast.inversion.inverter import Inverter
from smi_fast.inversion.objectives import deep_inversion
from smi_fast.inversion.schedule import StoppingSchedule
from smi_fast.quantization import check_supported, quantize
from smi_fast.seeds import batch_seed
from smi_fast.studies.page import Section

BATCH = 128  # of evaluations
MAX_HELD = 2**30  # bytes of test images that are held in memory
BITS = (8, 4)  # of weights; activations have 8
ABLATION = {
    "inversion": "", "patches kept": ".0f", "sparsity, %": ".1f", "iterations/s": ".1f", "confidence": ".3f",
    "W8/A8, %": ".2f", "W4/A8, %": ".2f", "transfer, %": ".2f",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How large the comparisons are. `test_images` None: the whole split."""

    iterations: int  # of an inversion
    lr: float
    tv_l2: float
    images: int  # of a calibration set, inverted as one batch
    seeds: int  # of quantisation and transfer
    test_images: int | None
    rounds: int  # of a transfer
    samples: int  # fresh images a round, inverted as one batch
    steps: int  # of the student's optimiser, a round
    batch_size: int  # of the student
    real_images: int  # of the transfer that shows the ceiling, and at most of the others
    ablation_seeds: int
    ablation_test_images: int | None  # for quantisation
    ablation_steps: int  # of the student's optimiser on one calibration set
    fractions: tuple[float, ...]  # stopped at each stopping of Fig. 8, besides none and the published 0.3
    removal_images: int  # of the test split, for Table 2
    speed_models: tuple[str, ...]  # of timm, with random weights, besides the model
    speed_batches: tuple[int, ...]
    speed_iterations: int  # timed in each stage


@dataclass(frozen=True)
class Variant:
    """A way to invert. Its name is that of a folder, and tells it from the others."""

    name: str
    stopping: StoppingSchedule
    strategy: str = "attention"  # by which patches go on: or "random", or "lowest attention"


class Experiment:
    """A folder of results, and what it takes to work them out.

    `about.json` says what they are of, `sections/` holds what is finished, and `inverted/` the images of each variant,
    a file a batch, with what its inversion cost in the metadata. Arguments are those of `reproduce`.
    """

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module | None,
        data: str | Path,
        root: str | Path | None,
        out: Path,
        settings: Settings,
        progress: bool,
    ):
        self.model, self.student, self.out, self.settings, self.progress = model, student, out, settings, progress
        self.fast = accelerate(model)
        self.device = self.fast.device
        inverter = Inverter(self.fast, stopping=StoppingSchedule.dense())
        self.mean, self.std, self.image_size = inverter.mean, inverter.std, inverter.image_size
        self.num_patches = inverter.grid.num_patches
        self.patch_size = inverter.grid.patch_size
        self.dense = Variant("dense", StoppingSchedule.dense())
        self.sparse = Variant("sparse", StoppingSchedule.paper(settings.iterations))
        self.load = lambda split, of=model: load_data(data, root, split=split, model=of)
        self.judge, self.test = cache(self.judge), cache(self.test)
        self.about = {
            "model": name_of(model),
            "student": None if student is None else name_of(student),
            "weights": [weights_checksum(m) for m in (model, student) if m is not None],
            "data": Path(data).name,
            "device": report.device_name(self.device),
            "versions": report.versions(),
            "settings": json.loads(json.dumps(asdict(settings))),
        }

    def begin(self) -> None:
        """Make the folder, or check that what it holds is of the same arguments."""
        self.load("train"), self.load("test")
        check_supported(self.model)
        if self.student is not None:
            self.load("test", self.student)
            if self._reader.patch_size != self.patch_size:
                ours, theirs = ("{}x{}".format(*size) for size in (self.patch_size, self._reader.patch_size))
                raise ValueError(f"the model has patches of {ours}, the student of {theirs}")
        file = self.out / "about.json"
        if file.is_file():
            before, now = (about | about.get("settings", {}) for about in (read_json(file), self.about))
            for key in now.keys() - {"settings"}:
                if before.get(key) != now[key]:
                    raise ValueError(f"{self.out} holds results of {key} {before.get(key)}, not {now[key]}")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"{self.out} is there already and holds no results to go on from")
        else:
            (self.out / "sections").mkdir(parents=True)
            write_json(file, self.about)

    def section(self, name: str, make: Callable[[Experiment], Section]) -> Section:
        """A section, read from its file or worked out now."""
        section = self.finished(name)
        if section is None:
            started = time.perf_counter()
            section = make(self)
            section.seconds = time.perf_counter() - started
            with atomic_write(self._file(name)) as partial:
                partial.write_text(json.dumps(asdict(section), indent=1) + "\n")
        return section

    def finished(self, name: str) -> Section | None:
        file = self._file(name)
        return Section(**read_json(file)) if file.is_file() else None

    def _file(self, name: str) -> Path:
        return self.out / "sections" / f"{name}.json"

    def inverted(self, variant: Variant, number: int, count: int) -> InvertedDataset:
        """Batch `number` of `count` images, of random classes in turn; what it cost is in its metadata."""
        file = self.out / "inverted" / f"{variant.name}-{count}" / f"{number:05}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._invert(variant, number, count).save(file)
        return InvertedDataset.load(file)

    def _invert(self, variant: Variant, number: int, count: int) -> InvertedDataset:
        inverter = Inverter(
            strategic(self.fast, variant.strategy, number),
            stopping=variant.stopping,
            objective=deep_inversion(tv_l2=self.settings.tv_l2),
            iterations=self.settings.iterations,
            lr=self.settings.lr,
            seed=batch_seed(batch_seed(0, count), number),  # batches of different sizes share no image
            progress=self.progress,
        )
        classes = torch.randperm(self.model.num_classes, generator=torch.Generator().manual_seed(number))
        meter = report.StageMeter(self.device)
        meter.begin_batch()
        result = inverter.run(classes[torch.arange(count) % len(classes)], meter)
        if result.interrupted:
            raise KeyboardInterrupt
        costs = list(meter.costs.values())
        flops = sum(report.iteration_flops(inverter, cost.stage, count) * cost.iterations for cost in costs)
        confidence, _ = report.confidences(self.fast, result.images, result.keep, result.targets, self.mean, self.std)
        metadata = {
            "mean": self.mean,
            "std": self.std,
            "stopping": str(variant.stopping),
            "strategy": variant.strategy,
            "iterations_per_second": inverter.iterations / sum(cost.seconds for cost in costs),
            "gflop": flops / inverter.iterations / 1e9,
            "memory": max(cost.peak_memory for cost in costs) / 2**20,
            "last_memory": costs[-1].peak_memory / 2**20,
            "confidence": confidence.mean().item(),
        }
        return InvertedDataset.from_images(result.images, result.keep, result.targets, result.patch_size, metadata)

    def pool(self, variant: Variant) -> InvertedDataset:
        """The images of all rounds of a transfer, on the disk."""
        for number in range(self.settings.rounds):
            self.inverted(variant, number, self.settings.samples)
        return InvertedDataset.load(self.out / "inverted" / f"{variant.name}-{self.settings.samples}")

    def real(self, count: int, seed: int) -> InvertedDataset:
        """Random images of the training split."""
        dataset = self.load("train")
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
        images, labels = zip(*(dataset[i] for i in chosen.tolist()), strict=True)
        return self.whole(torch.stack(images), torch.tensor(labels))

    @torch.no_grad()
    def attended(self, dataset: InvertedDataset, count: int) -> InvertedDataset:
        """Of each image the `count` patches that have the most of the class token's attention."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        images, keep = dataset.images(), []
        with frozen(self.fast):
            for batch in images.split(BATCH):
                _, attention = self.fast(((batch - mean) / std).to(self.device), return_attention=True)
                keep.append(attention.topk(count).indices.sort().values.cpu())
        return InvertedDataset.from_images(
            images, torch.cat(keep), dataset.targets, self.patch_size, {"mean": self.mean, "std": self.std}
        )

    def noise(self, count: int, seed: int) -> Tensor:
        """Standard normal in normalised space, as the published code has it: (count, C, H, W)."""
        shape = (count, len(self.mean), *self.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def whole(self, images: Tensor, targets: Tensor) -> InvertedDataset:
        """Normalised images with all their patches; what is outside the range of pixels is clamped to it."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = (images * std + mean).clamp(0, 1)
        return InvertedDataset.from_images(pixels, None, targets, self.patch_size, {"mean": self.mean, "std": self.std})

    def test(self, count: int | None, for_student: bool = False) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of `count` random test images, or all, preprocessed for the model or for the student."""
        dataset = self.load("test", self.student if for_student else self.model)
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
        held = len(chosen) * dataset[0][0].nbytes <= MAX_HELD
        loader = DataLoader(Subset(dataset, chosen), BATCH, num_workers=0 if held else 8)
        return list(loader) if held else loader

    def accuracy(self, model: nn.Module, count: int | None) -> float:
        return 100 * accuracy(model, self.test(count), progress=False)

    def quantised(self, calibration: InvertedDataset | Tensor, bits: int, count: int | None) -> float:
        return self.accuracy(quantize(self.model, calibration, bits, 8), count)

    def transfer(self, dataset: InvertedDataset, seed: int, **settings) -> list[float]:
        """The student's accuracy in % after each round."""
        student, batch_size = copy.deepcopy(self.student), self.settings.batch_size
        settings |= {"evaluate": self._student_accuracy, "seed": seed, "progress": False}
        result = distill(self.fast, student, dataset=dataset, batch_size=batch_size, **settings)
        if result.interrupted:
            raise KeyboardInterrupt
        return [100 * r.accuracy for r in result.history]

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.student, self.image_size)

    def _student_accuracy(self, student: nn.Module) -> float:
        return accuracy(Reader(student, self.image_size).logits, self._student_features, progress=False)

    @cached_property
    def _student_features(self) -> list[tuple[Tensor, Tensor]]:
        """What all students' heads read of the test images: linear probing leaves the rest of them as it is."""
        reader = self._reader
        with frozen(reader.fast):
            return [
                (reader.features(lambda images=images: reader.fast(images.to(reader.device))), labels)
                for images, labels in self.test(self.settings.test_images, for_student=True)
            ]

    def judge(self, variant: Variant) -> list:
        """A row of `ABLATION` but for the name."""
        s = self.settings
        sets = [self.inverted(variant, seed, s.images) for seed in range(s.ablation_seeds)]
        row = [kept(sets[0]), self.sparsity(kept(sets[0]))]
        row += [[d.metadata[key] for d in sets] for key in ("iterations_per_second", "confidence")]
        row += [[self.quantised(d, bits, s.ablation_test_images) for d in sets] for bits in BITS]
        if self.student is None:
            return [*row, "no student"]
        return [*row, [self.transfer(d, i, rounds=1, steps=s.ablation_steps)[-1] for i, d in enumerate(sets)]]

    def sparsity(self, patches: float) -> float:
        """In %, of images that keep so many patches."""
        return 100 * (1 - patches / self.num_patches)


def strategic(fast: AcceleratedViT, strategy: str, seed: int) -> AcceleratedViT:
    """The same model, of which an inversion keeps other patches than the attended ones."""
    if strategy == "attention":
        return fast
    generator, other = torch.Generator().manual_seed(seed), copy.copy(fast)

    def forward_patches(*args, return_attention: bool = False, **options):
        out = fast.forward_patches(*args, return_attention=return_attention, **options)
        if not return_attention:
            return out
        logits, attention = out
        if strategy == "random":
            return logits, torch.rand(attention.shape, generator=generator).to(attention.device)
        return logits, -attention

    other.forward_patches = forward_patches
    return other


def kept(dataset: InvertedDataset) -> float:
    """Patches of an image, in the mean."""
    return dataset.positions.numel() / len(dataset)


def name_of(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture", type(model).__name__)


def weights_checksum(model: nn.Module) -> int:
    """CRC-32 of the weights."""
    value = 0
    for tensor in model.state_dict().values():
        value = checksum(tensor.cpu(), value)
    return value


def split(count: int | None) -> str:
    return "the whole test split" if count is None else f"{count:,} random images of the test split"
