"""What the BatchNorm layers of a model see: the statistics of a batch, beside those of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smi_fast.backbones.support import UnsupportedModelError

LAYERS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # in evaluation, both normalise in the same way


@dataclass(frozen=True)
class BatchNormStatistics:
    """Statistics of the input z (B, C, H, W) of a BatchNorm layer, and those that it has learnt.

    Args:
        name: the layer's name in the model.
        mean, var: (C,) mean and biased variance of z over B, H and W, with gradients, in float32, or float64 for a
            float64 model.
        running_mean, running_var: (C,) what the layer has learnt of its training data.
    """

    name: str
    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor


class _Moments(torch.autograd.Function):
    """Mean and biased variance (C,) of z (B, C, H, W), in float32 or float64.

    For g_m and g_v, the gradients of a channel's mean and variance over n values, the gradient of z is
    (g_m + 2 g_v (z - mean)) / n. It is computed in one pass over z, where torch's own rules take five.
    """

    @staticmethod
    def forward(ctx, z: Tensor) -> tuple[Tensor, Tensor]:
        exact = z.to(torch.promote_types(z.dtype, torch.float32))
        if z.is_cuda:
            var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
        else:  # torch's var_mean adds up one value after the other on a CPU, which takes 2 to 19 times as long
            mean = exact.mean((0, 2, 3))
            var = (exact - mean[:, None, None]).square_().mean((0, 2, 3))
        ctx.save_for_backward(z, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        z, mean = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        slope = 2 * grad_var / count
        offset = grad_mean / count - slope * mean
        zeros = torch.zeros_like(mean)
        # slope * z + offset, in torch's fastest operation of this kind
        return torch.batch_norm(z, slope, offset, zeros, zeros + 1, False, 0.0, 0.0, False)


@contextmanager
def batch_norm_statistics(model: nn.Module, *, differentiable: bool) -> Iterator[dict[str, BatchNormStatistics]]:
    """Yield a dict that a forward pass within this context fills: from the names of the BatchNorm layers that it
    reaches, in the order of the calls, to their statistics.

    The layers are those of class BatchNorm2d, its subclasses such as timm's BatchNormAct2d, and SyncBatchNorm. Other
    norms, such as BatchNorm1d, are left out, as in the published code of DeepInversion. The statistics are read by
    hooks, which are gone afterwards, also after an error.

    Args:
        differentiable: whether the statistics need gradients.

    Raises:
        UnsupportedModelError: the model has no such layer, or a layer has no running statistics, is in training mode,
            runs twice in a forward pass, or runs without the gradients that are needed.
    """
    layers = batch_norm_layers(model)
    if not layers:
        raise UnsupportedModelError(f"the model is a {type(model).__name__}, which has no BatchNorm2d with statistics")
    if differentiable and any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise UnsupportedModelError("statistics of BatchNorm cannot be read under gradient checkpointing: turn it off")
    found: dict[str, BatchNormStatistics] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            record = partial(_record, found, name, differentiable)
            hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield found


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that `batch_norm_statistics` reads, by their names, in the order of `model.modules()`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def _record(
    found: dict[str, BatchNormStatistics], name: str, differentiable: bool, layer: nn.Module, args: tuple, kwargs: dict
) -> None:
    z = args[0] if args else next(iter(kwargs.values()))
    if layer.running_mean is None or layer.running_var is None:
        raise UnsupportedModelError(f"{name} is a BatchNorm without running statistics, which those of images are for")
    if layer.training:
        raise UnsupportedModelError(f"{name} is in training mode, where BatchNorm has no statistics of its own yet")
    if name in found:
        raise UnsupportedModelError(f"{name} runs twice in a forward pass, so it has no statistics of its own")
    if z.ndim != 4:
        raise UnsupportedModelError(f"{name} is a BatchNorm of shape {tuple(z.shape)}, expected (B, C, H, W)")
    if differentiable and not (z.requires_grad and torch.is_grad_enabled()):
        raise UnsupportedModelError(f"{name} runs without gradients, so the statistics of its input have none")
    found[name] = BatchNormStatistics(name, *_Moments.apply(z), layer.running_mean, layer.running_var)
