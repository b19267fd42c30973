"""Kernels against what PyTorch and others offer for the same operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from duel import OURS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smi_fast import kernels
from smi_fast.tokens import uniform_cu_seqlens

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Tokens:
    """Sequences of equal length, as the qkv projection of a ViT leaves them."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {self.tokens} tokens, {self.heads} heads of {self.head_dim}, {dtype}"

    def qkv(self, device: torch.device) -> Tensor:
        """(B, N, 3, H, D)"""
        return torch.randn(self.batch, self.tokens, 3, self.heads, self.head_dim, device=device, dtype=self.dtype)


CPU_TOKENS = [Tokens(8, 197, 3, 64), Tokens(8, 47, 3, 64), Tokens(8, 47, 12, 64), Tokens(8, 47, 3, 64, torch.bfloat16)]
CUDA_TOKENS = [
    Tokens(128, tokens, heads, 64, dtype)
    for heads in (3, 12)
    for tokens in (197, 138, 96, 67, 47)
    for dtype in (torch.bfloat16, torch.float32)
]
SDPA = {
    "SDPA math": SDPBackend.MATH,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
ATTENTION = [OURS, *SDPA, "varlen", "FlexAttention", "xFormers", "flash-attn"]


def attention_forms(case: Tokens, device: torch.device) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """qkv (B, N, 3, H, D) -> (B, N, H, D), as each contestant does it; or why it cannot."""
    cu_seqlens = uniform_cu_seqlens(case.batch, case.tokens, device)
    count = case.tokens

    def ours(qkv: Tensor) -> Tensor:
        return kernels.attention(qkv.flatten(0, 1), cu_seqlens, count).unflatten(0, (case.batch, count))

    def sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    def varlen(attend: Callable, qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(0, 1).unbind(1)  # (T, H, D) each
        return attend(q, k, v, cu_seqlens, cu_seqlens, count, count).unflatten(0, (case.batch, count))

    def flex(attend: Callable, qkv: Tensor) -> Tensor:
        return attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).contiguous()

    forms = {OURS: ours} | {name: partial(sdpa, backend) for name, backend in SDPA.items()}
    if device.type != "cuda":
        return forms | dict.fromkeys(ATTENTION[len(forms) :], "runs on a GPU only")
    forms |= dict.fromkeys(ATTENTION[len(forms) :], "not installed")
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        forms["varlen"] = partial(varlen, varlen_attn)
    with suppress(ImportError):
        from torch.nn.attention.flex_attention import flex_attention

        forms["FlexAttention"] = partial(flex, torch.compile(flex_attention))
    with suppress(ImportError):
        from xformers.ops import memory_efficient_attention

        forms["xFormers"] = lambda qkv: memory_efficient_attention(*qkv.unbind(2))
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        forms["flash-attn"] = partial(varlen, flash_attn_varlen_func)
    return forms


def forward(form: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    with torch.no_grad():
        return form(qkv)


def forward_backward(form: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out = form(leaf)
    return out, *torch.autograd.grad(out, leaf, grad)


@pytest.mark.contest(contestants=ATTENTION, cpu=CPU_TOKENS, cuda=CUDA_TOKENS)
def test_attention_forward(case, device, enter):
    def contestants():
        qkv = case.qkv(device)
        forms = attention_forms(case, device)
        return {name: form if isinstance(form, str) else partial(forward, form, qkv) for name, form in forms.items()}

    enter("attention, forward", contestants, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ATTENTION, cpu=CPU_TOKENS, cuda=CUDA_TOKENS)
def test_attention_forward_backward(case, device, enter):
    def contestants():
        qkv = case.qkv(device).requires_grad_()
        grad = torch.randn_like(qkv[:, :, 0])
        return {
            name: form if isinstance(form, str) else partial(forward_backward, form, qkv, grad)
            for name, form in attention_forms(case, device).items()
        }

    enter("attention, forward and backward", contestants, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=[OURS, "SDPA, row beside it", "all rows"], cpu=CPU_TOKENS, cuda=CUDA_TOKENS)
def test_attention_with_class_row(case, device, enter):
    """The class token's attention to all tokens too: (B, N) float32, averaged over the heads."""

    def contestants():
        qkv = case.qkv(device)
        cu_seqlens = uniform_cu_seqlens(case.batch, case.tokens, device)
        scale = case.head_dim**-0.5

        def ours():
            out, row = kernels.attention(qkv.flatten(0, 1), cu_seqlens, case.tokens, return_class_attention=True)
            return out.view_as(qkv[:, :, 0]), row.view(case.batch, case.tokens)

        def row_beside():
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            row = (q[:, :, :1] @ k.transpose(-2, -1) * scale).softmax(-1, dtype=torch.float32)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous(), row[:, :, 0].mean(1)

        def all_rows():
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * scale).softmax(-1)
            return (weights @ v).transpose(1, 2).contiguous(), weights[:, :, 0].float().mean(1)

        return {OURS: ours, "SDPA, row beside it": row_beside, "all rows": all_rows}

    enter("attention with the class row, forward", contestants, tolerance=TOLERANCE[case.dtype])


@dataclass(frozen=True)
class Candidates:
    """Patches to choose from, of a ViT of that width."""

    batch: int
    heads: int
    patches: int
    kept: int
    width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {self.kept} of {self.patches} patches, {self.heads} heads, {self.width} wide, {dtype}"


@pytest.mark.contest(
    contestants=[OURS, "torch", "torch.compile"],
    cpu=[Candidates(8, 3, 196, 137, 192), Candidates(8, 3, 66, 46, 192)],
    cuda=[Candidates(128, 12, a, b, 768, torch.bfloat16) for a, b in ((196, 137), (137, 95), (95, 66), (66, 46))],
)
def test_selection(case, device, enter):
    """Class attention of each head -> the most important patches in order, and their tokens behind the class token."""

    def contestants():
        attention = torch.rand(case.batch, case.heads, case.patches, device=device)
        values = torch.randn(case.batch, 1 + case.patches, case.width, device=device, dtype=case.dtype)

        def ours():
            kept = kernels.select_tokens(attention, values, k=case.kept, num_prefix_tokens=1)
            return kept.values.view(case.batch, 1 + case.kept, -1), kept.positions.view(case.batch, -1)[:, 1:]

        def plain(attention: Tensor, values: Tensor):
            kept = attention.mean(1).topk(case.kept, dim=1).indices.sort(dim=1).values
            rows = F.pad(kept + 1, (1, 0))
            return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1])), kept

        compiled = torch.compile(plain) if device.type == "cuda" else None
        return {
            OURS: ours,
            "torch": partial(plain, attention, values),
            "torch.compile": partial(compiled, attention, values) if compiled else "compared on a GPU only",
        }

    enter("selection", contestants, tolerance=0)


@dataclass(frozen=True)
class Kept:
    """Kept patches of 16 x 16 pixels of 224 x 224 images."""

    batch: int
    kept: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.kept} of 196 patches"


KEPT = {"cpu": [Kept(8, 196), Kept(8, 46)], "cuda": [Kept(128, kept) for kept in (196, 137, 95, 66, 46)]}


def patch_forms(case: Kept, device: torch.device) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """images (B, 3, 224, 224) -> the kept patches (T, 768) as seen through one view."""
    view = torch.tensor([-21, 10, 1], dtype=torch.int32, device=device)
    dy, dx, flip = view.tolist()
    keep = torch.rand(case.batch, 196, device=device).argsort(1)[:, : case.kept].sort(1).values
    positions, cu_seqlens = keep.flatten().int(), uniform_cu_seqlens(case.batch, case.kept, device)

    def ours(images: Tensor) -> Tensor:
        return kernels.gather_patches(images, positions, cu_seqlens, view, patch_size=16)[0]

    def plain(images: Tensor) -> Tensor:
        viewed = images.roll((dy, dx), dims=(2, 3))
        viewed = viewed.flip(3) if flip else viewed
        patches = F.unfold(viewed, 16, stride=16).transpose(1, 2)
        cells = kernels.view_cells(keep, view, (14, 14), (16, 16))
        return patches.gather(1, cells[..., None].expand(-1, -1, 768)).flatten(0, 1)

    compiled = torch.compile(plain) if device.type == "cuda" else "compared on a GPU only"
    return {OURS: ours, "torch": plain, "torch.compile": compiled}


@pytest.mark.contest(contestants=[OURS, "torch", "torch.compile"], **KEPT)
def test_patches_forward(case, device, enter):
    def contestants():
        images = torch.randn(case.batch, 3, 224, 224, device=device)
        forms = patch_forms(case, device)
        return {name: form if isinstance(form, str) else partial(forward, form, images) for name, form in forms.items()}

    enter("patches through a view, forward", contestants, tolerance=0)


@pytest.mark.contest(contestants=[OURS, "torch", "torch.compile"], **KEPT)
def test_patches_forward_backward(case, device, enter):
    def contestants():
        images = torch.randn(case.batch, 3, 224, 224, device=device, requires_grad=True)
        grad = torch.randn(case.batch * case.kept, 768, device=device)
        return {
            name: form if isinstance(form, str) else partial(forward_backward, form, images, grad)
            for name, form in patch_forms(case, device).items()
        }

    enter("patches through a view, forward and backward", contestants, tolerance=0)
