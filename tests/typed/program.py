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
    return smi_fast.select_patches(attention, keep, fraction=0.3)


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

    result = inverter.run([0, 1], seed=0, callback=callback)
    assert_type(result, smi_fast.InversionResult)
    assert_type(result.images, Tensor)
    assert_type(result.losses, Tensor)
    smi_fast.invert(inverter, range(10), folder, batch_size=5)
    dataset = smi_fast.InvertedDataset.load(folder)
    assert_type(dataset, smi_fast.InvertedDataset)
    yield result.images


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
    assert_type(smi_fast.load_data("CIFAR10", "data", model=model), torch.utils.data.Dataset)


def kernels_alone(x: Tensor, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    assert_type(kernels.bias_gelu(x), Tensor)
    assert_type(kernels.cross_entropy(x, torch.zeros(2)), Tensor)
    assert_type(kernels.residual_norm(x, x[0], x[0], 1e-6), tuple[Tensor, Tensor])
    assert_type(kernels.resolve_backend("auto", torch.device("cpu")), str)
    assert_type(kernels.attention(qkv, cu_seqlens, 7), Tensor | tuple[Tensor, Tensor])
    return kernels.view_cells(x, x, (3, 4), (8, 8))
