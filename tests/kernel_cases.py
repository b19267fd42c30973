"""What the kernels' tests share: packed batches, the attention that everything is measured against, and the 2x rule."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def cu_seqlens_of(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def naive_attention(qkv: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Attention sequence by sequence from its formula, in the dtype of qkv: out (T, H, D), class attention (H, T)."""
    outs, rows = [], []
    for sequence in qkv.split(lengths):
        q, k, v = sequence.permute(1, 2, 0, 3)  # (H, N, D) each
        p = (q @ k.mT * scale).softmax(-1)  # (H, N, N)
        outs.append((p @ v).transpose(0, 1))
        rows.append(p[:, :1].sum(1))  # (H, N), also of an empty sequence
    return torch.cat(outs), torch.cat(rows, 1)


def twice(run: Callable[[], dict]) -> tuple[dict, dict]:
    """Run something two times, both from the same state of torch's random generators. Needs a GPU."""
    state = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    first = run()
    torch.random.set_rng_state(state[0])
    torch.cuda.set_rng_state(state[1])
    return first, run()


def assert_within_twice(kernel: dict, plain: list[dict], exact: dict) -> None:
    """Each of the kernel's results errs at most twice as far from the float64 result as plain torch does.

    `plain` are several ways to write the same in plain torch, none of them the true one: the largest error counts.
    """
    for name, reference in exact.items():
        error, *errors = ((x[name].double() - reference).abs().max().item() for x in (kernel, *plain))
        assert kernel[name].isfinite().all(), f"{name} is not finite"
        assert error <= 2 * max(errors) + 1e-6, f"{name} errs by {error:.3g}, plain torch by {errors}"


def with_errors_elsewhere(plain: list[dict], exact: dict, draw: Callable[[], tuple], draws: int) -> list[dict]:
    """Plain torch's results, and what they would be with its errors on other draws: a single draw is chance where a few
    near ties decide how far a softmax errs, or few elements are compared. `draw` ends in what is exact and in results
    of plain torch."""
    for _ in range(draws):
        *_, exact_there, results = draw()
        plain = plain + [{name: exact[name] + (x[name] - exact_there[name]) for name in exact} for x in results]
    return plain


@contextmanager
def canaries(module, fake: str):
    """Let the launchers of a module write into the middle of larger tensors, and see that nothing is written around.

    `fake` names the function that allocates the outputs."""
    original, around = getattr(module, fake), []

    def allocate(*args, **kwargs):
        outputs = original(*args, **kwargs)
        surrounded = tuple(_surrounded(x, around) for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
        return surrounded if isinstance(outputs, tuple) else surrounded[0]

    with mock.patch.object(module, fake, allocate):
        yield
    assert around
    for margin, before in around:
        assert torch.equal(margin, before), "written beyond an output"


def _surrounded(x: Tensor, around: list[tuple[Tensor, Tensor]], margin: int = 4096) -> Tensor:
    size = x.numel() * x.element_size()
    memory = torch.randint(0, 256, (size + 2 * margin,), dtype=torch.uint8, device=x.device)
    around += [(part, part.clone()) for part in (memory[:margin], memory[margin + size :])]
    return memory[margin : margin + size].view(x.dtype).view(x.shape)


def untouched(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor on the CPU of which only what is touched takes memory: a file without contents, mapped."""
    size = math.prod(shape) * dtype.itemsize
    path = folder / secrets.token_hex(8)
    with open(path, "wb") as file:
        file.truncate(size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8).view(dtype).view(shape)


@contextmanager
def only_the_last_program(module):
    """Let the launchers of a module run the last program of each grid only, in the interpreter: of huge tensors, only
    the last elements are then touched."""
    from triton.runtime.interpreter import InterpreterBuilder

    original = module.launch

    def launch(kernel, grid, **arguments):
        last = tuple(n - 1 for n in (*grid, 1, 1)[:3])
        with mock.patch.object(InterpreterBuilder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", last)):
            original(kernel, (1,), **arguments)

    with mock.patch.object(module, "launch", launch):
        yield


@contextmanager
def lazily_allocated(module, folder: Path, *fakes: str):
    """Let a module's launchers allocate their outputs `untouched`. `fakes` name the functions that allocate them."""

    def allocate(original, *args):
        outputs = original(*(x.to("meta") if isinstance(x, Tensor) else x for x in args))
        if isinstance(outputs, tuple):
            return tuple(untouched(tuple(x.shape), x.dtype, folder) for x in outputs)
        return untouched(tuple(outputs.shape), outputs.dtype, folder)

    with mock.patch.multiple(module, **{fake: partial(allocate, getattr(module, fake)) for fake in fakes}):
        yield


@contextmanager
def poisoned_memory():
    """Fresh memory holds NaN (integers: the largest), so that what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class DeviceWork(TorchDispatchMode):
    """What the launchers of a module do while this context is active.

    `launches` counts the kernels that they launch. `operators` has the names of the torch operators that do more than
    allocate, view or ship memory, in the order of their calls.
    """

    IDLE = ("detach", "view", "unsqueeze", "slice", "empty", "new_empty", "lift_fresh", "_to_copy")

    def __init__(self, module):
        super().__init__()
        self.launches, self.operators, self._launching = 0, [], False
        self._patch = mock.patch.object(module, "launch", self._launch)
        self._original = module.launch

    def _launch(self, *args, **arguments):
        self.launches += 1
        self._launching = True  # the interpreter calls operators to run a kernel
        self._original(*args, **arguments)
        self._launching = False

    def __enter__(self):
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if function.namespace != "smi_fast" and name not in self.IDLE and not self._launching:
            self.operators.append(name)
        return function(*args, **(kwargs or {}))
