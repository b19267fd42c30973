"""Compiles kernels for GPUs and reports what they use: registers, stack, shared memory, tensor cores. No GPU is needed.

A script must use this module under `if __name__ == "__main__"`, and TRITON_INTERPRET must not be set in its
environment. Triton's own cache keeps what has been compiled.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from launches import name_of, table_launches
from report import as_text
from smi_fast.kernels.backend import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORES = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}  # in PTX
# The constants that the dispatch table decides about, in the order in which a configuration lists them.
CONSTANTS = ("BD", "BM", "BN", "BR", "BC", "BT", "BE", "CHANNELS_FIRST", "num_warps", "num_stages")
REGISTERS = 65536  # registers of a multiprocessor
REGISTER_UNIT = 256  # a multiprocessor gives registers to a warp in multiples of this
LEAST_SHARED = 1024  # bytes of shared memory that each program takes in addition to what it asks for
COLUMNS = ("kernel", "configuration", "registers", "spilled", "shared", "tensor core", "architectures")
HEADING = """\
# What each kernel uses in every configuration that kernels/dispatch.json can choose: the registers of a thread, bytes
# that it spills to the stack, a program's bytes of shared memory, and the tensor cores that its matrix products run on.
# Numbers are the most over all dtypes, flags and alignments that a kernel is specialised to in that configuration.
# bench/compile_report.py --table writes this file."""
Configurations = dict[tuple[str, str, str], list[Launch]]  # by kernel, configuration and architecture


class Multiprocessor(NamedTuple):
    """How much can be resident on a multiprocessor (CUDA C++ Programming Guide, table of compute capabilities)."""

    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_per_program: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Multiprocessor(48, 24, 100 * 1024, 99 * 1024),
}


class Usage(NamedTuple):
    """What one program of a compiled kernel uses. Registers that do not suffice are spilled to the stack."""

    kernel: str
    config: str
    arch: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_core: str

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident, given what each program uses."""
        num_warps = int(re.search(r"num_warps=(\d+)", self.config)[1])
        return occupancy(self.arch, num_warps, self.registers, self.shared_bytes)

    def faults(self) -> list[str]:
        """The reasons why this configuration must not ship; empty if it may."""
        limit, faults = MULTIPROCESSORS[self.arch].shared_bytes_per_program, []
        if self.stack_bytes:
            faults.append(f"{self.stack_bytes} bytes of stack")
        if self.shared_bytes > limit:
            faults.append(f"{self.shared_bytes} of {limit} bytes of shared memory")
        # Float32 is never rounded to TF32, so only half precision can run on tensor cores.
        half = self.kernel.startswith("attention.") and self.config.startswith("half")
        if self.arch == "sm_90" and half and self.tensor_core != "wgmma":
            faults.append(f"matrix products by {self.tensor_core}, not wgmma")
        return faults


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Compute the share of a multiprocessor's warps that can be resident.

    Args:
        arch: such as "sm_90".
        num_warps: the warps of a program.
        registers: the registers of a thread.
        shared_bytes: the bytes of shared memory that a program asks for.
    """
    limits = MULTIPROCESSORS[arch]
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    programs = min(
        limits.programs,
        limits.warps // num_warps,
        REGISTERS // per_warp // num_warps,
        limits.shared_bytes // (shared_bytes + LEAST_SHARED),
    )
    return programs * num_warps / limits.warps


def target(arch: str) -> GPUTarget:
    """Triton's name for an architecture such as "sm_90"."""
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def source(launch: Launch, arch: str) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch on an architecture, specialised to its arguments, and with which options."""
    kernel, backend = launch.kernel, make_backend(target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options, *specialised = kernel._pack_args(backend, launch.arguments, *bind(**launch.arguments))
    return ASTSource(kernel, *specialised), options.__dict__


def config_of(launch: Launch) -> str:
    """Describe what the dispatch table decides about a launch, for example "half BD=64 BN=32 num_warps=4". For
    attention the description begins with the dtype by which the table distinguishes its rows."""
    arguments = launch.arguments
    tensors = [arguments[name] for name in ("qkv", "kv") if name in arguments]
    dtypes = ["float32" if x.dtype == torch.float32 else "half" for x in tensors]
    return " ".join(dtypes + [f"{name}={arguments[name]}" for name in CONSTANTS if name in arguments])


class Job(NamedTuple):
    """A kernel to compile for an architecture. It holds none of the tensors that the kernel is launched with."""

    source: ASTSource
    options: dict[str, Any]
    kernel: str
    config: str
    arch: str


def job(launch: Launch, arch: str) -> Job:
    """What to compile for a launch, specialised to its arguments."""
    return Job(*source(launch, arch), name_of(launch), config_of(launch), arch)


def compiled(launch: Launch, arch: str) -> Usage:
    """Compile a launch for an architecture, such as "sm_90", and return what its machine code uses."""
    return _compile(job(launch, arch))


def _compile(job: Job) -> Usage:
    result = triton.compile(job.source, target=target(job.arch), options=job.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        report = subprocess.check_output([CUOBJDUMP, "-res-usage", cubin.name], text=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    instructions = (name for name, pattern in TENSOR_CORES.items() if re.search(pattern, result.asm["ptx"]))
    tensor_core = next(instructions, "none")
    return Usage(job.kernel, job.config, job.arch, registers, stack, result.metadata.shared, tensor_core)


def usages(jobs: Iterable[Job], processes: int | None = None) -> list[Usage]:
    """What the kernel of each job uses. Those that compile alike are compiled once.

    Args:
        jobs: as `job` makes them.
        processes: how many compile at a time; None: one for each CPU.
    """
    jobs = list(jobs)
    keys = [
        (one.source.hash(), one.options["num_warps"], one.options["num_stages"], one.config, one.arch) for one in jobs
    ]
    distinct = dict(zip(keys, jobs, strict=True))
    context = multiprocessing.get_context("fork")  # the jobs are handed over as they lie in memory
    with ProcessPoolExecutor(processes, context, _receive, (list(distinct.values()),)) as pool:
        found = dict(zip(distinct, pool.map(_compiled, range(len(distinct))), strict=True))
    return [found[key] for key in keys]


def _receive(jobs: list[Job]) -> None:
    global _jobs
    _jobs = jobs


def _compiled(index: int) -> Usage:
    return _compile(_jobs[index])


def configurations(archs: Iterable[str], kernels: str = "") -> Configurations:
    """The launches of each kernel, configuration and architecture that the dispatch table can choose.

    Args:
        archs: such as "sm_90".
        kernels: only the kernels whose names begin so, such as "attention." or "pixels.prior_sums".
    """
    found: Configurations = {}
    for arch in archs:
        for launch in table_launches(arch):
            if name_of(launch).startswith(kernels):
                found.setdefault((name_of(launch), config_of(launch), arch), []).append(launch)
    return found


def measured(found: Configurations, processes: int | None = None) -> list[Usage]:
    """What each configuration uses: the largest numbers that any of its launches has, and all of their tensor cores."""
    jobs = [job(launch, arch) for (_, _, arch), launches in found.items() for launch in launches]
    uses = iter(usages(jobs, processes))
    result = []
    for key, launches in found.items():
        _, _, _, *numbers, tensor_cores = zip(*(next(uses) for _ in launches), strict=True)
        result.append(Usage(*key, *map(max, numbers), "/".join(sorted(set(tensor_cores)))))
    return result


def versions() -> str:
    """The compilers that the numbers depend on."""
    return f"Triton {triton.__version__}, ptxas {knobs.nvidia.ptxas.version} and {knobs.nvidia.ptxas_blackwell.version}"


def read_table(path: Path) -> list[Usage]:
    """What `write_table` wrote into a file."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    cells = [re.split(r"  +", line) for line in lines[1:]]  # behind the names of the columns
    return [
        Usage(kernel, config, arch, *map(int, numbers), tensor_core)
        for kernel, config, *numbers, tensor_core, archs in cells
        for arch in archs.split()
    ]


def write_table(path: Path, uses: list[Usage]) -> None:
    """Write a line for each kernel, configuration and set of architectures on which its numbers are the same."""
    archs: dict[tuple, list[str]] = {}
    for kernel, config, arch, *numbers in uses:
        archs.setdefault((kernel, config, *map(str, numbers)), []).append(arch)
    rows = [(*key, " ".join(sorted(found, key=_naturally))) for key, found in archs.items()]
    rows.sort(key=lambda row: [_naturally(cell) for cell in (row[0], row[1], row[-1])])
    lines = as_text([COLUMNS, *rows], left=(0, 1, 5, 6)).splitlines()
    path.write_text("\n".join([HEADING, f"# {versions()}", *(line.rstrip() for line in lines), ""]))


def _naturally(text: str) -> list[str | int]:
    """A key that sorts the numbers within a text by their values."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
