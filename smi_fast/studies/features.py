"""Fig. 9: where inverted images lie among real ones, by the features of the model's last layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from smi_fast.backbones.base import class_names, frozen
from smi_fast.data.sparse import InvertedDataset
from smi_fast.distillation import Reader
from smi_fast.studies.experiment import BATCH, Experiment, split
from smi_fast.studies.page import Section
from smi_fast.studies.plots import save_points

PERPLEXITY = 20  # of t-SNE


def figure9(run: Experiment) -> Section:
    s = run.settings
    reader = Reader(run.model, run.fast.image_size)
    sets = {"real": real_features(run, reader)}
    for variant in (run.dense, run.sparse, run.rebirth):
        dataset = run.inverted(variant, 0, s.images)
        sets[variant.name] = inverted_features(reader, dataset), dataset.targets
    real, labels = sets.pop("real")
    found = labels.unique()
    sets = {name: of_classes(*one, found) for name, one in sets.items()}
    means = torch.stack([real[labels == label].mean(0) for label in found])
    rows = [["real images", len(real), nearest(real, labels, means, found), 1.0]]
    spread = (real - means[torch.searchsorted(found, labels)]).norm(dim=1).mean()
    for name, (features, targets) in sets.items():
        distance = (features - means[torch.searchsorted(found, targets)]).norm(dim=1).mean()
        rows.append([f"{name} inversion", len(features), nearest(features, targets, means, found), distance / spread])
    rows = [[name, count, right, float(ratio)] for name, count, right, ratio in rows]
    drawn = draw(run, {"real": (real, labels)} | sets)
    return Section(
        "Fig. 9: features of inverted and of real images",
        "Features are what the classifier's last layer takes. The table has the share of images whose features lie "
        f"nearest to the mean of their own class, of all the classes' means over {split(s.feature_images)}, and the "
        "distance to this mean, as a multiple of the real images' own. The means are those of the same real images. "
        "Inverted images of a class that none of these real images has are left out."
        + (" The plot is a t-SNE of all of them." if drawn else ""),
        {"images": "", "number": "d", "nearest to their class, %": ".1f", "distance": ".2f"},
        rows,
        ["In the paper, the features of sparse images form clusters by class, as those of real images do."],
        picture="figure9.png" if drawn else None,
    )


@torch.no_grad()
def real_features(run: Experiment, reader: Reader) -> tuple[Tensor, Tensor]:
    """Return the features (N, C) of real test images, and their labels (N,)."""
    features, labels = [], []
    with frozen(reader.fast):
        for images, classes in run.watched(run.test(run.settings.feature_images)):
            features.append(reader.features(lambda images=images: reader.fast(images.to(reader.device))))
            labels.append(classes)
    return torch.cat(features).mean(1).cpu(), torch.cat(labels)


@torch.no_grad()
def inverted_features(reader: Reader, dataset: InvertedDataset) -> Tensor:
    """Return the features (N, C) of inverted images, of which the model sees the kept patches."""
    with frozen(reader.fast):
        parts = [reader.features(lambda tokens=tokens: reader(tokens)) for tokens in _batches(dataset)]
    return torch.cat(parts).mean(1).cpu()


def _batches(dataset: InvertedDataset) -> Iterator:
    for first in range(0, len(dataset), BATCH):
        yield InvertedDataset.collate([dataset[n] for n in range(first, min(first + BATCH, len(dataset)))])[0]


def of_classes(features: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features and labels of those images that are of one of the classes."""
    among = torch.isin(labels, classes)
    return features[among], labels[among]


def nearest(features: Tensor, labels: Tensor, means: Tensor, classes: Tensor) -> float:
    """Return the share of features that are nearest to the mean of their own class, in %."""
    return 100 * (classes[torch.cdist(features, means).argmin(1)] == labels).float().mean().item()


def draw(run: Experiment, sets: dict[str, tuple[Tensor, Tensor]]) -> bool:
    """Draw a t-SNE of several sets of features and labels, and return whether the libraries for it are there."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return False
    features = torch.cat([features for features, _ in sets.values()])
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features.numpy())
    parts = torch.from_numpy(flat).split([len(labels) for _, labels in sets.values()])
    points = {name: (part, labels) for (name, (_, labels)), part in zip(sets.items(), parts, strict=True)}
    return save_points(points, class_names(run.model), run.out / "figure9.png")
