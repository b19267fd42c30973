"""Time of the host for eager passes on CUDA, beside timm's own: python bench/host.py [--rounds N] [--profile NAME]

An eager pass of a small model is limited by the host, which launches its kernels one by one. This command measures the
host alone: it never waits for the device, and on a machine without a GPU it runs on the CUDA runtime of the tests,
which computes nothing. Triton's own launcher is part of the time; the driver's part of a launch is missing there, for
timm's kernels as for ours. There is no cuDNN either, so timm's attention is torch's flash attention there, and its
patch embedding a product as ours is; a convolution takes longer.

The passes take turns, and a ratio is that of two medians. The weights are bfloat16, or float32 ones that are cast once.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from smi_fast import accelerate

TESTS = Path(__file__).resolve().parents[1] / "tests"
PARTS = 10  # calls that are timed together
Pass = Callable[[], object]


def forward(model: nn.Module, *args, **options) -> Tensor:
    with torch.no_grad():
        return model(*args, **options)


def forward_backward(model: nn.Module, images: Tensor, *args, **options) -> Tensor:
    logits = model(images, *args, **options)
    return torch.autograd.grad(logits, images, torch.ones_like(logits))[0]


def gathered(model: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """timm's own modules on the kept patches."""
    x = model._pos_embed(model.patch_embed(images))
    rows = torch.cat((keep.new_zeros(len(keep), 1), keep + 1), dim=1)
    x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
    return model.forward_head(model.norm(model.blocks(model.norm_pre(x))))


def embed_by_product(model: nn.Module) -> nn.Module:
    """Let a timm model embed patches by a matrix product."""
    proj = model.patch_embed.proj
    height, width = proj.kernel_size

    def product(x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, height)).unflatten(4, (-1, width)).permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, ...]
        return nn.functional.linear(x.flatten(3), proj.weight.flatten(1), proj.bias).permute(0, 3, 1, 2)

    proj.forward = product
    return model


def groups(name: str, batch: int, device: torch.device) -> dict[str, dict[str, Pass]]:
    """Passes that are to be compared, by the name of the group and of the pass; timm's comes first."""
    single, half, model = (timm.create_model(name).eval().requires_grad_(False).to(device) for _ in range(3))
    fast, cast = accelerate(half.bfloat16()), accelerate(single, dtype=torch.bfloat16)
    model = model.bfloat16()
    if "FAKECUDA_RUNTIME" in os.environ:
        embed_by_product(model)
        torch.backends.cuda.enable_cudnn_sdp(False)
    cast.cast_weights().__enter__()  # for as long as this process lives
    images = torch.randn(batch, 3, *model.patch_embed.img_size, device=device, dtype=torch.bfloat16)
    leaf = images.clone().requires_grad_()
    patches = model.patch_embed.num_patches
    keep = torch.rand(batch, patches, device=device).argsort(1)[:, : int(0.235 * patches)]  # 46 of 196
    found = {}
    for what, run, x in (("forward", forward, images), ("forward and backward", forward_backward, leaf)):
        found[f"dense {what}"] = {
            "timm": partial(run, model, x), "ours": partial(run, fast, x), "ours, cast": partial(run, cast, x)
        }  # fmt: skip
        found[f"kept {what}"] = {
            "timm dense": partial(run, model, x),
            "timm's blocks": partial(run, partial(gathered, model), x, keep),
            "ours": partial(run, fast, x, keep=keep),
            "ours, cast": partial(run, cast, x, keep=keep),
        }
    return found


def seconds(run: Pass) -> float:
    start = time.perf_counter()
    for _ in range(PARTS):
        run()
    return (time.perf_counter() - start) / PARTS


def measured(passes: dict[str, Pass], rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass in each round, in which all take turns."""
    for run in passes.values():
        seconds(run)
    times = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            times[name].append(seconds(run))
        torch.cuda.synchronize()
    return times


def profile(run: Pass) -> None:
    seconds(run)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(10):
        seconds(run)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="only the groups whose name contains this")
    parser.add_argument("--profile", help="instead of timing, profile the passes of this name")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return on_fake_runtime(sys.argv)
    for group, passes in groups(options.model, options.batch, torch.device("cuda")).items():
        if options.only not in group:
            continue
        if options.profile:
            print(group)
            profile(passes[options.profile])
            continue
        times = measured(passes, options.rounds)
        first = statistics.median(next(iter(times.values())))
        for name, values in times.items():
            median = statistics.median(values)
            print(f"{group:27} {name:14} {1e3 * median:7.3f} ms {median / first:5.2f} of timm's")
    return 0


def on_fake_runtime(command: list[str]) -> int:
    """Run this command again where torch sees a GPU that computes nothing."""
    if "FAKECUDA_RUNTIME" in os.environ:
        raise SystemExit("torch sees no GPU, not even that of the runtime that computes nothing")
    sys.path.append(str(TESTS))
    from fakecuda_cases import fake_cuda

    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([sys.executable, *command], env=fake_cuda(Path(folder))).returncode


if __name__ == "__main__":
    sys.exit(main())
