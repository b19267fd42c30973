"""Triton compiles a kernel anew for each set of types, constants and properties of its arguments, such as being 1 or a
multiple of 16. How many tokens, patches or images a batch has is none of them."""

import importlib
import pkgutil

import pytest
import torch
from kernel_cases import cu_seqlens_of

pytest.importorskip("triton")

from smi_fast.kernels.attention import launch_attention, launch_attention_backward
from smi_fast.kernels.backend import Launch, recording
from smi_fast.kernels.class_attention import launch_class_attention, launch_class_attention_backward
from smi_fast.kernels.cross_entropy import launch_cross_entropy, launch_cross_entropy_backward
from smi_fast.kernels.dispatch import choice_of, override, table
from smi_fast.kernels.embedding import launch_embed_tokens, launch_embed_tokens_backward
from smi_fast.kernels.mlp import launch_bias_gelu, launch_bias_gelu_backward
from smi_fast.kernels.norm import launch_residual_norm, launch_residual_norm_backward
from smi_fast.kernels.patch_entropy import launch_patch_entropy, launch_patch_entropy_backward
from smi_fast.kernels.patches import launch_gather_patches, launch_gather_patches_backward
from smi_fast.kernels.pixels import launch_pixel_step
from smi_fast.kernels.selection import launch_count_mass, launch_select, launch_select_backward
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from smi_fast import kernels

ROWS = {name: rows for name, rows in table()["sm_90"].items() if name != "source"}
FORMS = {row["form"] for name in ("attention_forward", "attention_backward") for row in ROWS[name]}
LONGEST = 197


def launches(n: int) -> list[Launch]:
    """Launches of every kernel on n tokens, patches or images, with the same tiles for every n."""
    found = []
    for form in sorted(FORMS):
        choices = {}
        for name, rows in ROWS.items():
            fitting = [row for row in rows if row.get("form", form) == form and row.get("head_dim", 32) == 32]
            choices[name] = choice_of((fitting or rows)[-1])
        with override(choices), recording() as part:
            attend(n)
            if not found:
                select(n)
                step(n)
                surround(n)
        found += part
    return found


def attend(n: int) -> None:
    for lengths in ([n], [1] * n):
        cu_seqlens, scale = cu_seqlens_of(lengths), 0.125
        qkv = torch.empty(n, 3, 3, 32, dtype=torch.bfloat16)
        out, _, statistics = launch_attention(qkv, cu_seqlens, LONGEST, scale, True, True)
        launch_attention_backward(out, qkv, out, statistics, cu_seqlens, LONGEST, scale)
        q, kv = out[: len(lengths)].contiguous(), qkv[:, 1:].contiguous()
        _, _, statistics = launch_class_attention(q, kv, cu_seqlens, LONGEST, scale)
        launch_class_attention_backward(q, q, kv, statistics, cu_seqlens, LONGEST, scale)
        # How many blocks the longest sequence has does not count either.
        positions, longest = torch.zeros(n, dtype=torch.int32), max(lengths)
        entropies, *statistics = launch_patch_entropy(out, positions, cu_seqlens, longest, 0.01, 10, True)
        launch_patch_entropy_backward(entropies, out, positions, cu_seqlens, *statistics, longest, 0.01)


def select(n: int) -> None:
    """From images of n patches and a prefix token, a dense and a packed batch; then n patches of images of one."""
    for batch, patches in ((2, n), (n, 1)):
        attention, values = torch.empty(batch, 3, patches), torch.empty(batch, 1 + patches, 40)
        positions, starts = torch.empty(batch, patches, dtype=torch.int32), cu_seqlens_of([1 + patches] * batch)
        tokens = batch * (1 + patches)
        for k, limits in ((patches, None), (0, torch.empty(batch, 2, dtype=torch.int32))):
            known = k, 1, 1 + patches, tokens
            launch_select(attention, values, positions, None, starts, limits, *known)
            packed = torch.empty(3, tokens), values.flatten(0, 1), torch.empty(tokens, dtype=torch.int32)
            launch_select(*packed, starts, starts, limits, *known)
        launch_count_mass(attention, None, 0.9, 1, 1 + patches)
        launch_count_mass(torch.empty(3, tokens), starts, 0.9, 1, 1 + patches)
        launch_select_backward(torch.empty(tokens, 40), torch.empty(batch, 1 + patches, dtype=torch.int32))


def step(n: int) -> None:
    images, moments, bounds = torch.empty(n, 3, 8, 8), torch.empty(n, 48), torch.empty(3)
    positions, sites = torch.zeros(n, dtype=torch.int32), torch.empty(n, 4, dtype=torch.int32)
    for view in (torch.zeros(3, dtype=torch.int32), torch.zeros(n, 3, dtype=torch.int32)):
        _, _, inverse = launch_gather_patches(images, positions, cu_seqlens_of([1] * n), view, 4, 4, torch.float32)
        launch_gather_patches_backward(moments, inverse, view, 3, 4, 4, torch.float32)
        for counts in (1, n):
            state = images, moments, moments, torch.zeros(counts, dtype=torch.int64), images, moments
            for norm in ("batch", "image"):
                numbers = 4, 4, 0.25, 0.5, 0.99, 1e-8, 1e-4, 1e-5
                launch_pixel_step(*state, sites, bounds, bounds, inverse, view, *numbers, moments, norm)
            launch_pixel_step(*state, sites, bounds, bounds, inverse, view, *numbers, None, "batch", torch.empty(n))


def surround(n: int) -> None:
    weight = torch.empty(192)
    for x in (torch.empty(2, n, 192), torch.empty(n, 1, 192), torch.empty(2, n, 192)[:, :1]):
        launch_residual_norm(x, x, weight, weight, weight, 1e-6, torch.float32)
        statistics = torch.empty(*x.shape[:2], 2)
        launch_residual_norm_backward(x, x, x, statistics, weight, weight, torch.float32, torch.float32)
        longer, options = torch.empty(x.shape[0], 1 + x.shape[1], 192), (weight, weight, torch.float32, torch.float32)
        first, statistics = longer[:, :1], torch.empty(*longer.shape[:2], 2)
        launch_residual_norm_backward(first, longer, longer, statistics, *options, first)
        launch_bias_gelu(x, weight, "none")
        launch_bias_gelu_backward(x, x, weight, "none")
    x, positions, prefix = torch.empty(n, 192), torch.zeros(n, dtype=torch.int32), torch.empty(1, 192)
    for lengths in ([n], [1] * n):
        cu_seqlens = cu_seqlens_of(lengths)
        tokens, *_ = launch_embed_tokens(x, positions, cu_seqlens, LONGEST, prefix, torch.empty(198, 192), True)
        launch_embed_tokens_backward(tokens, cu_seqlens, LONGEST, n, 1, torch.float32)
    targets = torch.zeros(n, dtype=torch.int64)
    for reduction in ("mean", "sum"):
        loss, statistics = launch_cross_entropy(x, targets, reduction)
        launch_cross_entropy_backward(loss, x, targets, statistics, reduction)


def variant(launch: Launch) -> tuple[str, dict[str, str]]:
    """The name of a kernel, and what Triton's binder specialises each of its arguments to."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, **kernel.kwargs)  # which the interpreter has taken the place of
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, options = bind(**launch.arguments)
    arguments = {name: str(of) for name, of in zip(bound, specialised, strict=True)}
    constants = {parameter.name: str(bound[parameter.name]) for parameter in kernel.params if parameter.is_constexpr}
    return kernel.fn.__name__, arguments | constants | {name: str(value) for name, value in options.items()}


def test_no_count_of_tokens_patches_or_images_compiles_a_kernel_anew():
    expected = [variant(launch) for launch in launches(16)]
    for n in (1, 15, 17, 48):
        found = [variant(launch) for launch in launches(n)]
        assert [name for name, _ in found] == [name for name, _ in expected]
        for (name, ours), (_, theirs) in zip(found, expected, strict=True):
            differing = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
            assert not differing, f"{name} for {n} and for 16"
    assert {name for name, _ in expected} == every_kernel()


def every_kernel() -> set[str]:
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}
