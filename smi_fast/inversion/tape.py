"""On a CPU: a function that is called over and over, recorded once and then run again without its Python code.

In a small model, Python takes as long as the matrix products do. A tape holds the operators that ran, in order, as the
lines of one Python function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smi_fast.kernels.cpu import recording

UNREPEATABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
LIFT_FRESH = torch.ops.aten.lift_fresh.default  # torch.tensor(number)
AS_STRIDED, INDEX = torch.ops.aten.as_strided.default, torch.ops.aten.index.Tensor


class Taped:
    """Calls `function(number)`. The first call with each number runs as it is, the second one is recorded while it
    runs, and from then on the record runs.

    A function that reads values of tensors on the host, or makes tensors of such values, always runs as it is.

    The function must do the same operators in every call with the same number, on tensors that it finds in the same
    memory or makes itself. Values that change outside of these must not decide what it does.

    Args:
        function: takes one integer. Its result is dropped.
    """

    def __init__(self, function: Callable[[int], object]):
        self.function = function
        self.seen: set[int] = set()
        self.programs: dict[int, Callable[[], object]] = {}

    def __call__(self, number: int) -> None:
        if number in self.programs:
            self.programs[number]()
        elif number in self.seen:
            with Tape() as tape, recording(tape.call):
                self.function(number)
            self.programs[number] = tape.program() if tape.repeatable else partial(self.function, number)
        else:
            self.seen.add(number)
            self.function(number)


def _is_repeatable(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether an operator neither makes a tensor of a number nor gives values or sizes that values decide."""
    if func is INDEX:
        return not any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is not None
    return func is not LIFT_FRESH and UNREPEATABLE.isdisjoint(func.tags)


class Tape(TorchDispatchMode):
    """Records the operators that run in its context. Autograd is not on the tape, but what it runs is.

    A tensor's name stands for the memory that it lies in, because autograd hands out other tensors for the same memory.
    Memory is what the function has made, or what it found and will find again.
    """

    def __init__(self):
        super().__init__()
        self.repeatable = True  # no operator has passed values between tensors and the host
        self.lines: list[tuple[str, list[str]]] = []  # each with the names that it reads or writes
        self.constants: dict[str, Any] = {}
        self._names: dict[tuple, str] = {}  # of tensors, by their places in memory
        self._made: dict[int, str | None] = {}  # a tensor for each storage; None for a storage that was found
        self._kept: list[Any] = []  # keeps the numbers of memory from being used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        found, reads = tree_leaves(result), []
        arguments = [self._write(x, reads) for x in args]
        arguments += [f"{name}={self._write(x, reads)}" for name, x in kwargs.items()]
        self.repeatable &= _is_repeatable(func, args, kwargs)
        if func._schema.is_mutable or not found or any(isinstance(x, Tensor) and self._is_new(x) for x in found):
            target = self._bind(result, reads)
            self._line(f"{target} = {self._constant(func)}({', '.join(arguments)})", reads)
        return result

    def call(self, function: Callable, arguments: Iterable) -> None:
        """Record the call of a function that is no operator and returns nothing."""
        reads: list[str] = []
        written = [self._write(x, reads) for x in arguments]
        self._line(f"{self._constant(function)}({', '.join(written)})", reads)

    def program(self) -> Callable[[], None]:
        """Return a function that does what was recorded. It frees memory as soon as nothing reads it any more."""
        last = {name: number for number, (_, names) in enumerate(self.lines) for name in names}
        body = []
        for number, (line, names) in enumerate(self.lines):
            done = sorted({name for name in names if last[name] == number and name not in self.constants})
            body += [line] + ([f"del {', '.join(done)}"] if done else [])
        scope = dict(self.constants)
        exec("\n    ".join(["def program():", *body, "return"]), scope)
        program = torch.no_grad()(scope["program"])
        return torch.autocast("cpu", enabled=False)(program)  # what autocast did is on the tape

    def _line(self, line: str, names: list[str]) -> None:
        self.lines.append((line, names))

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _write(self, x: Any, reads: list[str]) -> str:
        """Return how an argument is written, and note the tensors in it."""
        if isinstance(x, Tensor):
            reads.append(self._name(x))
            return reads[-1]
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(self._write(y, reads) for y in x)}]"
        return repr(x) if x is None or isinstance(x, (bool, int, str)) else self._constant(x)

    def _bind(self, result: Any, reads: list[str]) -> str:
        """Return what a line assigns to, and name the tensors that it makes."""
        if isinstance(result, (list, tuple)):
            return f"[{', '.join(self._bind(x, reads) for x in result)}]" if result else "_"
        if result is None or not self._is_new(result):
            return "_"
        reads.append(f"v{len(self._names)}")
        self._names[self._place(result)] = reads[-1]
        self._made.setdefault(self._storage(result), reads[-1])
        return reads[-1]

    def _is_new(self, x: Tensor) -> bool:
        """Return whether a line has to make a result: it has no name yet, and is no view of memory that was found."""
        return self._place(x) not in self._names and self._made.get(self._storage(x), "") is not None

    def _name(self, x: Tensor) -> str:
        """Return the name of a tensor that is read."""
        place, storage = self._place(x), self._storage(x)
        if place not in self._names:
            if self._made.setdefault(storage, None) is None:  # found
                self._names[place] = self._constant(x)
            else:  # a view that no operator made
                base, self._names[place] = self._made[storage], f"v{len(self._names)}"
                shape = f"{tuple(x.shape)}, {x.stride()}, {x.storage_offset()}"
                self._line(
                    f"{self._names[place]} = {self._constant(AS_STRIDED)}({base}, {shape})", [base, self._names[place]]
                )
        return self._names[place]

    def _storage(self, x: Tensor) -> int:
        """Return a number for the memory of a tensor, which no other memory gets while this object lives."""
        if not torch._C._has_storage(x):  # oneDNN's layout
            self._kept.append(x)
            return -id(x)
        reference = StorageWeakRef(x.untyped_storage())
        if reference.cdata not in self._made:
            self._kept.append(reference)
        return reference.cdata

    def _place(self, x: Tensor) -> tuple:
        storage = self._storage(x)
        if storage < 0:
            return (storage,)
        return storage, x.dtype, x.storage_offset(), tuple(x.shape), x.stride(), x.is_conj(), x.is_neg()
