"""The operations in C++: how they are compiled, when they run, and that no number hangs on the threads."""

import os
import pwd
import subprocess
import sys
import tempfile

import pytest
import torch
from kernel_cases import cu_seqlens_of
from smi_fast.kernels import attention, cpu, gather_patches, patch_sites, pixel_step, residual_norm

needs_cpp = pytest.mark.skipif(cpu.library() is None, reason=cpu.cpu_status())


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    merged = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], env=merged, capture_output=True, text=True, check=False)


def test_without_a_compiler_plain_torch_computes_everything(tmp_path):
    code = "from smi_fast.kernels import cpu; print(cpu.library(), cpu.cpu_status())"
    without = python(code, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert without.stdout == f"None cpu.cpp is not in use: there is no {cpu.COMPILER} for Linux here.\n"
    assert without.stderr == ""
    demanded = python(code, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), SMI_FAST_CPU_KERNELS="1")
    assert "RuntimeError: SMI_FAST_CPU_KERNELS=1, but cpu.cpp cannot be compiled" in demanded.stderr
    assert python(code, SMI_FAST_CPU_KERNELS="0").stdout == "None cpu.cpp is not in use: SMI_FAST_CPU_KERNELS=0.\n"
    assert "SMI_FAST_CPU_KERNELS=yes is none of auto, 0 and 1" in python(code, SMI_FAST_CPU_KERNELS="yes").stderr


@needs_cpp
def test_a_library_is_compiled_once_and_found_again(tmp_path):
    code = "from smi_fast.kernels import cpu; print(cpu.library() is not None)"
    made = []
    for _ in range(2):
        assert python(code, XDG_CACHE_HOME=str(tmp_path)).stdout == "True\n"
        made.append([(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "smi-fast").iterdir()])
    assert len(made[0]) == 1
    assert made[0] == made[1]


@needs_cpp
def test_without_a_cache_a_library_is_compiled_and_leaves_no_file(tmp_path, monkeypatch):
    no_folder, temporary = tmp_path / "file", tmp_path / "temporary"
    no_folder.touch()  # no folder can be made in it
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_folder))
    assert cpu.library.__wrapped__() is not None
    # A user whose id has no name and who has no HOME, as in some containers.
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert cpu.library.__wrapped__() is not None
    assert list(temporary.iterdir()) == []


def test_a_compiler_that_fails_is_reported(tmp_path):
    compiler = tmp_path / cpu.COMPILER
    compiler.write_text("#!/bin/sh\necho cannot do that >&2; exit 1\n")
    compiler.chmod(0o755)
    code = "from smi_fast.kernels import cpu; print(cpu.library())"
    failed = python(code, PATH=f"{tmp_path}:{os.environ['PATH']}", XDG_CACHE_HOME=str(tmp_path))
    assert failed.stdout == "None\n"
    assert "UserWarning: plain torch computes everything: cpu.cpp cannot be compiled: cannot do that" in failed.stderr


def results(dtype: torch.dtype) -> list[torch.Tensor]:
    """What every operation gives for fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, update = draw(300, 80).requires_grad_(), draw(300, 80).to(dtype).requires_grad_()
    stream, normed = residual_norm(x, draw(80), draw(80), 1e-6, update=update, dtype=dtype)
    found = [
        stream,
        normed,
        *torch.autograd.grad((stream, normed), (x, update), (draw(300, 80), draw(300, 80).to(dtype))),
    ]
    qkv, lengths = draw(120, 3, 4, 24).to(dtype).requires_grad_(), [47, 13, 60]
    out, row = attention(qkv, cu_seqlens_of(lengths), 60, return_class_attention=True)
    found += [out, row, *torch.autograd.grad(out, qkv, draw(120, 4, 24).to(dtype))]
    images, positions, cu = draw(3, 3, 16, 24), torch.randperm(24, generator=generator).int(), cu_seqlens_of([8, 8, 8])
    view = torch.tensor([5, -3, 1])
    patches, cells, inverse = gather_patches(
        images, positions, cu, view, patch_size=4, dtype=dtype, return_inverse=True
    )
    moments, following = [torch.zeros(24, 48) for _ in range(2)], images.clone()
    prior = pixel_step(
        following, *moments, torch.zeros(3, dtype=torch.int64), images, patches, patch_sites(positions, cu, (4, 6)),
        torch.full((3,), -2.0), torch.full((3,), 2.0), inverse, view, patch_size=4, lr=0.1, tv_l2=0.1, l2=0.1,
    )  # fmt: skip
    return [t.detach() for t in (*found, patches, cells, inverse, following, *moments, prior)]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_hang_on_the_number_of_threads(dtype):
    ran, found, before = [], [], torch.get_num_threads()
    try:
        with cpu.recording(lambda _, arguments: ran.append(arguments[0])):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(results(dtype))
    finally:
        torch.set_num_threads(before)
    assert set(ran) == set(cpu.ARGUMENTS)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@needs_cpp
def test_what_the_functions_cannot_compute_they_do_not_suit(seed):
    x = torch.randn(3)
    assert cpu.suits_cpp(x, None, x.bfloat16())
    assert not cpu.suits_cpp(x.double())
    assert not cpu.suits_cpp(x.half())
    assert not cpu.suits_cpp(x, x.to("meta"))
    torch.func.vmap(lambda row: row if not cpu.suits_cpp(row) else pytest.fail("vmap"))(torch.randn(2, 3))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not cpu.suits_cpp(x)


@needs_cpp
def test_only_auto_takes_them(seed):
    ran, x, qkv = [], torch.randn(4, 8), torch.randn(4, 3, 1, 8)
    with cpu.recording(lambda _, arguments: ran.append(arguments[0])):
        for backend in ("torch", "auto"):
            residual_norm(x, None, None, 1e-6, backend=backend)
            attention(qkv, cu_seqlens_of([4]), 4, backend=backend)
            assert ran == ([] if backend == "torch" else ["residual_norm", "attention"])


@needs_cpp
def test_indices_that_lead_out_of_a_tensor_are_refused(seed):
    def int32(*values):
        return torch.tensor(values, dtype=torch.int32)

    qkv = torch.randn(10, 3, 2, 8, requires_grad=True)
    for lengths in ((0, 500), (2, 10), (0, 12, 10), (0, 7)):
        with pytest.raises(ValueError, match="cu_seqlens"):
            attention(qkv, int32(*lengths), 500)
    images, cu_seqlens, positions = torch.randn(2, 3, 8, 8), int32(0, 2, 3), int32(0, 3, 1)
    with pytest.raises(ValueError, match="cu_seqlens leads from 0 to 2, not from 0 to 3"):
        gather_patches(images, positions, int32(0, 2, 2), patch_size=4)
    for wrong in (-1, 4, 10**6):
        with pytest.raises(ValueError, match=rf"positions\[1\] is {wrong}, not in a grid of 2 x 2"):
            gather_patches(images, int32(0, wrong, 1), cu_seqlens, patch_size=4)

    moments, limits, sites = (
        [torch.zeros(3, 48) for _ in range(2)],
        torch.ones(3),
        patch_sites(positions, cu_seqlens, (2, 2)),
    )

    def step(sites, inverse=None, **prior):
        return pixel_step(
            images.clone(), *moments, torch.zeros(2, dtype=torch.int64), images, torch.ones(3, 48), sites, -limits,
            limits, inverse, None if inverse is None else torch.zeros(3).long(), patch_size=4, lr=0.1, **prior,
        )  # fmt: skip

    for column, wrong in ((0, 2), (1, -1), (2, 2)):
        outside = sites.clone()
        outside[1, column] = wrong
        for prior in ({}, {"tv_l2": 1.0}):
            with pytest.raises(ValueError, match=rf"sites\[1, {column}\] is {wrong}, not below 2"):
                step(outside, **prior)
    with pytest.raises(ValueError, match="inverse holds 3, and there are 3 patches"):
        step(sites, torch.full((2, 2, 2), 3, dtype=torch.int32))
    assert not any(moment.any() for moment in moments)
