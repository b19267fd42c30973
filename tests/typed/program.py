"""A user's program with types. The type checker reads it (`make types`), and nothing runs it.

`assert_type` fails too where the checker sees Any, so that it shows that a result has a type.
"""

from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typing_extensions import assert_type

import smi_fast
from smi_fast import kernels
from smi_fast.backbones.base import Outputs


class Margin:
    """An objective of the user's own."""

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return nn.functional.multi_margin_loss(outputs.logits, targets)


def forward(images: Tensor, keep: Tensor) -> Tensor | list[Tensor]:
    model: nn.Module = timm.create_model("deit_tiny_patch16_224")
    fast = smi_fast.accelerate(model, dtype=torch.bfloat16, backend="torch", prune={3: 0.2, 6: smi_fast.Mass(0.9)})
    assert_type(fast, smi_fast.AcceleratedViT)
    assert_type(fast.image_size, tuple[int, int])
    assert_type(fast.mean, tuple[float, ...])
    assert_type(smi_fast.restore(fast), VisionTransformer)
    assert_type(smi_fast.CNN(nn.Identity()), smi_fast.CNN)
    assert_type(smi_fast.from_torchvision(model), VisionTransformer)
    logits: Tensor = fast(images, keep=keep)
    attention = torch.rand_like(logits)
    pruned = smi_fast.accelerate(model, prune={2: smi_fast.Drop(0.3, fuse="sum"), 4: smi_fast.Merge(8)})
    ensemble = smi_fast.Ensemble([fast, pruned])
    assert_type(ensemble.forward(images, keep=keep), Tensor)
    adaptor = smi_fast.SMIAdaptor(model, freeze=True)
    assert_type(adaptor.forward(images), tuple[Tensor, list[Tensor | None], Tensor])
    return smi_fast.select_patches(attention, keep, fraction=0.3)


def load(folder: Path) -> VisionTransformer | None:
    try:
        return smi_fast.from_huggingface(folder)
    except smi_fast.UnsupportedModelError:
        return None


def invert(model: nn.Module, folder: Path) -> Iterator[Tensor]:
    inverter = smi_fast.Inverter(
        smi_fast.accelerate(model),
        stopping=smi_fast.StoppingSchedule({50: 0.3, 100: 0.3}),
        objective=smi_fast.psaq(),
        iterations=200,
        lr=0.1,
        until=smi_fast.Until(0.9),
    )

    def callback(step: smi_fast.Step) -> None:
        assert_type(step.iteration, int)

    try:
        result = inverter.run([0, 1], seed=0, callback=callback)
    except smi_fast.NonFiniteError as error:
        result = error.result
    except smi_fast.Stopped as signal:
        raise SystemExit(signal.exit_code) from None
    assert_type(result, smi_fast.InversionResult)
    assert_type(result.images, Tensor)
    assert_type(result.losses, Tensor)
    assert_type(result.history, list[smi_fast.Stage])
    smi_fast.invert(inverter, range(10), folder, batch_size=5)
    dataset = smi_fast.InvertedDataset.load(folder)
    assert_type(dataset, smi_fast.InvertedDataset)
    yield result.images


def compete(teacher: nn.Module, student: nn.Module) -> list[tuple[int, float]]:
    objectives: list[smi_fast.Objective] = [Margin(), smi_fast.deep_inversion(tv_l2=1e-3)]
    objectives += [smi_fast.competition(objective, student, weight=10, js="exact") for objective in objectives]
    for objective in objectives:
        rebirth = smi_fast.Inverter(teacher, stopping=smi_fast.RebirthSchedule(4), objective=objective)
        assert_type(rebirth.run([3, 8]).images, Tensor)
    verifier = smi_fast.Verifier(student, every=50)
    inverter = smi_fast.Inverter(teacher, stopping={50: 0.3, 200: smi_fast.Mass(0.9), 500: smi_fast.Release(2)})
    inverter.run([3, 8], callback=verifier)
    schedule = smi_fast.WarmupCosine(warmup=50)
    cnn = smi_fast.Inverter(student, objective=smi_fast.deep_inversion_cnn(batch_norm=1), lr_schedule=schedule)
    cnn.run([3, 8])
    return verifier.records


def use(model: nn.Module, student: nn.Module, dataset: smi_fast.InvertedDataset, folder: Path) -> None:
    quantized = smi_fast.quantize(model, dataset, weight_bits=4)
    assert_type(quantized, smi_fast.QuantizedViT)
    packed = quantized.patches(torch.rand(2, 3, 224, 224), [torch.arange(3), torch.arange(5)])
    assert_type(packed, smi_fast.PackedTokens)
    assert_type(packed.lengths(), list[int])
    assert_type(quantized.forward_patches(packed), Tensor)
    assert_type(quantized.ranges, dict[str, tuple[float, float]])
    quantized.save(folder / "model.safetensors")
    assert_type(smi_fast.QuantizedViT.load(folder / "model.safetensors"), smi_fast.QuantizedViT)
    distilled = smi_fast.distill(model, student, dataset=dataset, rounds=1)
    assert_type(distilled, smi_fast.DistillationResult)
    assert_type(distilled.reaching(0.5), smi_fast.Round | None)
    test = smi_fast.load_data("CIFAR10", "data", model=model)
    assert_type(test, torch.utils.data.Dataset)
    assert_type(smi_fast.accuracy(quantized, torch.utils.data.DataLoader(test, batch_size=8)), float)


def train(student: smi_fast.AcceleratedViT, teacher: nn.Module, dataset: smi_fast.InvertedDataset) -> Tensor:
    fast = smi_fast.accelerate(teacher)
    dataset.transform = smi_fast.RandomHorizontalFlip(dataset.image_size, dataset.patch_size)
    tokens, targets = dataset.collate([dataset[0], dataset[1]])
    assert_type(targets, Tensor)
    tokens = smi_fast.normalize_patches(tokens, fast.mean, fast.std)
    return smi_fast.transfer_loss(student.outputs(tokens).logits, fast.outputs(tokens).logits, temperature=4)


def kernels_alone(x: Tensor, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    assert_type(kernels.bias_gelu(x), Tensor)
    assert_type(kernels.cross_entropy(x, torch.zeros(2)), Tensor)
    assert_type(kernels.residual_norm(x, x[0], x[0], 1e-6), tuple[Tensor, Tensor])
    assert_type(kernels.resolve_backend("auto", torch.device("cpu")), str)
    assert_type(kernels.attention(qkv, cu_seqlens, 7), Tensor | tuple[Tensor, Tensor])
    return kernels.view_cells(x, x, (3, 4), (8, 8))
