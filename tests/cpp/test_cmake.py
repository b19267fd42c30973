"""The library of kernels compiled ahead of time for C++: what is in it, what it launches, and how it refuses.

Tests marked cuda compare its numbers with Python's. They build the library, unless SMI_FAST_KERNELS_LIBRARY names one.
"""

import ctypes
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from smi_fast.kernels import dispatch
from smi_fast.kernels.attention import launch_attention, launch_attention_backward
from smi_fast.kernels.backend import recording
from smi_fast.kernels.class_attention import launch_class_attention, launch_class_attention_backward
from smi_fast.kernels.patches import launch_gather_patches, launch_gather_patches_backward
from smi_fast.kernels.selection import launch_count_mass, launch_select, launch_select_backward

from smi_fast import kernels

ROOT = Path(__file__).parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
HEADER = (ROOT / "cpp" / "smi_fast_kernels.h").read_text()
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
OK, INVALID, NULL, MISALIGNED, NOT_BUILT, UNSUPPORTED_DEVICE, NO_DEVICE = range(7)
FLOAT32, BFLOAT16, FLOAT16 = range(3)
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
SMALL = {"ARCHS": "80;90", "DTYPES": "bfloat16", "HEADS": "3", "PATCHES": "3x32x32/8x8", "MAX_SEQLEN": "16"}
# What CMake says where the machine, not this repository, is at fault.
MISSING = "|".join(
    (r"CMake [\d.]+ or higher", r"unable to find a build program.*", r"Could (?:NOT|not) find (?:CUDAToolkit|nvcc).*",
     "CUDA::cudart_static")
)  # fmt: skip
LONGEST = 577
FULL = f"--dtypes bfloat16,float32 --head-dims 64 --heads 3 --patches 3x224x224/16x16 --max-seqlen {LONGEST}"

# Instead of machine code, a cubin says what it was to be compiled for.
WITHOUT_COMPILING = """
import json, sys
sys.path.insert(0, "cmake")
import compile_kernels

def described(launch, arch):
    kernel, letters = compile_kernels.source(launch)
    names, options = launch.kernel.arg_names, compile_kernels.options_of(launch)
    constants = {names[index]: value for (index,), value in kernel.constants.items()}
    code = json.dumps({
        "arch": arch,
        "kernel": launch.kernel.__name__,
        "constants": {**options, **constants},
        "parameters": [name for name in names if name not in constants],
        "letters": letters,
        "aligned": [names[index] for index, in kernel.attrs],
    })
    threads = 32 * options["num_warps"]
    return compile_kernels.Cubin(launch.kernel.__name__, letters, threads, 60000, code.encode() + bytes(1))

compile_kernels.compiled = described
if __name__ == "__main__":
    compile_kernels.main()
"""

# A CUDA runtime that hands what is launched to a function in place of a GPU.
FAKE_RUNTIME = """
#include <cuda_runtime_api.h>
extern "C" {
int fake_capability = 90, fake_shared_bytes = 0;
void (*fake_launch)(const void *code, unsigned x, unsigned y, unsigned threads, size_t shared, void **arguments);
cudaError_t cudaGetDevice(int *device) { *device = 0; return fake_capability ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? fake_capability / 10 : fake_capability % 10;
    return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, cudaJitOption *, void **, unsigned,
                                cudaLibraryOption *, void **, unsigned) {
    *library = (cudaLibrary_t)code;
    return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *) {
    *kernel = (cudaKernel_t)library;
    return cudaSuccess;
}
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int value, int) {
    fake_shared_bytes = value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 threads, void **arguments, size_t shared,
                             cudaStream_t) {
    fake_launch(kernel, grid.x, grid.y, threads.x, shared, arguments);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *, int, size_t, cudaStream_t) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "an error of CUDA"; }
}
"""


def declarations() -> dict[str, list[tuple[str, type]]]:
    """Names and types of the arguments of each function of the header."""
    types = {"float": ctypes.c_float, "double": ctypes.c_double, "int": ctypes.c_int, "smi_fast_dtype": ctypes.c_int}
    functions = {}
    for name, arguments in re.findall(r"SMI_FAST_API [\w ]+?\*?(smi_fast_\w+)\(([^)]*)\)", HEADER):
        words = [argument.replace("*", " * ").split() for argument in arguments.split(",") if argument != "void"]
        pointer = [("*" in argument) or argument[0] == "cudaStream_t" for argument in words]
        functions[name] = [
            (argument[-1], ctypes.c_void_p if is_pointer else types[argument[0]])
            for argument, is_pointer in zip(words, pointer, strict=True)
        ]
    return functions


class Library:
    """The functions of the header, called by the names of their arguments."""

    def __init__(self, path: Path):
        self.path, self.functions, self.loaded = path, declarations(), ctypes.CDLL(str(path))
        self.loaded.smi_fast_status_string.restype = ctypes.c_char_p

    def status(self, name: str, **arguments) -> int:
        """Call a function; pointers that are not given are those of `addresses`."""
        values = []
        for argument, kind in self.functions[name]:
            default = None if argument == "stream" else self.addresses(name).get(argument)
            value = arguments.pop(argument, default)
            values.append(kind(value.data_ptr() if isinstance(value, torch.Tensor) else value))
        assert not arguments
        return getattr(self.loaded, name)(*values)

    def addresses(self, name: str) -> dict[str, int]:
        """An address for each pointer, different from each other and aligned."""
        pointers = [argument for argument, kind in self.functions[name] if kind is ctypes.c_void_p]
        return {argument: 4096 * (index + 1) for index, argument in enumerate(pointers) if argument != "stream"}


def run(*command, **options) -> str:
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(build: Path, **options) -> None:
    """Let CMake configure a build; skip where the machine lacks what it needs."""
    for tools in (("cmake",), ("c++", "g++", "clang++")):
        if not any(map(shutil.which, tools)):
            pytest.skip(f"no {tools[0]} on this machine")
    definitions = [f"-DSMI_FAST_{name}={value}" for name, value in options.items()]
    definitions.append("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    command = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython3_EXECUTABLE={sys.executable}", *definitions]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode and (missing := re.search(MISSING, done.stderr)):
        pytest.skip(f"this machine cannot build the library: {missing[0]}")
    assert done.returncode == 0, done.stdout + done.stderr


def compile_command(build: Path) -> tuple[str, str]:
    """The compiler of a build, and the folder of CUDA's headers."""
    commands = json.loads((build / "compile_commands.json").read_text())
    compiler, *flags = next(shlex.split(c["command"]) for c in commands if c["file"].endswith("kernels.cpp"))
    return compiler, flags[flags.index("-isystem") + 1]


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """The folder of a small build."""
    folder = tmp_path_factory.mktemp("aot")
    configure(folder, **SMALL)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture
def small(build) -> Library:
    return Library(build / "libsmi_fast_kernels.so")


@pytest.fixture(scope="module")
def fake(build, tmp_path_factory) -> Library:
    """The library with CUDA's runtime replaced. `launches` lists what would have run, and `aligned` the pointers that
    the kernels would have taken to be multiples of 16."""
    folder, (compiler, include) = tmp_path_factory.mktemp("fake"), compile_command(build)
    run(sys.executable, "-c", WITHOUT_COMPILING, "--out", folder, "--archs", "80,90", *FULL.split(), cwd=ROOT)
    (folder / "runtime.cpp").write_text(FAKE_RUNTIME)
    sources = ROOT / "cpp" / "kernels.cpp", folder / "cubins.s", folder / "runtime.cpp"
    # Symbolic: calls of the runtime bind to the fake one, whatever else this process has loaded.
    flags = "-std=c++17", "-shared", "-fPIC", "-Wl,-Bsymbolic", f"-I{include}", f"-I{folder}"
    run(compiler, *flags, *sources, "-o", folder / "libfake.so")
    library = Library(folder / "libfake.so")
    library.launches, library.archs, library.aligned = [], [], set()
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "f": ctypes.c_float, "d": ctypes.c_double}

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_uint] * 3, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
    def record(code, x, y, threads, shared, arguments):
        cubin = json.loads(ctypes.string_at(code))
        kinds = cubin["letters"] + "pp"
        values = [types[kind].from_address(arguments[index]).value for index, kind in enumerate(kinds)]
        named = dict(zip([*cubin["parameters"], "scratch", "more_scratch"], values, strict=True))
        library.launches.append((cubin["kernel"], (x, y), threads, shared, {**cubin["constants"], **named}))
        library.archs.append(cubin["arch"])
        library.aligned.update(named[name] for name in cubin["aligned"])

    library.record = record  # or it would be freed
    ctypes.c_void_p.in_dll(library.loaded, "fake_launch").value = ctypes.cast(record, ctypes.c_void_p).value
    library.capability = ctypes.c_int.in_dll(library.loaded, "fake_capability")
    return library


@pytest.fixture
def python() -> Iterator[list]:
    """What Python launches, recorded instead of run."""
    with recording() as launches:
        yield launches


def as_the_library_lists(launches: list) -> list:
    """Recorded launches as the fake library lists its own."""
    return [
        (
            launch.kernel.fn.__name__,
            (*launch.grid, 1)[:2],
            32 * launch.arguments["num_warps"],
            60000,
            {name: as_passed(value, launch.kernel, name) for name, value in launch.arguments.items()}
            | {"scratch": None, "more_scratch": None},
        )
        for launch in launches
    ]


def as_passed(value, kernel, name: str):
    """An argument as the kernel gets it: an address, or a number of the parameter's type."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr() or None
    is_double = "float64" in str(kernel.fn.__annotations__.get(name))
    return ctypes.c_float(value).value if isinstance(value, float) and not is_double else value


def embedded_cubins(library: bytes) -> list[bytes]:
    """ELF files for an NVIDIA GPU (machine 190) within another file, cut at the end of their last table."""
    cubins = []
    for match in re.finditer(rb"\x7fELF\x02", library):
        elf = library[match.start() :]
        if struct.unpack_from("<H", elf, 18) == (190,):
            programs, sections = struct.unpack_from("<QQ", elf, 32)
            program_size, programs_count, section_size, sections_count = struct.unpack_from("<4H", elf, 54)
            cubins.append(
                elf[: max(programs + program_size * programs_count, sections + section_size * sections_count)]
            )
    return cubins


def test_the_library_exports_the_functions_of_its_header(build):
    if not shutil.which("nm"):
        pytest.skip("no nm on this machine")
    symbols = run("nm", "-D", "--defined-only", build / "libsmi_fast_kernels.so").splitlines()
    assert sorted(line.split()[2] for line in symbols) == sorted(declarations())
    assert len(declarations()) == HEADER.count("SMI_FAST_API ") - HEADER.count("#define SMI_FAST_API ")


def test_the_header_is_plain_c(build):
    compiler, include = compile_command(build)
    options = "-x", "c", "-std=c99", "-pedantic", "-Wall", "-Werror", "-fsyntax-only"
    run(compiler, *options, "-isystem", include, ROOT / "cpp" / "smi_fast_kernels.h")


def test_the_library_holds_each_kernel_for_each_architecture(build, tmp_path):
    library = (build / "libsmi_fast_kernels.so").read_bytes()
    held = {"sm_80": set(), "sm_90a": set()}
    cubins = embedded_cubins(library)
    for number, cubin in enumerate(cubins):
        path = tmp_path / f"{number}.cubin"
        path.write_bytes(cubin)
        (arch,) = re.findall(r"\.(sm_\w+)\.cubin", run(CUOBJDUMP, "-lelf", path))
        held[arch] |= {*re.findall(r"Function (\w+):", run(CUOBJDUMP, "-res-usage", path))}
    assert len(cubins) == len(list((build / "generated" / "cubins").iterdir()))
    listed = {*re.findall(r'\{Kernel::\w+, "(\w+)"', (build / "generated" / "table.inc").read_text())}
    assert listed
    assert held == {"sm_80": listed, "sm_90a": listed}
    assert str(ROOT).encode() not in library


def test_accesses_are_as_wide_as_in_python():
    """There are as many loads and stores of 16 bytes as in the kernel that Triton specialises to multiples of 16, and
    the integers are no constants."""
    program = """
import json, re, sys
sys.path[:0] = ["cmake", "bench"]
import compile_kernels as ahead
import resources
import triton

if __name__ == "__main__":
    options, chosen = ahead.Options(["bfloat16"], [64], [3], [(3, 224, 224, 16, 16)], 16), {}
    for variants in ahead.attention_variants, ahead.selection_variants, ahead.patch_variants:
        for variant in variants(90, options):
            chosen.setdefault(variant.operation, variant.launch)
    for operation, launch in chosen.items():
        (own, letters), (specialised, settings) = ahead.source(launch), resources.source(launch, "sm_90")
        wide = []
        for source in own, specialised:
            ptx = triton.compile(source, target=resources.target("sm_90"), options=settings).asm["ptx"]
            wide.append([len(re.findall(rf"{access}\\.global\\S*\\.v4", ptx)) for access in ("ld", "st")])
        integers = [name for name, kind in own.signature.items() if kind == "i32"]
        attributes = [list(own.signature)[index] for index, in own.attrs]
        print(json.dumps([operation, *wide, sorted(set(integers) & {*attributes}), letters.count("i") - len(integers)]))
"""
    for line in run(sys.executable, "-c", program, cwd=ROOT).splitlines():
        operation, own, specialised, assumed, missing = json.loads(line)
        assert own == specialised, operation
        assert own[1] or operation in ("class_attention_forward", "count_mass"), operation  # these write few numbers
        assert assumed == [], operation
        assert missing == 0, operation


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_program_says_that_there_is_no_gpu_and_does_not_crash(build):
    for program, expected in (("keep_patches", "no NVIDIA GPU"), ("cold_start", "")):
        done = subprocess.run([build / "examples" / "cpp" / program], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("smi_fast: ")
        assert expected in done.stderr


ATTENTION = dict(dtype=BFLOAT16, batch=2, tokens=20, max_seqlen=16, heads=3, head_dim=64, scale=0.125)
SELECT = dict(
    dtype=BFLOAT16, k=3, batch=2, tokens=20, max_seqlen=16, heads=3, channels=192, num_prefix_tokens=1
)  # fmt: skip
MASS = dict(mass=0.9, batch=2, tokens=20, max_seqlen=16, heads=3, num_prefix_tokens=1)
PATCHES = dict(
    dtype=BFLOAT16, views=1, batch=2, channels=3, height=32, width=32, patch_height=8, patch_width=8
)  # fmt: skip
FULL_PATCHES = {**PATCHES, **dict(height=224, width=224, patch_height=16, patch_width=16)}


@pytest.mark.parametrize(
    ("name", "arguments", "changed", "expected"),
    [
        ("smi_fast_attention", ATTENTION, dict(head_dim=72), NOT_BUILT),
        ("smi_fast_attention", ATTENTION, dict(dtype=FLOAT16), NOT_BUILT),
        ("smi_fast_attention", ATTENTION, dict(dtype=7), NOT_BUILT),
        ("smi_fast_attention", ATTENTION, dict(max_seqlen=4097), NOT_BUILT),
        ("smi_fast_attention", ATTENTION, dict(batch=-1), INVALID),
        ("smi_fast_attention", ATTENTION, dict(tokens=33), INVALID),
        ("smi_fast_attention", ATTENTION, dict(tokens=0, qkv=0), OK),
        ("smi_fast_attention", ATTENTION, {}, NO_DEVICE),
        ("smi_fast_select", SELECT, dict(k=16), INVALID),
        ("smi_fast_select", SELECT, dict(k=16, starts=4096), NO_DEVICE),
        ("smi_fast_select", SELECT, dict(heads=4), NOT_BUILT),
        ("smi_fast_select", SELECT, dict(channels=33), NOT_BUILT),
        ("smi_fast_select", SELECT, dict(kept_values=0), NULL),
        ("smi_fast_select", SELECT, dict(kept_values=0, values=0), NO_DEVICE),
        ("smi_fast_gather_patches", PATCHES, dict(patch_height=16), NOT_BUILT),
        ("smi_fast_gather_patches", PATCHES, dict(views=3), INVALID),
    ],
)
def test_a_wrong_argument_has_a_status_of_its_own_also_without_a_gpu(small, name, arguments, changed, expected):
    if expected == NO_DEVICE and torch.cuda.is_available():
        pytest.skip("there is a GPU, which must not be given made-up addresses")
    defaults = {"starts": 0} if name == "smi_fast_select" else {}
    assert small.status(name, **{**defaults, **arguments, **changed}) == expected


def test_a_mass_outside_of_its_range_is_refused(small):
    for mass in (0.0, -1.0, 1.5, math.nan):
        assert small.status("smi_fast_count_mass", **{**MASS, "mass": mass}) == INVALID


def test_each_status_has_a_sentence_of_its_own(small):
    values = re.findall(r"SMI_FAST_[A-Z_]+ = (\d),?\s", HEADER.split("enum {")[2])
    assert [int(value) for value in values] == list(range(NO_DEVICE + 1))
    sentences = {small.loaded.smi_fast_status_string(value) for value in range(NO_DEVICE + 2)}
    assert len(sentences) == NO_DEVICE + 2
    assert b"invalid argument" in small.loaded.smi_fast_status_string(1001)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(80, 80), (86, 80), (89, 80), (90, 90), (75, None), (100, None), (103, None), (120, None), (0, None)],
)
def test_a_device_runs_what_was_built_for_it(fake, capability, arch):
    fake.archs.clear()
    fake.capability.value = capability
    status = fake.status("smi_fast_attention", **ATTENTION)
    assert status == (OK if arch else UNSUPPORTED_DEVICE if capability else NO_DEVICE)
    assert fake.archs == ([arch] if arch else [])


@pytest.mark.parametrize(
    ("name", "arguments", "optional"),
    [
        ("smi_fast_attention", ATTENTION, {"class_attention", "statistics"}),
        ("smi_fast_attention_backward", ATTENTION, set()),
        ("smi_fast_class_attention", ATTENTION, set()),
        ("smi_fast_class_attention_backward", ATTENTION, set()),
        ("smi_fast_select", SELECT, {"values", "starts"}),
        ("smi_fast_count_mass", MASS, set()),
        ("smi_fast_select_backward", dict(dtype=BFLOAT16, tokens=20, channels=192), set()),
        ("smi_fast_gather_patches", FULL_PATCHES, {"view"}),
        ("smi_fast_gather_patches_backward", FULL_PATCHES, {"view"}),
    ],
)
def test_a_pointer_must_be_aligned_where_kernels_need_it(fake, name, arguments, optional):
    fake.capability.value = 90
    if "max_seqlen" in arguments:
        arguments = {**arguments, "max_seqlen": LONGEST}  # where the kernels take the most arguments
    fake.aligned.clear()
    assert fake.status(name, **arguments) == OK
    for pointer, address in fake.addresses(name).items():
        status = fake.status(name, **arguments, **{pointer: None})
        assert status == (OK if pointer in optional else NULL), pointer
        status = fake.status(name, **arguments, **{pointer: address + 8})
        assert status == (MISALIGNED if address in fake.aligned else OK), pointer


SCALE = ctypes.c_float(0.14).value  # of which the product with log2(e) shows how often it is rounded


def sizes(arch: int, *operations: str) -> list[int]:
    """The sizes up to LONGEST at which the dispatch table may choose anew, and the last before them."""
    ends = {row["up_to"] for operation in operations for row in dispatch.table()[f"sm_{arch}"][operation]}
    return sorted({1, LONGEST, *(size for end in ends for size in (end, end + 1) if size <= LONGEST)})


@pytest.fixture
def on(fake, monkeypatch):
    """Let both Python and the library believe that they run on an architecture."""

    def pretend(arch: int) -> None:
        fake.capability.value = arch
        monkeypatch.setattr(dispatch, "architecture", lambda device: f"sm_{arch}")

    return pretend


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", CODES)
def test_attention_is_launched_as_python_launches_it(fake, python, on, arch, dtype):
    on(arch)
    for size in sizes(arch, *(f"{kind}attention_{way}" for kind in ("", "class_") for way in ("forward", "backward"))):
        tokens, cu_seqlens = 4 * size, torch.empty(6, dtype=torch.int32)
        qkv, grad_out = torch.empty(tokens, 3, 3, 64, dtype=dtype), torch.empty(tokens, 3, 64, dtype=dtype)
        sequences = cu_seqlens, size, SCALE
        shape = dict(cu_seqlens=cu_seqlens, batch=5, tokens=tokens, max_seqlen=size, heads=3, head_dim=64, scale=SCALE)
        shape["dtype"] = CODES[dtype]
        fake.launches.clear()
        python.clear()
        for with_class, with_statistics in product((True, False), (True, False)):
            out, row, statistics = launch_attention(qkv, *sequences, with_class, with_statistics)
            written = dict(out=out, class_attention=row, statistics=statistics)
            assert fake.status("smi_fast_attention", **written, qkv=qkv, **shape) == OK

        statistics = torch.empty(2, 3, tokens)
        grad = launch_attention_backward(grad_out, qkv, out, statistics, *sequences)
        read = dict(grad_out=grad_out, qkv=qkv, out=out, statistics=statistics)
        written = dict(grad_qkv=grad, workspace=python[-1].arguments.get("delta", 4096))  # Python allocates its own
        assert fake.status("smi_fast_attention_backward", **written, **read, **shape) == OK

        q, kv = torch.empty(5, 3, 64, dtype=dtype), torch.empty(tokens, 2, 3, 64, dtype=dtype)
        out, attention, statistics = launch_class_attention(q, kv, *sequences)
        written = dict(out=out, attention=attention, statistics=statistics)
        assert fake.status("smi_fast_class_attention", **written, q=q, kv=kv, **shape) == OK

        grad_out = torch.empty_like(q)
        grad_q, grad_kv = launch_class_attention_backward(grad_out, q, kv, statistics, *sequences)
        read = dict(grad_out=grad_out, q=q, kv=kv, statistics=statistics)
        written = dict(grad_q=grad_q, grad_kv=grad_kv)
        assert fake.status("smi_fast_class_attention_backward", **written, **read, **shape) == OK
        assert fake.launches == as_the_library_lists(python), size


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_selection_is_launched_as_python_launches_it(fake, python, on, arch, dtype, prefix):
    on(arch)
    for candidates in sizes(arch, "select_tokens"):
        size = candidates + prefix
        if size > LONGEST:
            continue
        tokens, (cu_seqlens, starts) = 4 * size, torch.empty(2, 6, dtype=torch.int32)
        positions, attention = torch.empty(tokens, dtype=torch.int32), torch.empty(3, tokens)
        values = torch.empty(tokens, 192 * dtype.itemsize // 4, dtype=torch.int32)  # copied as integers of any dtype
        shape = dict(batch=5, tokens=tokens, max_seqlen=size, heads=3, num_prefix_tokens=prefix)
        rows = dict(dtype=CODES[dtype], channels=192)
        fake.launches.clear()
        python.clear()
        counts, limits = launch_count_mass(attention, cu_seqlens, 0.7, prefix, size)
        read = dict(attention=attention, cu_seqlens=cu_seqlens)
        assert fake.status("smi_fast_count_mass", counts=counts, limits=limits, mass=0.7, **read, **shape) == OK

        for kept_starts, k in ((None, 1), (starts, 0)):
            given = attention, values, positions, cu_seqlens, kept_starts, None, k, prefix, size, 5 * (prefix + 1)
            outputs = launch_select(*given)
            names = "kept_values", "kept_positions", "kept_cu_seqlens", "slots"
            written = dict(zip(names, outputs, strict=True))
            read |= dict(values=values, positions=positions, starts=kept_starts, k=k)
            assert fake.status("smi_fast_select", **written, **read, **rows, **shape) == OK

        kept, *_, slots = outputs
        grad = launch_select_backward(kept, slots)
        given = dict(grad_values=grad, grad_kept_values=kept, slots=slots, tokens=tokens)
        assert fake.status("smi_fast_select_backward", **given, **rows) == OK
        assert fake.launches == as_the_library_lists(python), size


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("views", [None, (), (5,)])
def test_patches_are_launched_as_python_launches_them(fake, python, on, arch, dtype, views):
    on(arch)
    fake.launches.clear()
    images, positions = torch.empty(5, 3, 224, 224), torch.empty(500, dtype=torch.int32)
    cu_seqlens = torch.empty(6, dtype=torch.int32)
    view = None if views is None else torch.empty(*views, 3, dtype=torch.int32)
    shape = dict(batch=5, channels=3, height=224, width=224, patch_height=16, patch_width=16, dtype=CODES[dtype])
    shape |= dict(view=view, views=5 if views else 1)
    patches, cells, inverse = launch_gather_patches(images, positions, cu_seqlens, view, 16, 16, dtype)
    written = dict(patches=patches, cells=cells, inverse=inverse)
    read = dict(images=images, positions=positions, cu_seqlens=cu_seqlens)
    assert fake.status("smi_fast_gather_patches", **written, **read, **shape) == OK

    grad = launch_gather_patches_backward(patches, inverse, view, 3, 16, 16, torch.float32)
    given = dict(grad_images=grad, grad_patches=patches, inverse=inverse)
    assert fake.status("smi_fast_gather_patches_backward", **given, **shape) == OK
    assert fake.launches == as_the_library_lists(python)


def test_large_shared_memory_is_asked_for(fake):
    fake.capability.value = 90
    asked = ctypes.c_int.in_dll(fake.loaded, "fake_shared_bytes")
    assert fake.status("smi_fast_load") == OK
    assert asked.value == 60000


# --- on a GPU


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    """The library for this machine's GPU."""
    if "SMI_FAST_KERNELS_LIBRARY" in os.environ:
        return Library(Path(os.environ["SMI_FAST_KERNELS_LIBRARY"]))
    folder, (major, minor) = tmp_path_factory.mktemp("aot"), torch.cuda.get_device_capability()
    configure(folder, ARCHS=f"{major}{minor}", HEADS="3", MAX_SEQLEN="197", PATCHES="3x224x224/16x16")
    run("cmake", "--build", folder)
    return Library(folder / "libsmi_fast_kernels.so")


def packed(lengths: list[int]) -> tuple[torch.Tensor, int]:
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int(), sum(lengths)


@pytest.mark.cuda
def test_the_examples_run_and_find_the_numbers_right(library):
    folder = library.path.parent / "examples" / "cpp"
    assert "the selection is the same" in run(folder / "keep_patches")
    timed = run(sys.executable, ROOT / "examples/cpp/cold_start.py", "--program", folder / "cold_start", "--repeat", 1)
    assert timed.count("first call") == 3


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("lengths", [[16, 1, 7], [47, 47], [95, 66], [137, 1, 95], [197, 0, 47]])
def test_attention_of_the_library_is_that_of_python(library, seed, dtype, lengths):
    cu_seqlens, tokens = packed(lengths)
    batch, longest, scale = len(lengths), max(lengths), 0.125
    sizes = dict(dtype=CODES[dtype], batch=batch, tokens=tokens, max_seqlen=longest, heads=3, head_dim=64, scale=scale)
    qkv = torch.randn(tokens, 3, 3, 64, device="cuda", dtype=dtype, requires_grad=True)
    expected, row = kernels.attention(qkv, cu_seqlens, longest, scale=scale, return_class_attention=True)
    grad_out = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, qkv, grad_out)

    out, class_attention, statistics = (
        torch.empty_like(expected),
        torch.empty_like(row),
        torch.empty(2, 3, tokens).cuda(),
    )
    inputs = dict(qkv=qkv, cu_seqlens=cu_seqlens, **sizes)
    stream = torch.cuda.current_stream().cuda_stream
    written = dict(out=out, class_attention=class_attention, statistics=statistics)
    assert library.status("smi_fast_attention", stream=stream, **written, **inputs) == OK
    grad, workspace = torch.empty_like(qkv), torch.empty(3, tokens).cuda()
    kept = dict(grad_out=grad_out, out=out, statistics=statistics)
    written = dict(grad_qkv=grad, workspace=workspace)
    assert library.status("smi_fast_attention_backward", stream=stream, **written, **kept, **inputs) == OK
    assert_alike((out, class_attention, grad), (expected, row, expected_grad))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("lengths", [[16, 1, 7], [47, 47], [197, 0, 47]])
def test_class_attention_of_the_library_is_that_of_python(library, seed, dtype, lengths):
    cu_seqlens, tokens = packed(lengths)
    batch, longest, scale = len(lengths), max(lengths), 0.125
    sizes = dict(dtype=CODES[dtype], batch=batch, tokens=tokens, max_seqlen=longest, heads=3, head_dim=64, scale=scale)
    q = torch.randn(batch, 3, 64, device="cuda", dtype=dtype, requires_grad=True)
    kv = torch.randn(tokens, 2, 3, 64, device="cuda", dtype=dtype, requires_grad=True)
    expected, row = kernels.class_attention(q, kv, cu_seqlens, longest, scale=scale, return_attention=True)
    grad_out = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, kv), grad_out)

    out, attention, statistics = torch.empty_like(expected), torch.empty_like(row), torch.empty(batch, 3, 2).cuda()
    inputs = dict(q=q, kv=kv, cu_seqlens=cu_seqlens, stream=torch.cuda.current_stream().cuda_stream, **sizes)
    written = dict(out=out, attention=attention, statistics=statistics)
    assert library.status("smi_fast_class_attention", **written, **inputs) == OK
    grads = torch.empty_like(q), torch.empty_like(kv)
    kept = dict(grad_q=grads[0], grad_kv=grads[1], grad_out=grad_out, statistics=statistics)
    assert library.status("smi_fast_class_attention_backward", **kept, **inputs) == OK
    assert_alike((out, attention, *grads), (expected, row, *expected_grads))


def assert_alike(found, expected) -> None:
    """But for the last bits: the kernels are the same, but for what Triton assumes of integers."""
    for one, other in zip(found, expected, strict=True):
        rtol, atol = (1e-6, 1e-6) if one.dtype == torch.float32 else (2**-7, 2**-9)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("how", [dict(k=20), dict(k=[46, 23, 40]), dict(mass=0.7)])
def test_selection_equals_pythons_bit_for_bit(library, seed, dtype, how):
    lengths = [197, 47, 120]
    cu_seqlens, tokens = packed(lengths)
    attention = torch.rand(3, tokens, device="cuda")
    attention[:, ::5] = attention[:, :1]  # ties
    values = torch.randn(tokens, 192, device="cuda", dtype=dtype, requires_grad=True)
    positions = torch.arange(tokens, device="cuda", dtype=torch.int32)
    expected = kernels.select_tokens(
        attention, values, positions, cu_seqlens=cu_seqlens, max_seqlen=197, num_prefix_tokens=1, **how
    )
    grad = torch.randn_like(expected.values)
    (expected_grad,) = torch.autograd.grad(expected.values, values, grad)

    sizes = dict(batch=3, tokens=tokens, max_seqlen=197, heads=3, num_prefix_tokens=1)
    sizes["stream"] = torch.cuda.current_stream().cuda_stream
    starts = None
    if "mass" in how:
        counts, limits = torch.empty(4, dtype=torch.int32).cuda(), torch.empty(3, 2, dtype=torch.int32).cuda()
        read = dict(attention=attention, cu_seqlens=cu_seqlens, mass=how["mass"])
        assert library.status("smi_fast_count_mass", counts=counts, limits=limits, **read, **sizes) == OK
        starts = counts.cumsum(0).int()
    elif isinstance(how["k"], list):
        starts = torch.tensor([0, *(1 + k for k in how["k"])], device="cuda").cumsum(0).int()
    packed_outputs = [torch.empty_like(x) for x in expected[:3]]
    slots = torch.empty_like(positions)
    names = "kept_values", "kept_positions", "kept_cu_seqlens"
    read = dict(attention=attention, values=values, positions=positions, cu_seqlens=cu_seqlens, starts=starts)
    more = dict(dtype=CODES[dtype], k=0 if starts is not None else how["k"], channels=192, slots=slots)
    written = dict(zip(names, packed_outputs, strict=True))
    assert library.status("smi_fast_select", **written, **read, **more, **sizes) == OK
    for one, other in zip(packed_outputs, expected[:3], strict=True):
        assert torch.equal(one, other)
    found = torch.empty_like(values)
    read = dict(grad_values=found, grad_kept_values=grad, slots=slots, stream=sizes["stream"])
    status = library.status("smi_fast_select_backward", dtype=CODES[dtype], tokens=tokens, channels=192, **read)
    assert status == OK
    assert torch.equal(found, expected_grad)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("view", [None, [-3, 40, 1], [[5, 0, 0], [-17, 30, 1]]])
def test_patches_equal_pythons_bit_for_bit(library, seed, dtype, view):
    cu_seqlens, _ = packed([46, 95])
    positions = torch.cat([torch.randperm(196)[:count] for count in (46, 95)]).int().cuda()
    images = torch.randn(2, 3, 224, 224, device="cuda", requires_grad=True)
    view = None if view is None else torch.tensor(view, dtype=torch.int32, device="cuda")
    expected, cells = kernels.gather_patches(images, positions, cu_seqlens, view, patch_size=16, dtype=dtype)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, images, grad)

    sizes = dict(batch=2, channels=3, height=224, width=224, patch_height=16, patch_width=16, dtype=CODES[dtype])
    sizes |= dict(view=view, views=2 if view is not None and view.dim() == 2 else 1)
    sizes["stream"] = torch.cuda.current_stream().cuda_stream
    patches, found_cells = torch.empty_like(expected), torch.empty_like(cells)
    inverse, found_grad = torch.empty(2, 14, 14, dtype=torch.int32).cuda(), torch.empty_like(images)
    read = dict(images=images, positions=positions, cu_seqlens=cu_seqlens)
    written = dict(patches=patches, cells=found_cells, inverse=inverse)
    assert library.status("smi_fast_gather_patches", **written, **read, **sizes) == OK
    read = dict(grad_images=found_grad, grad_patches=grad, inverse=inverse)
    assert library.status("smi_fast_gather_patches_backward", **read, **sizes) == OK
    for one, other in ((patches, expected), (found_cells, cells), (found_grad, expected_grad)):
        assert torch.equal(one, other)
