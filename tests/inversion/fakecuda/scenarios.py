"""Scenarios that test_fakecuda.py runs, each in a process of its own, on the CUDA runtime beside this file.

    python scenarios.py SCENARIO LOG DEVICE

prints what the scenario found as JSON. LOG gets all that reached the runtime, with a note after each iteration.
"""

import ctypes
import json
import os
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import timm
import torch
from torch import nn
from triton.runtime.jit import JITFunction

import smi_fast
from smi_fast import InvertedDataset, Inverter, RebirthSchedule, Until, WarmupCosine, deep_inversion, psaq
from smi_fast.models import cifar10_resnet20, cifar10_vit
from smi_fast.runs.run import Run

runtime = ctypes.CDLL(os.environ["FAKECUDA_RUNTIME"])
runtime.fake_launch.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
STOPS = {8: 0.3, 16: 0.3}
ITERATIONS = 24
CNN = {"pooling": {0: 2, 12: 1}, "lr_schedule": WarmupCosine(4)}


def launch_nothing(self, *args, grid, warmup, **options):
    """In the place of Triton's launcher, which would load a kernel into a driver that there is not."""
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    runtime.fake_launch(self.__name__.encode(), stream)


JITFunction.run = launch_nothing
torch.backends.cudnn.enabled = False  # it asks a driver that there is not; torch's own convolutions run in its place


def note(text: str) -> None:
    runtime.fake_note(text.encode())


def small_model() -> nn.Module:
    return cifar10_vit(False, img_size=16, patch_size=4, depth=2, embed_dim=64, num_heads=2)


def run(model: nn.Module, targets=(0, 1, 2, 3), callback=lambda step: note(str(step.iteration)), **options) -> None:
    settings = {"stopping": STOPS, "iterations": ITERATIONS, "progress": False} | options
    Inverter(model, **settings).run(list(targets), callback=callback)


def waiting_loss(logits, images, targets):
    return nn.functional.cross_entropy(logits.float(), targets) * (1 + 0 * logits.mean().item())


def plain_loss(logits, images, targets):
    return nn.functional.cross_entropy(logits.float(), targets) + 1e-3 * images.abs().mean()


def stages(device: torch.device) -> dict:
    run(small_model().to(device))
    note("next run")
    run(small_model().to(device), objective=plain_loss)
    note("next run")
    student = small_model().to(device)
    student.pretrained_cfg = student.pretrained_cfg | {"mean": (0.5, 0.4, 0.3)}
    run(small_model().to(device), objective=smi_fast.competition(smi_fast.deep_inversion(), student))
    return {}


def methods(device: torch.device) -> dict:
    run(small_model().to(device), objective=psaq())
    note("next run")
    run(small_model().to(device), stopping=RebirthSchedule(3))
    note("next run")
    run(small_model().to(device), published=True)
    note("next run")
    run(cifar10_resnet20(False, depth=8).to(device), stopping="dense", **CNN)
    return {}


class Scripted(Until):
    """In the place of what a model is sure of: one image in each check, the slots 0, 1, 0 and 0."""

    checked = 0

    def count(self, confident, logits, targets):
        super().count(confident, logits, targets)
        note("check")
        Scripted.checked += 1
        return [int(slot == (Scripted.checked == 2)) for slot in range(len(confident))]


def long_run(device: torch.device) -> dict:
    """A run in a folder, which is stopped in the second stage and goes on."""
    inverter = Inverter(small_model().to(device), stopping=STOPS, iterations=ITERATIONS, progress=False)
    enter, save, runs = Run.__enter__, Run.save, []
    Run.__enter__ = lambda run: runs.append(run) or enter(run)
    Run.save = lambda run, name, state: [note("checkpoint"), save(run, name, state)]
    # No kernel chooses patches here, so that there are none to store.
    stored = InvertedDataset.from_images
    InvertedDataset.from_images = lambda images, keep, *rest: stored(images.nan_to_num().clamp(0, 1), None, *rest)
    found = {"checkpoints": []}

    def tell(number: int, step: smi_fast.Step) -> None:
        note(str(step.iteration))
        if len(runs) == 1 and step.iteration == 12:
            runs[0].signals.asked = 15

    with tempfile.TemporaryDirectory() as folder:
        try:
            smi_fast.invert(inverter, [0, 1, 2, 3], folder, callback=tell)
        except smi_fast.Stopped:
            found["checkpoints"] = [file.name for file in Path(folder, "checkpoints").iterdir()]
            note("next run")
        found["images"] = len(smi_fast.invert(inverter, [0, 1, 2, 3], folder, callback=tell))
    return found


def stream(device: torch.device) -> dict:
    """Four images through two slots. A note is the number of an iteration in the slots, or "settling" for others."""
    settings = {"stopping": {8: 0.3}, "iterations": 40, "lr_schedule": WarmupCosine(4), "progress": False}
    inverter = Inverter(
        small_model().to(device), objective=deep_inversion(norm="image"), until=Scripted(checks=1, every=5), **settings
    )
    inverter.stream(range(4), 2, callback=lambda step: note(str(step.iteration) if step.stage.start else "settling"))
    return {}


def memory(device: torch.device) -> dict:
    """MiB that the allocator has held at most up to the end of each of three runs, and the most that was in use: of a
    ViT, and of a CNN."""
    vit = cifar10_vit(False, img_size=224, patch_size=16, depth=6, embed_dim=192, num_heads=3)
    models = {
        "vit": (smi_fast.accelerate(vit.to(device)), {}),
        "cnn": (cifar10_resnet20(False, depth=8).to(device), {"stopping": "dense"} | CNN),
    }
    found = {}
    for name, (model, options) in models.items():
        reserved = []
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            run(model, targets=[0] * 32, callback=None, **options)
            reserved.append(torch.cuda.max_memory_reserved(device) / 2**20)
        found[name] = {"reserved": reserved, "peak": torch.cuda.max_memory_allocated(device) / 2**20}
    return found


def failed_capture(device: torch.device) -> dict:
    """A loss that waits for the device, which a capture forbids; then one that does not."""
    model = small_model().to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, objective=waiting_loss)
    mode = torch.cuda.get_sync_debug_mode()
    torch.randn(4, device=device)  # which raises while torch takes the generator for captured
    reserved = []
    for _ in range(3):
        note("again")
        run(model)
        reserved.append(torch.cuda.memory_reserved(device))
    return {"warnings": [str(warning.message) for warning in caught], "sync_debug_mode": mode, "reserved": reserved}


def threads(device: torch.device) -> dict:
    """Two runs at once on one device, of models of different depth."""
    models = [cifar10_vit(False, img_size=16, patch_size=4, depth=depth, num_heads=2).to(device) for depth in (1, 3)]
    runs = [threading.Thread(target=run, args=(model,), kwargs={"callback": None}) for model in models]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    return {}


def nodes(device: torch.device) -> dict:
    """The nodes of each graph of deit_tiny, and of deit_base with a quarter of its blocks."""
    sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))
    from nodes import counted

    found = {}
    for name, depth in (("deit_tiny", 12), ("deit_base", 3)):
        model = timm.create_model(f"{name}_patch16_224", depth=depth).to(device)
        for patches, stops in ((46, {1: 0.763}), (196, {})):
            with counted() as counts:
                run(model, range(8), None, stopping=stops, iterations=6, dtype=torch.bfloat16)
            found[f"{name}, {depth} blocks, {patches} patches"] = counts
    return found


if __name__ == "__main__":
    scenario, log, name = sys.argv[1:]
    warnings.simplefilter("error", UserWarning)  # that iterations run without a graph is one
    runtime.fake_log(log.encode())
    scenarios = {
        function.__name__: function
        for function in (stages, methods, long_run, stream, memory, failed_capture, threads, nodes)
    }
    found = scenarios[scenario](torch.device(name))
    runtime.fake_log(None)
    print(json.dumps(found), flush=True)
    os._exit(0)  # a thread of autograd may still hold Python objects, which aborts an interpreter that shuts down
