"""Compile the Triton kernels ahead of time, for GPUs that need not be there, into what CMake links into a library.

python cmake/compile_kernels.py --out build/generated --archs 80,90 --dtypes bfloat16,float32 --head-dims 64 \
    --heads 1,3 --patches 3x224x224/16x16 --max-seqlen 577

Writes the machine code cubins/*.cubin, the assembly cubins.s, which includes its bytes, and table.inc, whose rows of
C++ say which of them runs for which arguments. Those are the choices of the dispatch table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are first imported
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # half of the bytes, and the names of source files
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from smi_fast.kernels.attention import MAX_HEAD_DIM, MAX_SEQLEN, launch_attention, launch_attention_backward
from smi_fast.kernels.backend import Launch, recording
from smi_fast.kernels.class_attention import launch_class_attention, launch_class_attention_backward
from smi_fast.kernels.dispatch import choice_of, nearest, override, padded_head_dim, rows_of
from smi_fast.kernels.patches import launch_gather_patches, launch_gather_patches_backward
from smi_fast.kernels.selection import launch_count_mass, launch_select, launch_select_backward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import mangle_type

DTYPES = ("float32", "bfloat16", "float16")  # in the order of smi_fast_dtype
# The pointers that the library requires to be aligned to 16 bytes, so that accesses can be that wide. All others are
# aligned as their elements are.
ALIGNED = {
    "out", "qkv", "q", "kv", "grad", "grad_q", "grad_kv", "grad_out", "packed", "values", "packed_grad", "images",
    "patches", "patch_grad",
}  # fmt: skip
# The strides that are the same in every call of the library. Nothing is assumed of the other integers.
FIXED = {
    "stride_patch", "stride_y", "stride_x", "stride_channel", "positions_stride_image", "positions_stride_row",
    "slots_stride_image", "stride_image",
}  # fmt: skip
C_TYPES = {"i32": "i", "fp32": "f", "fp64": "d"}  # any pointer: p
BITS = {"p": 64, "i": 32, "f": 32, "d": 64}


class Options(NamedTuple):
    """What the library is built for: see CMakeLists.txt."""

    dtypes: list[str]
    head_dims: list[int]
    heads: list[int]
    patches: list[tuple[int, ...]]  # channels, height, width, patch height, patch width
    max_seqlen: int


class Variant(NamedTuple):
    """A kernel for one purpose: an operation, the key by which the library finds it, and sizes up to `up_to`. One
    program covers `block` elements."""

    operation: str
    key: tuple[int, ...]
    up_to: int
    block: tuple[int, int]
    launch: Launch


class Cubin(NamedTuple):
    """A compiled kernel. `parameters` has a letter for each parameter."""

    function: str
    parameters: str
    threads: int
    shared_bytes: int
    code: bytes


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def integers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def rows_up_to(arch: int, operation: str, most: int, **kind) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The rows from which the dispatch table chooses for sizes up to `most`: the least size, `up_to`, and the row."""
    least = 0
    for row in rows_of(operation, nearest(*divmod(arch, 10)), **kind):
        yield least, row["up_to"], row
        least = row["up_to"] + 1
        if least > most:
            return
    raise ValueError(f"the dispatch table has no row for {operation} on sm_{arch}, size {most}, {kind}")


def launched(operation: str, row: dict[str, Any], function: Callable, *args) -> list[Launch]:
    """The launches of `function(*args)` where the dispatch table chooses this row for an operation."""
    with override({operation: choice_of(row)}), recording() as launches:
        function(*args)
    return launches


def attention_variants(arch: int, options: Options) -> Iterator[Variant]:
    cu_seqlens = integers(9)
    for dtype, name in enumerate(DTYPES):
        if name not in options.dtypes:
            continue
        for head_dim in options.head_dims:
            key = dtype, head_dim
            kind = dict(dtype="float32" if name == "float32" else "half", head_dim=padded_head_dim(head_dim))
            qkv = empty(8, 3, 3, head_dim, dtype=getattr(torch, name))
            out = empty(8, 3, head_dim, dtype=qkv.dtype)
            for _, up_to, choice in rows_up_to(arch, "attention_forward", options.max_seqlen, **kind):
                for flags in range(4):
                    inputs = qkv, cu_seqlens, up_to, 0.125, bool(flags & 1), bool(flags & 2)
                    (launch,) = launched("attention_forward", choice, launch_attention, *inputs)
                    block = choice["BM"] if choice["form"] == "blocks" else 0
                    yield Variant("attention_forward", (*key, flags), up_to, (block, 0), launch)
            for _, up_to, choice in rows_up_to(arch, "attention_backward", options.max_seqlen, **kind):
                inputs = out, qkv, out, empty(2, 3, 8), cu_seqlens, up_to, 0.125
                launches = launched("attention_backward", choice, launch_attention_backward, *inputs)
                blocks = (choice["dq"]["BM"], choice["dkv"]["BN"]) if choice["form"] == "blocks" else (0,)
                for operation, block, launch in zip(
                    ("attention_backward", "attention_backward_dkv"), blocks, launches, strict=False
                ):
                    yield Variant(operation, key, up_to, (block, 0), launch)
            q, kv = out, empty(8, 2, 3, head_dim, dtype=qkv.dtype)
            for least, up_to, choice in rows_up_to(arch, "class_attention_forward", options.max_seqlen, **kind):
                # The kernel differs between sequences of one block and longer ones.
                for size in {min(choice["BN"], up_to), up_to} - set(range(least)):
                    inputs = q, kv, cu_seqlens, size, 0.125
                    (launch,) = launched("class_attention_forward", choice, launch_class_attention, *inputs)
                    yield Variant("class_attention_forward", key, size, (0, 0), launch)
            for _, up_to, choice in rows_up_to(arch, "class_attention_backward", options.max_seqlen, **kind):
                inputs = q, q, kv, empty(8, 3, 2), cu_seqlens, up_to, 0.125
                (launch,) = launched("class_attention_backward", choice, launch_class_attention_backward, *inputs)
                yield Variant("class_attention_backward", key, up_to, (0, 0), launch)


def selection_variants(arch: int, options: Options) -> Iterator[Variant]:
    # Rows of 16-byte units are copied as integers, whatever their dtype.
    values, positions, starts = empty(8, 64, dtype=torch.int32), integers(8), integers(9)
    for _, up_to, choice in rows_up_to(arch, "select_tokens", options.max_seqlen):
        for heads in options.heads:
            for flags, kept_starts in enumerate((None, starts)):
                inputs = empty(heads, 8), values, positions, starts, kept_starts, None, 1, 1, 1 + up_to, 8
                (launch,) = launched("select_tokens", choice, launch_select, *inputs)
                yield Variant("select", (heads, flags), up_to, (choice["BR"], 0), launch)
            inputs = empty(heads, 8), starts, 0.9, 1, 1 + up_to
            (launch,) = launched("select_tokens", choice, launch_count_mass, *inputs)
            yield Variant("count_mass", (heads,), up_to, (0, 0), launch)
    for _, up_to, choice in rows_up_to(arch, "select_tokens_backward", 2**31 - 1):
        (launch,) = launched("select_tokens_backward", choice, launch_select_backward, values, positions)
        yield Variant("select_backward", (), up_to, (choice["BR"], choice["BC"]), launch)  # BC counts units of 16 bytes


def patch_variants(arch: int, options: Options) -> Iterator[Variant]:
    for dtype, name in enumerate(DTYPES):
        for channels, height, width, ph, pw in options.patches if name in options.dtypes else ():
            key, elements = (channels, height, width, ph, pw), channels * ph * pw
            for flags, view in enumerate((None, integers(3))):
                case = dtype | flags << 2, *key
                *_, (_, _, choice) = rows_up_to(arch, "gather_patches", elements)
                inputs = empty(8, channels, height, width), integers(8), integers(9), view, ph, pw, getattr(torch, name)
                (launch,) = launched("gather_patches", choice, launch_gather_patches, *inputs)
                yield Variant("gather_patches", case, 2**31 - 1, (choice["BT"], 0), launch)
                *_, (_, _, choice) = rows_up_to(arch, "gather_patches_backward", elements)
                grad, inverse = empty(8, elements, dtype=getattr(torch, name)), integers(8, height // ph, width // pw)
                inputs = grad, inverse, view, channels, ph, pw, torch.float32
                (launch,) = launched("gather_patches_backward", choice, launch_gather_patches_backward, *inputs)
                yield Variant("gather_patches_backward", case, 2**31 - 1, (choice["BT"], 0), launch)


def source(launch: Launch) -> tuple[ASTSource, str]:
    """A kernel as any call of the library may launch it, and a letter for each of its parameters.

    Triton specialises a kernel to arguments that are 1 or multiples of 16. Nothing is assumed here but what the library
    checks."""
    signature, constants, attributes, letters = {}, {}, {}, ""
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (name in FIXED and isinstance(value, int)):
            signature[name], constants[name] = "constexpr", value
            continue
        if value is None:  # still a parameter, so that all variants of a kernel have the same ones
            signature[name] = "*i32"
        elif isinstance(value, torch.Tensor):
            signature[name] = mangle_type(value)
        else:
            signature[name] = parameter.annotation_type or ("i32" if isinstance(value, int) else "fp32")
        if name in ALIGNED:
            attributes[index,] = [["tt.divisibility", 16]]
        letters += C_TYPES.get(signature[name], "p")
    return ASTSource(launch.kernel, signature, constants, attributes), letters


def options_of(launch: Launch) -> dict[str, Any]:
    """The arguments of a launch that are no parameters of the kernel, such as num_warps."""
    return {name: value for name, value in launch.arguments.items() if name not in launch.kernel.arg_names}


def compiled(launch: Launch, arch: int) -> Cubin:
    """Compile a kernel for an architecture.

    Raises:
        RuntimeError: the library would not know how to launch what Triton made.
    """
    kernel, letters = source(launch)
    target = GPUTarget("cuda", arch, 32)
    options = make_backend(target).parse_options(options_of(launch)).__dict__
    result = triton.compile(kernel, target=target, options=options)
    metadata = result.metadata
    entry = re.search(r"\.entry \w+\((.*?)\)", result.asm["ptx"], re.DOTALL)[1]
    bits = [int(width) for width in re.findall(r"\.param \.[a-z](\d+)", entry)]
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    if bits != [BITS[letter] for letter in letters + "pp"] or scratch:
        raise RuntimeError(
            f"{metadata.name} has parameters of {bits} bits, not {letters} and two unused scratch pointers"
        )
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
        raise RuntimeError(f"{metadata.name} needs a launch that the library does not know")
    return Cubin(metadata.name, letters, 32 * metadata.num_warps, metadata.shared, result.asm["cubin"])


def _receive(jobs: list[tuple[Launch, int]]) -> None:
    global _jobs
    _jobs = jobs


def _compiled(index: int) -> Cubin:
    return compiled(*_jobs[index])


def all_compiled(jobs: list[tuple[Launch, int]], processes: int | None) -> tuple[list[int], list[Cubin]]:
    """The distinct kernels of the jobs, compiled, and before them for each job the number of its kernel."""
    keys = [(source(launch)[0].hash(), str(options_of(launch)), arch) for launch, arch in jobs]
    distinct = dict(zip(keys, jobs, strict=True))
    context = multiprocessing.get_context("fork")  # the launches are handed over as they lie in memory
    with ProcessPoolExecutor(processes, context, _receive, (list(distinct.values()),)) as pool:
        cubins = list(pool.map(_compiled, range(len(distinct))))
    numbers = {key: number for number, key in enumerate(distinct)}
    return [numbers[key] for key in keys], cubins


def write(out: Path, archs: list[int], variants: list[Variant], numbers: list[int], cubins: list[Cubin]) -> None:
    """Write all files. Row i of the table is `variants[i]` for `archs[i]`, which runs the cubin `numbers[i]`."""
    (out / "cubins").mkdir(parents=True, exist_ok=True)
    assembly = ['.section .rodata, "a", @progbits']
    for number, cubin in enumerate(cubins):
        path = out / "cubins" / f"{number}.cubin"
        path.write_bytes(cubin.code)
        label = f"smi_fast_cubin_{number}"
        assembly += [".balign 64", f".globl {label}", f".hidden {label}", f"{label}:", f'.incbin "{path.as_posix()}"']
    assembly += ['.section .note.GNU-stack, "", @progbits', ""]
    (out / "cubins.s").write_text("\n".join(assembly))

    names = [cubin.function[1:].removesuffix("_kernel") for cubin in cubins]
    lines = ["// Written by cmake/compile_kernels.py."]
    parameters = sorted({*zip(names, (cubin.parameters for cubin in cubins), strict=True)})
    lines += [f'static_assert(parameters(Kernel::{name}) == "{letters}");' for name, letters in parameters]
    lines += ['extern "C" {', *(f"extern const char smi_fast_cubin_{n}[];" for n in range(len(cubins))), "}"]
    lines.append("const Cubin CUBINS[] = {")
    for number, (name, cubin) in enumerate(zip(names, cubins, strict=True)):
        code = f"smi_fast_cubin_{number}"
        lines.append(f'    {{Kernel::{name}, "{cubin.function}", {cubin.threads}, {cubin.shared_bytes}, {code}}},')
    lines += ["};", "const Row ROWS[] = {"]
    for arch, variant, number in zip(archs, variants, numbers, strict=True):
        key, block = (", ".join(map(str, numbers)) for numbers in (variant.key, variant.block))
        lines.append(
            f"    {{{arch}, Operation::{variant.operation}, {{{key}}}, {variant.up_to}, {{{block}}}, {number}}},"
        )
    lines += ["};", ""]
    (out / "table.inc").write_text("\n".join(lines))


def patch_geometry(text: str) -> tuple[int, ...]:
    """Parse channels, height and width of images and of patches: 3x224x224/16x16 is (3, 224, 224, 16, 16)."""
    if not re.fullmatch(r"\d+x\d+x\d+/\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not such as 3x224x224/16x16")
    channels, height, width, ph, pw = map(int, re.split("[x/]", text))
    if not (channels and ph and pw) or height % ph or width % pw:
        raise argparse.ArgumentTypeError(f"{text!r}: images do not divide into patches")
    return channels, height, width, ph, pw


def several(kind: Callable, least: int = -(2**31), most: int = 2**31 - 1) -> Callable[[str], list]:
    """A parser of lists separated by commas, of what `kind` parses; integers are from `least` to `most`."""

    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",") if part]
        for value in values:
            if isinstance(value, int) and not least <= value <= most:
                raise argparse.ArgumentTypeError(f"{value} is outside {least}..{most}")
        return list(dict.fromkeys(values))

    return parse


def dtype_name(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}")
    return text


def head_dim(text: str) -> int:
    if not text.isdigit() or int(text) % 8 or not 8 <= int(text) <= MAX_HEAD_DIM:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 up to {MAX_HEAD_DIM}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archs", type=several(int, 80), required=True, help="compute capabilities, such as 80,90")
    parser.add_argument("--dtypes", type=several(dtype_name), required=True)
    parser.add_argument("--head-dims", type=several(head_dim), required=True)
    parser.add_argument("--heads", type=several(int, 1), required=True, help="heads that a selection averages")
    parser.add_argument("--patches", type=several(patch_geometry), required=True, help="such as 3x224x224/16x16")
    parser.add_argument("--max-seqlen", type=int, choices=range(2, MAX_SEQLEN + 1), required=True, metavar="N")
    parser.add_argument("--processes", type=int, help="how many compile at a time; one for each CPU")
    arguments = parser.parse_args()

    options = Options(*(getattr(arguments, name) for name in Options._fields))
    archs, variants = [], []
    for arch in arguments.archs:
        for list_variants in (attention_variants, selection_variants, patch_variants):
            found = list(list_variants(arch, options))
            variants += found
            archs += [arch] * len(found)
    jobs = [(variant.launch, arch) for variant, arch in zip(variants, archs, strict=True)]
    numbers, cubins = all_compiled(jobs, arguments.processes)
    write(arguments.out, archs, variants, numbers, cubins)
    size = sum(len(cubin.code) for cubin in cubins)
    print(f"{len(cubins)} kernels for {len(variants)} cases, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
