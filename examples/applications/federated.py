"""One-shot federated learning: clients send their models once, and the server inverts the ensemble of them.

    python examples/applications/federated.py --data DIR --out RUN_DIR [--clients 3] [--seeds 0 1 2]

The training images are divided among the clients, and each class unevenly: the clients' shares of it are drawn from a
Dirichlet distribution with all parameters --alpha. Each client trains on its own images and sends its model. The server
has no images. It has:

    FedAvg              the mean of the clients' weights, weighted by their numbers of images (McMahan et al., 2017)
    best client         the client that is best on the test images, which a server could not know
    ensemble            the mean of the clients' logits, at the cost of all of them in every forward pass
    noise               FedAvg, after learning the ensemble's answers to Gaussian noise
    dense inversion     FedAvg, after learning the ensemble's answers to images into which the ensemble was inverted
    sparse inversion    the same with sparse images, whose patches are chosen by the mean attention of the clients

The ceiling is one model trained on the images of all clients, for as many epochs.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from workbench import DENSE, SPARSE, Data, Table, arguments, clocks, fine_tune, invert, load, right

from smi_fast import Ensemble, InvertedDataset, accelerate, distill
from smi_fast.models import cifar10_student
from smi_fast.seeds import batch_seed


def divide(data: Data, clients: int, alpha: float, seed: int) -> list[Data]:
    """Divide the images of each class among the clients by shares from a Dirichlet distribution."""
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    parts: list[list[torch.Tensor]] = [[] for _ in range(clients)]
    for label in data.labels.unique():
        index = (data.labels == label).nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=generator)]
        shares = random.dirichlet([alpha] * clients)
        ends = (shares.cumsum() * len(index)).round().astype(int)[:-1]
        for part, chosen in zip(parts, index.tensor_split(ends.tolist()), strict=True):
            part.append(chosen)
    return [data[torch.cat(part)] for part in parts]


def averaged(models: list[nn.Module], weights: list[float]) -> nn.Module:
    """Return a model with the weighted mean of the models' weights."""
    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    mean.load_state_dict({
        name: sum(state[name] * weight for state, weight in zip(states, weights, strict=True)) / sum(weights)
        for name in states[0]
    })  # fmt: skip
    return mean


def noise(ensemble: Ensemble, count: int, seed: int) -> InvertedDataset:
    """Return Gaussian noise in normalised space, clamped to the range of pixels."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (ensemble.mean, ensemble.std))
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * std + mean
    return InvertedDataset.from_images(images.clamp(0, 1), None, torch.zeros(count).long(), (4, 4))


def main() -> None:
    args = arguments(__doc__, clients=3, alpha=1.0, steps=60, server_lr=0.01, temperature=3.0)
    started, (train, test) = clocks(), load(args)
    table = Table("federated", ("accuracy, %", "inversion, CPU s"))
    for seed in args.seeds:
        parts = divide(train, args.clients, args.alpha, seed)
        models = [fine_tune(cifar10_student(), part, args, batch_seed(seed, i)) for i, part in enumerate(parts)]
        table.add("best client", max(right(model, test) for model in models), 0)
        fedavg, ensemble = averaged(models, [len(part.labels) for part in parts]), Ensemble(models, torch.bfloat16)
        table.add("FedAvg", right(fedavg, test), 0)
        table.add("ensemble", right(ensemble, test), 0)
        for how in ("noise", DENSE, SPARSE):
            before = clocks()
            if how == "noise":
                images = noise(ensemble, args.inverted, seed)
            else:
                images = invert(ensemble, range(10), how, args, seed)
            seconds = clocks()[1] - before[1]
            server = copy.deepcopy(fedavg)
            distill(
                ensemble, accelerate(server, dtype=torch.bfloat16), dataset=images, rounds=1, steps=args.steps,
                batch_size=64, linear_probing=False, temperature=args.temperature, lr=args.server_lr, seed=seed,
                progress=False,
            )  # fmt: skip
            table.add(f"FedAvg, then {how}", right(server, test), seconds)
        ceiling = fine_tune(cifar10_student(), train, args, seed)
        table.add("all images in one place", right(ceiling, test), 0)
    table.save(args, started)


if __name__ == "__main__":
    main()
