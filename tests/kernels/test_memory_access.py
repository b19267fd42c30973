"""Memory access of the selection and patch kernels: 16 bytes at a time, within bounds, and beyond 2^31 elements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import cu_seqlens_of
from smi_fast.kernels import patches, selection
from smi_fast.kernels.backend import INTERPRETED
from smi_fast.kernels.dispatch import choose

triton = pytest.importorskip("triton")

BENCH = str(Path(__file__).parents[2] / "bench")
WIDTHS = """
import json, re, subprocess, sys, tempfile
import torch, triton
from launches import recorded
from resources import CUOBJDUMP, source, target
from smi_fast.kernels.mlp import *
from smi_fast.kernels.norm import *
from smi_fast.kernels.patches import *
from smi_fast.kernels.selection import *

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def integers(*shape):
    return empty(*shape, dtype=torch.int32)

def elementwise(rows, channels):
    # The launches of the kernels around the products, for a number of rows.
    x, half, row = empty(rows, channels), empty(rows, channels, dtype=torch.bfloat16), empty(channels)
    norm = half, x, empty(rows, 2), row, row, torch.float32, torch.bfloat16
    return [
        *recorded(launch_residual_norm, x, half, row, row, row, 1e-6, torch.bfloat16),
        *recorded(launch_residual_norm_backward, x, *norm),
        *recorded(launch_bias_gelu, half, row, "none"),
        *recorded(launch_bias_gelu_backward, half, half, row, "none"),
    ]

def show(name, launch):
    arch = sys.argv[1]
    kernel, options = source(launch, arch)
    compiled = triton.compile(kernel, target=target(arch), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        code = subprocess.check_output([CUOBJDUMP, "-sass", cubin.name], text=True)
    # LDG.E.128 and the like are accesses of 16 bytes.
    wide = lambda access: bool(re.search(rf"\\b{access}\\.E(?:\\.\\w+)*\\.128\\b", code))
    print(json.dumps([name, wide("LDG"), wide("STG")]), flush=True)

if __name__ == "__main__":
    for channels, dtype in ((384, torch.bfloat16), (200, torch.bfloat16), (36, torch.float32), (36, torch.bfloat16)):
        attention, values = empty(8, 1, 196), empty(8, 197, channels, dtype=dtype)
        known = None, None, 137, 1, 197, 8 * 138
        show(f"dense {channels} {dtype}", *recorded(launch_select, attention, values, None, None, *known))
        packed = empty(1, 8 * 197), values.flatten(0, 1), None, integers(9), integers(9), None, 0, 1, 197, 500
        show(f"packed {channels} {dtype}", *recorded(launch_select, *packed))
        show(f"backward {channels} {dtype}", *recorded(launch_select_backward, values[0], integers(8, 197)))
    for dtype in (torch.bfloat16, torch.float32):
        for view in (None, integers(8, 3)):
            name = f"{dtype}" if view is None else f"{dtype} seen through a view"
            args = empty(8, 3, 224, 224), integers(900), integers(9), view, 16, 16, dtype
            show(f"patches {name}", *recorded(launch_gather_patches, *args))
            args = empty(900, 768, dtype=dtype), integers(8, 14, 14), view, 3, 16, 16, torch.float32
            show(f"patches' gradient {name}", *recorded(launch_gather_patches_backward, *args))
    of_rows = [elementwise(rows, 192) for rows in (377, 376, 1)]
    for name, *launches in zip(("sum, norm", "their gradient", "gelu", "its gradient"), *of_rows):
        show(name, launches[0])
        print(len({source(launch, sys.argv[1])[0].hash() for launch in launches}), flush=True)
"""


def _tiles(operation, size):
    return choose(operation, torch.device("cpu"), size)[1]


def test_rows_move_16_bytes_at_a_time_where_they_allow_it_and_their_number_compiles_nothing_new(seed):
    arch = ("sm_80", "sm_90")[seed % 2]  # compiling for both takes twice as long
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [BENCH, environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", WIDTHS, arch], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-7::2] == ["1"] * 4  # what the kernels around the products are compiled to, for any number of rows
    del lines[-7::2]
    assert len(lines) == 4 * 3 + 2 * 2 * 2 + 4
    for line in lines:
        name, *wide = json.loads(line)  # whether there are wide loads, wide stores
        expected = [True, True]
        if "view" in name:  # shifted pixels lie at any address: only patches, which are packed, have wide accesses
            expected = [True, False] if "gradient" in name else [False, True]
        elif name.endswith("36 torch.bfloat16"):  # rows of 72 bytes
            expected = [False, False]
        assert wide == expected, line


CANARY, MARGIN = 77, 4096


@pytest.fixture
def canaries(monkeypatch):
    """Let the launchers allocate poisoned memory between margins, which they must leave alone."""
    buffers = []

    def between_margins(tensor):
        buffer = tensor.new_full((tensor.numel() + 2 * MARGIN,), CANARY)
        buffer[MARGIN:-MARGIN] = torch.nan if tensor.is_floating_point() else -CANARY
        buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(tensor.shape)

    def allocating(allocate):
        def patched(*args):
            outputs = allocate(*args)
            return tuple(map(between_margins, outputs)) if isinstance(outputs, tuple) else between_margins(outputs)

        return patched

    for module, name in (
        (selection, "_fake_count_mass"),
        (selection, "_fake_select"),
        (selection, "_fake_select_backward"),
        (patches, "_fake_gather_patches"),
        (patches, "_fake_gather_patches_backward"),
    ):
        monkeypatch.setattr(module, name, allocating(getattr(module, name)))
    yield buffers
    assert buffers
    for buffer in buffers:
        assert (buffer[:MARGIN] == CANARY).all()
        assert (buffer[-MARGIN:] == CANARY).all()
        inside = buffer[MARGIN:-MARGIN]
        assert not (inside.isnan() if inside.is_floating_point() else inside == -CANARY).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 8, 33, 40, 200])
@pytest.mark.parametrize("candidates", [1, 31, 32, 33, 70])
def test_selection_writes_its_results_and_nothing_else(candidates, channels, dtype, canaries, device, seed):
    lengths = torch.randint(3, 3 + candidates, (3,)).tolist()
    cu_seqlens, tokens = cu_seqlens_of(lengths, device), sum(lengths)
    attention = torch.rand(2, tokens, device=device)
    values = torch.randn(tokens, channels, device=device).to(dtype)
    counts, limits = selection.launch_count_mass(attention, cu_seqlens, 0.6, 2, max(lengths))
    starts = counts.cumsum(0, dtype=torch.int32)
    k = [int(torch.randint(1, n - 1, ())) for n in lengths]
    own = cu_seqlens_of([2 + n for n in k], device)
    for first, last in ((starts, limits), (own, None)):
        *_, slots = selection.launch_select(
            attention, values, None, cu_seqlens, first, last, 0, 2, max(lengths), int(first[-1])
        )
        selection.launch_select_backward(torch.randn(int(first[-1]), channels, device=device).to(dtype), slots)
    dense, batch = torch.rand(3, 2, candidates, device=device), torch.randn(3, 2 + candidates, channels, device=device)
    k = (candidates + 1) // 2
    *_, slots = selection.launch_select(
        dense, batch.to(dtype), None, None, None, None, k, 2, 2 + candidates, 3 * (2 + k)
    )
    selection.launch_select_backward(torch.randn(3 * (2 + k), channels, device=device).to(dtype), slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", [None, (3, -5, 1), [(0, 0, 0), (40, 7, 1)]], ids=str)
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (3, 5)], ids=str)
def test_patches_write_their_results_and_nothing_else(patch, view, dtype, canaries, device, seed):
    images = torch.randn(2, 3, 3 * patch[0], 4 * patch[1], device=device)
    lengths = [5, 12]
    positions = torch.cat([torch.randperm(12)[:n] for n in lengths]).int().to(device)
    view = None if view is None else torch.tensor(view, device=device)
    out, _, inverse = patches.launch_gather_patches(
        images, positions, cu_seqlens_of(lengths, device), view, *patch, dtype
    )
    patches.launch_gather_patches_backward(torch.randn_like(out), inverse, view, 3, *patch, torch.float32)


@pytest.fixture
def only_the_last_program(monkeypatch):
    """Let a launch run only the last program of its grid. Then only the last rows of a huge tensor are touched, and the
    memory of the others is reserved but never used."""
    from triton.runtime.interpreter import InterpreterBuilder

    def launch(kernel, grid, *args, **constants):
        last = tuple(n - 1 for n in (*grid, 1, 1)[:3])
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", last))
        kernel[(1,)](*args, **constants)

    for module in (selection, patches):
        monkeypatch.setattr(module, "launch", launch)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="looks at what the interpreter runs")
BATCH, ROWS, KEPT, CHANNELS = 2**14, 197, 181, 768  # 197 tokens an image, of which 181 stay: 2.3e9 elements and more
LAST = 5  # rows in the last of an image's blocks of 32


@interpreted
@pytest.mark.parametrize("packed", [False, True])
def test_selection_beyond_2_to_the_31_elements(packed, only_the_last_program, seed):
    values = torch.empty(BATCH, ROWS, CHANNELS, dtype=torch.bfloat16)
    values[-1] = torch.randn(ROWS, CHANNELS)
    attention = torch.rand(BATCH, 1, ROWS)
    attention[-1, 0, -LAST:] += 1
    known = None, KEPT - 1, 1, ROWS, BATCH * KEPT
    if packed:
        cu_seqlens, starts = (n * torch.arange(BATCH + 1, dtype=torch.int32) for n in (ROWS, KEPT))
        attention, values = attention.view(1, -1), values.flatten(0, 1)
        result, positions, _, slots = selection.launch_select(attention, values, None, cu_seqlens, starts, *known)
    else:
        result, positions, _, slots = selection.launch_select(attention[:, :, 1:], values, None, None, None, *known)
    assert result.numel() > 2**31
    assert torch.equal(result[-LAST:], values.view(-1, CHANNELS)[-LAST:])
    assert positions[-LAST:].tolist() == list(range(ROWS - 1 - LAST, ROWS - 1))
    assert slots.flatten()[-LAST:].tolist() == list(range(BATCH * KEPT - LAST, BATCH * KEPT))


@interpreted
def test_counting_beyond_2_to_the_31_elements(only_the_last_program, seed):
    attention = torch.empty(2**24, 1, 196, dtype=torch.bfloat16)
    attention[-1] = torch.rand(196)
    counts, limits = selection.launch_count_mass(attention, None, 0.7, 0, 196)
    expected, expected_limits = selection.launch_count_mass(attention[-1:].clone(), None, 0.7, 0, 196)
    assert counts[-1] == expected[-1] == selection.count_mass_reference(attention[-1:], None, 0.7, 0, 196)[0][-1]
    assert torch.equal(limits[-1:], expected_limits)


@interpreted
def test_selection_gradient_beyond_2_to_the_31_elements(only_the_last_program, seed):
    grad = torch.empty(BATCH * KEPT, CHANNELS, dtype=torch.bfloat16)
    grad[-(ROWS // 2) :] = torch.randn(ROWS // 2, CHANNELS)
    slots = torch.empty(BATCH, ROWS, dtype=torch.int32)
    slots[-1] = -1
    slots[-1, 1::2] = torch.arange(BATCH * KEPT - ROWS // 2, BATCH * KEPT, dtype=torch.int32)
    out = selection.launch_select_backward(grad, slots)
    assert out.numel() > 2**31
    tile = _tiles("select_tokens_backward", CHANNELS // 8)
    rows, channels = tile["BR"], tile["BC"] * 8
    expected = torch.zeros(ROWS, CHANNELS, dtype=torch.bfloat16)
    expected[1::2] = grad[-(ROWS // 2) :]
    assert torch.equal(out[-1, -rows:, -channels:], expected[-rows:, -channels:])


@interpreted
@pytest.mark.parametrize("view", [None, (11, -29, 1)], ids=str)
def test_patches_beyond_2_to_the_31_elements(view, only_the_last_program, seed):
    images = torch.empty(BATCH, 3, 224, 224, dtype=torch.bfloat16)
    images[-1] = torch.randn(3, 224, 224)
    view = None if view is None else torch.tensor(view)
    positions = torch.randperm(196).int()
    last = images[-1:].clone().requires_grad_()
    expected, cells = patches.patches_reference(
        last, positions, torch.tensor([0, 196], dtype=torch.int32), view, (16, 16), torch.bfloat16
    )
    cu_seqlens = 196 * torch.arange(BATCH + 1, dtype=torch.int32)
    out, _, inverse = patches.launch_gather_patches(
        images, positions.repeat(BATCH), cu_seqlens, view, 16, 16, torch.bfloat16
    )
    blocks = _tiles("gather_patches", 768)["BT"]
    rows = 196 % blocks or blocks
    assert out.numel() > 2**31
    assert torch.equal(out[-rows:], expected[-rows:])

    grad = torch.empty_like(out)
    grad[-196:] = torch.randn(196, 768)
    inverse[-1].view(-1)[cells.long()] = torch.arange(BATCH * 196 - 196, BATCH * 196, dtype=torch.int32)
    (expected_grad,) = torch.autograd.grad(expected, last, grad[-196:], retain_graph=True)
    in_block = (cells >= 196 - rows)[:, None].expand(-1, 768).bfloat16()
    (touched,) = torch.autograd.grad(expected, last, in_block)
    result = patches.launch_gather_patches_backward(grad, inverse, view, 3, 16, 16, torch.bfloat16)
    assert result.numel() > 2**31
    assert torch.equal(result[-1][touched[0] == 1], expected_grad[0][touched[0] == 1])


@pytest.fixture
def apart(tmp_path):
    """Make strided tensors in files without contents, of which only the touched parts take memory."""

    def make(number, shape, strides, dtype):
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        path = str(tmp_path / f"{number}.bin")
        return torch.from_file(path, shared=True, size=size, dtype=dtype).as_strided(shape, strides)

    return make


@interpreted
def test_selection_with_large_strides(apart, seed):
    attention = apart(0, (1, 4, 3), (1, 2**30 + 1, 2**30 + 5), torch.bfloat16)
    values = apart(1, (1, 4, 5), (1, 2**30 + 16, 1), torch.bfloat16)
    positions = apart(2, (1, 3), (1, 2**30 + 3), torch.int32)
    for tensor in (attention, values, positions):
        tensor.copy_(torch.randint(1000, tensor.shape))
    arguments = {"k": 2, "num_prefix_tokens": 1}
    plain = selection.select_tokens(*(x.clone() for x in (attention, values, positions)), backend="torch", **arguments)
    ours = selection.select_tokens(attention, values, positions, backend="triton", **arguments)
    for a, b in zip(ours[:3], plain[:3], strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("view", [None, (1, -2, 1)], ids=str)
def test_patches_with_large_strides(view, apart, seed):
    images = apart(0, (1, 3, 8, 8), (1, 2**30 + 1, 2**30 + 3, 2**30 + 5), torch.bfloat16)
    images.copy_(torch.randn(images.shape))
    view = None if view is None else torch.tensor(view)
    arguments = torch.arange(4, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32), view
    plain, ours = (
        patches.gather_patches(x, *arguments, patch_size=4, backend=backend)[0]
        for x, backend in ((images.clone(), "torch"), (images, "triton"))
    )
    assert torch.equal(ours, plain)
