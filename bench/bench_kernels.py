"""Benchmarks of the kernels against what PyTorch and others offer for the same operations.

A group's inputs are drawn once. Peers that do not know lengths get a ragged batch padded to its longest sequence, with
a mask. Padding, unpadding, masks and document tables are made outside of what is timed, which favours the peers. Every
contestant reads the qkv tensor that a projection leaves, packed or padded, and returns its gradient in that layout.

Contestants under torch.compile are compiled for unknown sizes (the selection for an unknown batch size), so that a run
takes only minutes. A graph break is an error there, and so are too many shapes, because both would run eagerly under
the name of compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from duel import OURS, Round
from smi_fast.kernels.patch_entropy import patch_entropy_reference
from smi_fast.kernels.pixels import patch_sites, pixel_step_reference
from smi_fast.kernels.rows import padding, sequence_of_tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smi_fast import kernels

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
GPU_ONLY, CPU_ONLY = "compared on a GPU only", "compared on a CPU only"
PLAIN = f"{OURS}, plain torch"  # what smi-fast runs with backend "torch", beside its C++ on a CPU
SHORTEST, LONGEST = 24, 197  # tokens in the sequences of a ragged mix
torch._dynamo.config.recompile_limit = 64
pytestmark = pytest.mark.rotate


@cache
def compiled(function: Callable, dynamic: bool = False) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def drawn_lengths(batch: int) -> list[int]:
    """The lengths of the ragged mix for a batch size, which are the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SHORTEST, LONGEST + 1, (batch,), generator=generator).tolist()


class Sequences:
    """Where the tokens of B sequences lie: packed (T, ...), or padded (B, N, ...) for peers without lengths."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.batch, self.longest, self.tokens = len(lengths), max(lengths), sum(lengths)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        self.slots, self.taken = padding(self.cu_seqlens, self.longest, self.tokens)
        self.ragged = self.tokens != self.batch * self.longest

    def padded(self, packed: Tensor) -> Tensor:
        """Pad (T, ...) to (B, N, ...). Equal lengths share the memory."""
        if self.ragged:
            zeros = packed.new_zeros(self.batch * self.longest, *packed.shape[1:])
            packed = zeros.index_copy_(0, self.slots, packed)
        return packed.unflatten(0, (self.batch, self.longest))

    def packed(self, padded: Tensor) -> Tensor:
        """Remove the padding of (B, N, ...), which leaves (T, ...)."""
        return padded.flatten(0, 1)[self.slots]

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """A mask (B, N) that is added to the scores: 0 for keys, -inf for padding. None if all lengths are equal."""
        zeros = torch.zeros(self.batch, self.longest, device=self.taken.device, dtype=dtype)
        return zeros.masked_fill_(~self.taken, -torch.inf) if self.ragged else None


@dataclass(frozen=True)
class Tokens:
    """Sequences as the qkv projection of a ViT leaves them, each of `tokens` tokens. If that is None, a ragged mix."""

    batch: int
    tokens: int | None
    heads: int
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        tokens = f"{SHORTEST} to {LONGEST}" if self.tokens is None else self.tokens
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {tokens} tokens, {self.heads} heads of {self.head_dim}, {dtype}"

    @property
    def lengths(self) -> list[int]:
        return drawn_lengths(self.batch) if self.tokens is None else [self.tokens] * self.batch

    def sequences(self, device: torch.device) -> Sequences:
        return Sequences(self.lengths, device)

    def randn(self, *shape: int, device: torch.device) -> Tensor:
        return torch.randn(*shape, self.heads, self.head_dim, device=device, dtype=self.dtype)

    def facts(self, rows: int, products: int, queries: int = 0, attention: bool = False) -> dict[str, float]:
        """The numbers of the group, and its floor.

        For each token `rows` rows of H D values have to move, and for each query of `class_attention` `queries` rows.
        With `attention`, H float32 values move for each token too. Each of the `products` has N^2 D multiplications and
        additions for a head and sequence of N tokens, or N D for one query."""
        tokens, width = sum(self.lengths), self.heads * self.head_dim
        scores = tokens if queries else sum(length**2 for length in self.lengths)
        moved = (rows * tokens + queries * self.batch) * width * self.dtype.itemsize
        return {
            "length": tokens / self.batch,
            "ragged": self.tokens is None,
            "floor_bytes": moved + attention * 4 * self.heads * tokens,
            "floor_flops": 2 * products * scores * width,
        }


CPU_TOKENS = [
    Tokens(8, 197, 3, dtype=torch.float32),
    Tokens(8, 47, 3, dtype=torch.float32),
    Tokens(8, 47, 12, dtype=torch.float32),
    Tokens(8, 47, 3),
    Tokens(8, None, 3, dtype=torch.float32),
]
LENGTHS = (47, 67, 96, 138, 197, None)
CUDA_TOKENS = [Tokens(b, n, h) for h in (3, 6, 12) for b in (32, 128, 512) for n in LENGTHS]
CUDA_TOKENS_OF_ONE_BATCH = [case for case in CUDA_TOKENS if case.batch == 128]
SDPA = {
    "SDPA math": SDPBackend.MATH,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
ATTENTION = [OURS, *SDPA, "varlen", "FlexAttention", "xFormers", "flash-attn"]


class Form(NamedTuple):
    """One way to attend: (T, 3, H, D) -> (T, H, D), or of padded sequences (B, N, 3, H, D) -> (B, N, H, D)."""

    attend: Callable
    padded: bool = False


def attention_forms(case: Tokens, sequences: Sequences) -> dict[str, Form | str]:
    """How each contestant attends, or why it cannot."""
    cu_seqlens, longest, mask = sequences.cu_seqlens, sequences.longest, sequences.mask(case.dtype)
    mask = None if mask is None else mask[:, None, None]

    def ours(qkv: Tensor) -> Tensor:
        return kernels.attention(qkv, cu_seqlens, longest)

    def sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).contiguous()

    def varlen(attend: Callable, qkv: Tensor) -> Tensor:
        return attend(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)

    forms: dict[str, Form | str] = {OURS: Form(ours)}
    forms |= {name: Form(partial(sdpa, backend), padded=True) for name, backend in SDPA.items()}
    if cu_seqlens.device.type != "cuda":
        return forms | dict.fromkeys(ATTENTION[len(forms) :], "runs on a GPU only")
    forms |= dict.fromkeys(ATTENTION[len(forms) :], "not installed")
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        forms["varlen"] = Form(partial(varlen, varlen_attn))
    with suppress(ImportError):
        forms["FlexAttention"] = flex_form(sequences)
    with suppress(ImportError):
        forms["xFormers"] = xformers_form(case, sequences)
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        forms["flash-attn"] = Form(partial(varlen, flash_attn_varlen_func))
    return forms


def attention_contest(case: Tokens, sequences: Sequences, _) -> dict[str, Form | str]:
    plain = partial(kernels.attention, cu_seqlens=sequences.cu_seqlens, max_seqlen=sequences.longest, backend="torch")
    on_cpu = sequences.cu_seqlens.device.type == "cpu"
    return attention_forms(case, sequences) | {PLAIN: Form(plain) if on_cpu else CPU_ONLY}


def flex_form(sequences: Sequences) -> Form:
    """Equal lengths as a batch, others packed into one sequence under a document mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention, dynamic=True)
    if not sequences.ragged:
        return Form(lambda qkv: attend(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).contiguous(), padded=True)
    document = sequence_of_tokens(sequences.cu_seqlens, sequences.tokens)

    def same_document(_, __, query: Tensor, key: Tensor) -> Tensor:
        return document[query] == document[key]

    mask = create_block_mask(same_document, None, None, sequences.tokens, sequences.tokens, device=document.device)

    def packed(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)[:, :, None]  # (H, 1, T, D) each: a batch of any size is compiled once
        return attend(q, k, v, block_mask=mask)[:, 0].transpose(0, 1).contiguous()

    return Form(packed)


def xformers_form(case: Tokens, sequences: Sequences) -> Form:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    if not sequences.ragged:
        return Form(lambda qkv: memory_efficient_attention(*qkv.unbind(2)), padded=True)
    mask = BlockDiagonalMask.from_seqlens(case.lengths)
    return Form(lambda qkv: memory_efficient_attention(*qkv[None].unbind(2), attn_bias=mask)[0])


def forward(form: Callable, *inputs: Tensor) -> object:
    with torch.no_grad():
        return form(*inputs)


def forward_backward(form: Callable, leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """What the form returns, and the gradients of the leaves, from that of the first that it returns."""
    outputs = form(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs, *torch.autograd.grad(outputs[0], leaves, grad))


def pass_of(form: Callable, inputs: tuple[Tensor, ...], grad: Tensor | None) -> Callable:
    """A forward pass without gradients, or with the gradient of what the form returns the backward pass too."""
    if grad is None:
        return partial(forward, form, *inputs)
    return partial(forward_backward, form, tuple(x.detach().requires_grad_() for x in inputs), grad)


def attention_rounds(
    case: Tokens, device: torch.device, make_forms: Callable[..., dict[str, Form | str]], backward: bool
) -> dict[str, Round | str]:
    """Rounds of `make_forms(case, sequences, qkv)`, all of which return tensors of tokens first."""
    sequences = case.sequences(device)
    qkv = case.randn(sequences.tokens, 3, device=device)
    grad = torch.randn_like(qkv[:, 0]) if backward else None
    rounds: dict[str, Round | str] = {}
    for name, form in make_forms(case, sequences, qkv).items():
        if isinstance(form, str):
            rounds[name] = form
        elif form.padded:
            padded_grad = None if grad is None else sequences.padded(grad)
            call = pass_of(form.attend, (sequences.padded(qkv),), padded_grad)
            rounds[name] = Round(call, lambda *outputs: tuple(map(sequences.packed, outputs)))
        else:
            rounds[name] = Round(pass_of(form.attend, (qkv,), grad))
    return rounds


@pytest.mark.contest(contestants=[*ATTENTION, PLAIN], cpu=CPU_TOKENS, cuda=CUDA_TOKENS)
def test_attention_forward_backward(case, device, enter):
    """Forward: qkv is read and the output written, in two products. Backward: qkv and the gradient of the output are
    read and that of qkv is written, in four products; the scores, which could be kept, are not counted again."""
    enter(
        "attention, forward and backward",
        partial(attention_rounds, case, device, attention_contest, True),
        facts=case.facts(rows=4 + 7, products=2 + 4),
        tolerance=TOLERANCE[case.dtype],
    )


ROWLESS = f"{OURS}, no row"
EAGER_ROW = "SDPA + eager row"
WITH_ROW = [OURS, ROWLESS, *(f"{name} + row" for name in ATTENTION[1:]), EAGER_ROW, "all rows"]


def class_rows(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Each head's softmax row of one query: (B, H, D) and (B, N, H, D) -> (B, N, H) float32. Compiled, this reads the
    keys once."""
    scores = (q[:, None].float() * k.float()).sum(-1) * scale
    return (scores if mask is None else scores + mask[..., None]).softmax(1)


def packed_class_rows(q: Tensor, k: Tensor, document: Tensor, slots: Tensor, places: Tensor, scale: float) -> Tensor:
    """The same of packed keys, (B, H, D) and (T, H, D) -> (T, H): only the scores are padded, to those of `places`."""
    scores = (q[document].float() * k.float()).sum(-1) * scale  # (T, H)
    padded = torch.full_like(places, -torch.inf).index_copy(0, slots, scores)  # (B * N, H)
    return padded.unflatten(0, (len(q), -1)).softmax(1).flatten(0, 1).index_select(0, slots)


def class_rows_by_product(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`class_rows` as one would write it, by a matrix product, which copies the keys first."""
    scores = (q[:, :, None] @ k.permute(0, 2, 3, 1))[:, :, 0].float() * scale  # (B, H, N)
    return (scores if mask is None else scores + mask[:, None]).softmax(-1).transpose(1, 2)


def class_row_forms(case: Tokens, sequences: Sequences, qkv: Tensor) -> dict[str, Form | str]:
    """Ours with the row and without, and the others with the row beside them, in plain torch, compiled on a GPU. A row
    is handed back as (T, H) or (B, N, H)."""
    mask, scale = sequences.mask(case.dtype), case.head_dim**-0.5
    document = sequence_of_tokens(sequences.cu_seqlens, sequences.tokens)
    places = torch.empty(sequences.batch * sequences.longest, case.heads, device=qkv.device)
    fuse = partial(compiled, dynamic=True) if qkv.is_cuda else lambda function: function

    def ours(qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, row = kernels.attention(qkv, sequences.cu_seqlens, sequences.longest, return_class_attention=True)
        return out, row.transpose(0, 1)

    @torch.no_grad()
    def padded_row(qkv: Tensor, rows: Callable = class_rows) -> Tensor:
        return rows(qkv[:, 0, 0], qkv[:, :, 1], mask, scale)

    @torch.no_grad()
    def packed_row(qkv: Tensor) -> Tensor:
        if not sequences.ragged:
            return padded_row(sequences.padded(qkv), fuse(class_rows)).flatten(0, 1)
        first = sequences.cu_seqlens[:-1].long()
        return fuse(packed_class_rows)(qkv[first, 0], qkv[:, 1], document, sequences.slots, places, scale)

    def eager(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return out.transpose(1, 2).contiguous(), padded_row(qkv, class_rows_by_product)

    def all_rows(qkv: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * scale
        weights = (scores if mask is None else scores + mask[:, None, None]).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), weights[:, :, 0].float().transpose(1, 2)

    forms: dict[str, Form | str] = {OURS: Form(ours)}
    row = ours(qkv)[1]  # of before, for ours without it: nothing else differs
    for name, form in attention_forms(case, sequences).items():
        if name == OURS:
            forms[ROWLESS] = Form(lambda qkv, attend=form.attend: (attend(qkv), row))
        elif isinstance(form, str):
            forms[f"{name} + row"] = form
        else:
            beside = partial(padded_row, rows=fuse(class_rows)) if form.padded else packed_row
            attend = partial(lambda attend, beside, qkv: (attend(qkv), beside(qkv)), form.attend, beside)
            forms[f"{name} + row"] = Form(attend, form.padded)
    return forms | {EAGER_ROW: Form(eager, padded=True), "all rows": Form(all_rows, padded=True)}


@pytest.mark.contest(contestants=WITH_ROW, cpu=CPU_TOKENS, cuda=CUDA_TOKENS)
def test_attention_with_class_row_forward(case, device, enter):
    """The class token's attention to all tokens too, of each head, in float32."""
    enter(
        "attention with the class row, forward",
        partial(attention_rounds, case, device, class_row_forms, False),
        facts=case.facts(rows=4, products=2, attention=True),
        tolerance=TOLERANCE[case.dtype],
    )


@pytest.mark.contest(contestants=WITH_ROW, cpu=CPU_TOKENS, cuda=CUDA_TOKENS_OF_ONE_BATCH)
def test_attention_with_class_row_forward_backward(case, device, enter):
    enter(
        "attention with the class row, forward and backward",
        partial(attention_rounds, case, device, class_row_forms, True),
        facts=case.facts(rows=4 + 7, products=2 + 4, attention=True),
        tolerance=TOLERANCE[case.dtype],
    )


def distinct_attention(batch: int, heads: int, patches: int, device: torch.device) -> Tensor:
    """Attention in float32 whose means over the heads are exact and all different within an image. So the selection
    depends neither on how a contestant rounds nor on how it breaks ties."""
    importance = 64 * (1 + torch.rand(batch, patches, device=device).argsort(1))
    apart = torch.arange(1 - heads, heads, 2, device=device)[:, None, None]  # (H, 1, 1), their sum is 0
    return (importance + apart * torch.randint(0, 4, (batch, patches), device=device)) / 2**14


@dataclass(frozen=True)
class Candidates:
    """Patches to choose from, in a ViT of a width with heads of 64. If `patches` is None, they are a ragged mix. `kept`
    of them stay, or if that is None as many as hold MASS."""

    batch: int
    patches: int | None
    kept: int | None
    width: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        patches = f"{SHORTEST - 1} to {LONGEST - 1}" if self.patches is None else self.patches
        kept = f"{MASS} of the mass" if self.kept is None else self.kept
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x {kept} of {patches} patches, {self.heads} heads, {self.width} wide, {dtype}"

    @property
    def heads(self) -> int:
        return self.width // 64

    @property
    def lengths(self) -> list[int]:
        """The lengths of the sequences, with their class tokens."""
        return drawn_lengths(self.batch) if self.patches is None else [1 + self.patches] * self.batch

    def facts(self) -> dict[str, float]:
        """The numbers of the group, and its floor: the attention is read, and the tokens that stay are read and written
        with their int32 positions. There is no floor for a selection by mass, whose size is not known before."""
        facts = {"length": sum(self.lengths) / self.batch - 1, "ragged": self.patches is None}
        if self.kept is None:
            return facts
        read, kept = 4 * self.heads * self.batch * self.patches, self.batch * (1 + self.kept)
        return facts | {"floor_bytes": read + kept * (2 * self.width * self.dtype.itemsize + 4), "floor_flops": 0}


MASS = 0.7
STAGES = ((196, 137), (137, 95), (95, 66), (66, 46))
SELECTION = [OURS, "torch", "torch.compile"]
WIDTHS, BATCHES = (192, 384, 768), (32, 128, 512)


def top_k(attention: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select in plain torch: from (B, H, N) and (B, 1 + N, C), the tokens (B, 1 + K, C) that stay and their indices."""
    kept = attention.mean(1).topk(k, dim=1).indices.sort(dim=1).values
    rows = F.pad(kept + 1, (1, 0))
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1])), kept


@pytest.mark.contest(
    contestants=SELECTION,
    cpu=[Candidates(8, 196, 137, 192, torch.float32), Candidates(8, 66, 46, 192, torch.float32)],
    cuda=[Candidates(batch, n, k, width) for width in WIDTHS for n, k in STAGES for batch in BATCHES],
)
def test_selection(case, device, enter):
    """Class attention of each head -> the most important patches in order, and their tokens behind the class token."""

    def contestants():
        # As attention leaves it: a head's row holds the tokens of all images, class tokens among them.
        attention = distinct_attention(case.batch, case.heads, 1 + case.patches, device).transpose(0, 1)[:, :, 1:]
        values = torch.randn(case.batch, 1 + case.patches, case.width, device=device, dtype=case.dtype)

        def ours():
            kept, positions, *_ = kernels.select_tokens(attention, values, k=case.kept, num_prefix_tokens=1)
            return kept.view(case.batch, 1 + case.kept, -1), positions.view(case.batch, -1)[:, 1:]

        fused: Callable | str = GPU_ONLY
        if device.type == "cuda":
            for tensor in (attention, values):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            fused = partial(compiled(top_k), attention, values, case.kept)
        return {OURS: ours, "torch": partial(top_k, attention, values, case.kept), "torch.compile": fused}

    enter("selection", contestants, facts=case.facts(), tolerance=0)


def top_mass(attention: Tensor, values: Tensor, slots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Select by mass in plain torch: from (H, T) and (T, C), the packed tokens that stay and their rows. Class tokens
    come first in each sequence. `places` (B, N) is zero, and token t takes the place slots[t] in it."""
    importance = places.flatten().index_copy(0, slots, attention.mean(0)).view_as(places)[:, 1:]
    highest, order = importance.sort(1, descending=True)
    before = highest.double().cumsum(1) - highest
    stays = before < MASS * highest.double().sum(1, keepdim=True)
    stays = torch.zeros_like(stays).scatter(1, order, stays)
    rows = F.pad(stays, (1, 0), value=True).flatten()[slots].nonzero()[:, 0]
    return values.index_select(0, rows), rows


@pytest.mark.contest(
    contestants=SELECTION,
    cpu=[Candidates(8, 196, None, 192, torch.float32), Candidates(8, None, None, 192, torch.float32)],
    cuda=[Candidates(batch, n, None, width) for n in (196, None) for width in WIDTHS for batch in BATCHES],
)
def test_selection_by_mass(case, device, enter):
    """As many of the most important patches as hold a share of the attention: a ragged result, for whose size the host
    has to wait, whoever computes it. Not one of these can be a CUDA graph."""

    def contestants():
        sequences = Sequences(case.lengths, device)
        attention = distinct_attention(case.batch, case.heads, sequences.longest, device)
        attention = attention.flatten(1)[:, sequences.slots]  # (H, T)
        values = torch.randn(sequences.tokens, case.width, device=device, dtype=case.dtype)
        first = sequences.cu_seqlens[:-1].long()
        places = torch.zeros(sequences.batch, sequences.longest, device=device)

        def ours():
            kept, positions, *_ = kernels.select_tokens(
                attention, values, mass=MASS, num_prefix_tokens=1,
                cu_seqlens=sequences.cu_seqlens, max_seqlen=sequences.longest,
            )  # fmt: skip
            return kept, positions

        def comparable(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            image = torch.bucketize(rows, first, right=True) - 1
            return values, (rows - first[image] - 1).int()

        inputs = attention, values, sequences.slots, places
        # Not compiled as a whole: how many rows stay is unknown to a compiler.
        fused = torch.compile(top_mass, dynamic=True) if device.type == "cuda" else None
        return {
            OURS: ours,
            "torch": Round(partial(top_mass, *inputs), comparable),
            "torch.compile": Round(partial(fused, *inputs), comparable) if fused else GPU_ONLY,
        }

    enter("selection by mass", contestants, facts=case.facts(), tolerance=0)


@dataclass(frozen=True)
class Kept:
    """Kept patches of 16 x 16 pixels of 224 x 224 images; where `kept` is None a ragged mix."""

    batch: int
    kept: int | None

    def __str__(self) -> str:
        return f"{self.batch} x {f'{SHORTEST - 1} to {LONGEST - 1}' if self.kept is None else self.kept} of 196 patches"

    @property
    def counts(self) -> list[int]:
        return [n - 1 for n in drawn_lengths(self.batch)] if self.kept is None else [self.kept] * self.batch

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random positions (T,) of the kept patches, and their cumulative numbers (B + 1,), both int32."""
        positions = [torch.randperm(196)[:count].sort().values for count in self.counts]
        cu_seqlens = torch.tensor([0, *self.counts]).cumsum(0)
        return torch.cat(positions).to(device, torch.int32), cu_seqlens.to(device, torch.int32)

    def facts(self, backward: bool) -> dict[str, float]:
        """Kept pixels are read and written; backward their gradients are read and those of all pixels written."""
        kept, all_pixels = 768 * sum(self.counts), 3 * 224 * 224 * self.batch
        return self._facts(4 * (2 * kept + backward * (kept + all_pixels)))

    def facts_of_step(self) -> dict[str, float]:
        """Kept pixels and their two moments are read and written, and their bfloat16 gradient is read."""
        return self._facts((6 * 4 + 2) * 768 * sum(self.counts))

    def _facts(self, moved: int) -> dict[str, float]:
        length, ragged = sum(self.counts) / self.batch, self.kept is None
        return {"length": length, "ragged": ragged, "floor_bytes": moved, "floor_flops": 0}


VIEW = (-21, 10, 1)  # dy, dx, flip
COUNTS = (196, 137, 95, 66, 46, None)
KEPT = {
    "cpu": [Kept(8, 196), Kept(8, 46), Kept(8, None)],
    "cuda": [Kept(batch, kept) for kept in COUNTS for batch in BATCHES],
}
PATCHES = [OURS, PLAIN, "torch", "torch, reshaped", "torch.compile"]


def viewed_patches(images: Tensor, positions: Tensor, image: Tensor, view: Tensor, reshape: bool = False) -> Tensor:
    """(B, 3, 224, 224) -> the patches (T, 768) at positions (T,) of images (T,) as seen through VIEW, in plain torch:
    by unfold, or by reshaping, which copies less."""
    dy, dx, _ = VIEW
    viewed = images.roll((dy, dx), dims=(2, 3)).flip(3)
    if reshape:
        patches = viewed.unflatten(3, (14, 16)).unflatten(2, (14, 16)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 768)
    else:
        patches = F.unfold(viewed, 16, stride=16).transpose(1, 2).reshape(-1, 768)
    cells = kernels.view_cells(positions, view, (14, 14), (16, 16))
    return patches.index_select(0, image * 196 + cells)


def patches_contest(case: Kept, device: torch.device, backward: bool) -> dict[str, Callable | str]:
    view = torch.tensor(VIEW, dtype=torch.int32, device=device)
    positions, cu_seqlens = case.positions(device)
    image = sequence_of_tokens(cu_seqlens, len(positions))
    images = torch.randn(case.batch, 3, 224, 224, device=device)
    grad = torch.randn(len(positions), 768, device=device) if backward else None

    def ours(images: Tensor, backend: str = "auto") -> Tensor:
        return kernels.gather_patches(images, positions, cu_seqlens, view, patch_size=16, backend=backend)[0]

    def plain(images: Tensor, form: Callable = viewed_patches, **options) -> Tensor:
        return form(images, positions, image, view, **options)

    forms = {OURS: ours, "torch": plain, "torch, reshaped": partial(plain, reshape=True)}
    if device.type == "cuda":
        forms |= {PLAIN: CPU_ONLY, "torch.compile": partial(plain, form=compiled(viewed_patches, dynamic=True))}
    else:
        forms |= {PLAIN: partial(ours, backend="torch"), "torch.compile": GPU_ONLY}
    return {name: form if isinstance(form, str) else pass_of(form, (images,), grad) for name, form in forms.items()}


@pytest.mark.contest(contestants=PATCHES, **KEPT)
def test_patches_forward(case, device, enter):
    rounds = partial(patches_contest, case, device, backward=False)
    enter("patches through a view, forward", rounds, facts=case.facts(backward=False), tolerance=0)


@pytest.mark.contest(contestants=PATCHES, **KEPT)
def test_patches_forward_backward(case, device, enter):
    rounds = partial(patches_contest, case, device, backward=True)
    enter("patches through a view, forward and backward", rounds, facts=case.facts(backward=True), tolerance=0)


STEP = {"lr": 0.25, "eps": 1e-3, "tv_l2": 1e-4}  # with this eps, a tiny gradient's sign moves no pixel by a whole lr


def step_contest(case: Kept, device: torch.device) -> dict[str, Callable | str]:
    """Steps of equal images by equal gradients, which leave the same pixels however many were taken before."""
    view = torch.tensor(VIEW, dtype=torch.int32, device=device)
    positions, cu_seqlens = case.positions(device)
    images, bounds = torch.randn(case.batch, 3, 224, 224, device=device), torch.tensor([[-2.5] * 3, [2.5] * 3])
    lowest, highest = bounds.to(device)
    seen, _, inverse = kernels.gather_patches(images, positions, cu_seqlens, view, patch_size=16, return_inverse=True)
    grad, sites = torch.randn_like(seen, dtype=torch.bfloat16), patch_sites(positions, cu_seqlens, (14, 14))

    def round_of(step: Callable, **settings) -> Callable:
        pixels, moments = images.clone(), images.new_zeros(2, *grad.shape)
        count = torch.zeros(case.batch, dtype=torch.int64, device=device)

        def call() -> tuple[Tensor, Tensor]:
            prior = step(
                pixels, *moments, count, images, grad, sites, lowest, highest, inverse, view, **settings, **STEP
            )
            return pixels, prior

        return call

    ours = partial(round_of, kernels.pixel_step, patch_size=16, betas=(0.5, 0.99))
    rounds = {OURS: ours(), "torch": ours(backend="torch"), "torch.compile": GPU_ONLY}
    if device.type == "cuda":
        step = compiled(pixel_step_reference, dynamic=True)
        rounds["torch.compile"] = round_of(step, ph=16, pw=16, beta1=0.5, beta2=0.99, l2=0.0)
    return rounds


@pytest.mark.contest(
    contestants=[OURS, "torch", "torch.compile"],
    cpu=KEPT["cpu"],
    cuda=[Kept(batch, kept) for kept in (196, 46, None) for batch in BATCHES],
)
def test_pixel_step(case, device, enter):
    """A step of Adam with the gradient of total variation, and the clamp."""
    enter("step of the pixels", partial(step_contest, case, device), facts=case.facts_of_step(), tolerance=1e-3)


def query_rounds(case: Tokens, device: torch.device, backward: bool) -> dict[str, Round | str]:
    """Attention of one query a sequence: q (B, H, D) and kv (T, 2, H, D) -> (B, H, D)."""
    sequences = case.sequences(device)
    cu_seqlens, longest, mask = sequences.cu_seqlens, sequences.longest, sequences.mask(case.dtype)
    mask = None if mask is None else mask[:, None, None]
    one_each = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    q, kv = case.randn(case.batch, device=device), case.randn(sequences.tokens, 2, device=device)
    grad = torch.randn_like(q) if backward else None

    def ours(q: Tensor, kv: Tensor) -> Tensor:
        return kernels.class_attention(q, kv, cu_seqlens, longest)

    def sdpa(backend: SDPBackend, q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q[:, :, None], k, v, mask)[:, :, 0]

    def varlen(q: Tensor, kv: Tensor) -> Tensor:
        return varlen_attn(q, *kv.unbind(1), one_each, cu_seqlens, 1, longest)

    def comparable(out: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return out, *grads[:1], *map(sequences.packed, grads[1:])

    rounds: dict[str, Round | str] = {OURS: Round(pass_of(ours, (q, kv), grad))}
    padded = q, sequences.padded(kv)
    rounds |= {name: Round(pass_of(partial(sdpa, backend), padded, grad), comparable) for name, backend in SDPA.items()}
    if device.type != "cuda":
        return rounds | {"varlen": "runs on a GPU only"}
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return rounds | {"varlen": "not installed"}
    return rounds | {"varlen": Round(pass_of(varlen, (q, kv), grad))}


QUERY = [OURS, *SDPA, "varlen"]


@pytest.mark.contest(contestants=QUERY, cpu=CPU_TOKENS, cuda=CUDA_TOKENS_OF_ONE_BATCH)
def test_class_query_forward(case, device, enter):
    """What the last block of a classifier needs: the class token's output alone."""
    enter(
        "attention of one query, forward",
        partial(query_rounds, case, device, backward=False),
        facts=case.facts(rows=2, queries=2, products=2),
        tolerance=TOLERANCE[case.dtype],
    )


@pytest.mark.contest(contestants=QUERY, cpu=CPU_TOKENS, cuda=CUDA_TOKENS_OF_ONE_BATCH)
def test_class_query_forward_backward(case, device, enter):
    enter(
        "attention of one query, forward and backward",
        partial(query_rounds, case, device, backward=True),
        facts=case.facts(rows=2 + 4, queries=2 + 3, products=2 + 4),
        tolerance=TOLERANCE[case.dtype],
    )


@pytest.mark.contest(contestants=[*ATTENTION, PLAIN], cpu=CPU_TOKENS, cuda=CUDA_TOKENS)
def test_attention_forward(case, device, enter):
    enter(
        "attention, forward",
        partial(attention_rounds, case, device, attention_contest, False),
        facts=case.facts(rows=4, products=2),
        tolerance=TOLERANCE[case.dtype],
    )


@dataclass(frozen=True)
class Rows:
    """Tokens of a ViT, and the dtype of what its products leave. The residual stream is float32."""

    batch: int
    tokens: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens} tokens, {self.width} wide, {str(self.dtype).removeprefix('torch.')}"

    def randn(self, device: torch.device) -> Tensor:
        return torch.randn(self.batch, self.tokens, self.width, device=device)

    def facts(self, halves: int, stream: int, operations: int) -> dict[str, float]:
        """The numbers of the group, and its floor: how many elements of `dtype` and of the float32 stream have to move
        for each channel of a token, and how many operations are computed."""
        return self._facts(self.tokens * (halves * self.dtype.itemsize + 4 * stream), self.tokens * operations)

    def facts_of_embedding(self, backward: bool) -> dict[str, float]:
        """Patches are read in `dtype`, and tokens are written in float32. Backward: the gradient of the patches' tokens
        is read, and that of the patches is written. Position embeddings, which all images share, are not counted."""
        patches = (self.tokens - 1) * self.dtype.itemsize
        moved = patches + 4 * self.tokens + backward * (4 * (self.tokens - 1) + patches)
        return self._facts(moved, self.tokens)

    def _facts(self, moved: int, operations: int) -> dict[str, float]:
        """Facts of bytes and operations for each channel of an image."""
        channels = self.batch * self.width
        facts = {"floor_bytes": channels * moved, "floor_flops": channels * operations}
        return {"length": self.tokens, "ragged": False, **facts}


def row_cases(widths: Sequence[int]) -> dict[str, list[Rows]]:
    """The streams of ViTs of these widths, dense and thinned."""
    return {
        "cpu": [Rows(8, 47, widths[0], dtype) for dtype in (torch.float32, torch.bfloat16)],
        "cuda": [Rows(batch, tokens, width) for width in widths for batch in (8, 128) for tokens in (47, 197)],
    }


ELEMENTWISE = [OURS, "torch", "torch.compile"]


def elementwise_rounds(
    ours: Callable, plain: Callable, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...] | None
) -> dict[str, Callable | str]:
    """Rounds of ours, eager torch and on a GPU compiled torch: the outputs, and with `grads` the inputs' gradients."""
    forms = {OURS: ours, "torch": plain, "torch.compile": GPU_ONLY}
    if inputs[0].is_cuda:
        forms["torch.compile"] = compiled(plain, dynamic=True)

    def both(form: Callable, *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = form(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    def round_of(form: Callable) -> Callable:
        if grads is None:
            return partial(forward, form, *inputs)
        return partial(both, form, *(x.detach().requires_grad_() for x in inputs))

    return {name: form if isinstance(form, str) else round_of(form) for name, form in forms.items()}


def norm_rounds(case: Rows, device: torch.device, backward: bool) -> dict[str, Callable | str]:
    weight, bias = torch.randn(2, case.width, device=device)
    inputs = case.randn(device), case.randn(device).to(case.dtype)
    grads = (case.randn(device), case.randn(device).to(case.dtype)) if backward else None

    def ours(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.residual_norm(x, weight, bias, 1e-6, update=update, dtype=case.dtype)

    def plain(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        x = x + update
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6).to(case.dtype)

    return elementwise_rounds(ours, plain, inputs, grads)


def gelu_rounds(case: Rows, device: torch.device, backward: bool) -> dict[str, Callable | str]:
    bias = torch.randn(case.width, device=device).to(case.dtype)
    inputs = (case.randn(device).to(case.dtype),)
    grads = (case.randn(device).to(case.dtype),) if backward else None

    def ours(x: Tensor) -> Tensor:
        return kernels.bias_gelu(x, bias)

    def plain(x: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return elementwise_rounds(ours, plain, inputs, grads)


@pytest.mark.contest(contestants=ELEMENTWISE, **row_cases((192, 384, 768)))
def test_residual_norm_forward(case, device, enter):
    """The update is read and the rows are written in half precision, the stream is read and written in float32."""
    rounds = partial(norm_rounds, case, device, backward=False)
    facts = case.facts(halves=2, stream=2, operations=9)
    enter("residual sum and LayerNorm, forward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ELEMENTWISE, **row_cases((192, 384, 768)))
def test_residual_norm_forward_backward(case, device, enter):
    """Backward: the stream and the gradients of both results are read, those of the stream and the update written."""
    rounds = partial(norm_rounds, case, device, backward=True)
    facts = case.facts(halves=2 + 2, stream=2 + 3, operations=9 + 13)
    enter("residual sum and LayerNorm, forward and backward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ELEMENTWISE, **row_cases((768, 1536, 3072)))
def test_bias_gelu_forward(case, device, enter):
    rounds = partial(gelu_rounds, case, device, backward=False)
    facts = case.facts(halves=2, stream=0, operations=20)
    enter("bias and GELU, forward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ELEMENTWISE, **row_cases((768, 1536, 3072)))
def test_bias_gelu_forward_backward(case, device, enter):
    """Backward: the input and the gradient of the result are read, and that of the input is written."""
    rounds = partial(gelu_rounds, case, device, backward=True)
    facts = case.facts(halves=2 + 3, stream=0, operations=20 + 30)
    enter("bias and GELU, forward and backward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


def embedding_rounds(case: Rows, device: torch.device, backward: bool) -> dict[str, Callable | str]:
    """Patches (T, C) -> tokens (T + B, C), each sequence behind its class token."""
    positions, cu_seqlens = Kept(case.batch, case.tokens - 1).positions(device)
    class_token, pos_embed = torch.randn(1, case.width, device=device), torch.randn(197, case.width, device=device)
    inputs = (torch.randn(len(positions), case.width, device=device).to(case.dtype),)
    grads = (case.randn(device).flatten(0, 1),) if backward else None

    def ours(x: Tensor) -> Tensor:
        return kernels.embed_tokens(x, positions, cu_seqlens, case.tokens - 1, class_token, pos_embed)[0]

    def plain(x: Tensor) -> Tensor:
        x = (x + pos_embed[1:].index_select(0, positions)).unflatten(0, (len(cu_seqlens) - 1, -1))
        return torch.cat(((class_token + pos_embed[:1]).expand(len(x), 1, -1), x), 1).flatten(0, 1)

    return elementwise_rounds(ours, plain, inputs, grads)


@pytest.mark.contest(contestants=ELEMENTWISE, **row_cases((192, 384, 768)))
def test_embed_tokens_forward(case, device, enter):
    rounds, facts = partial(embedding_rounds, case, device, backward=False), case.facts_of_embedding(backward=False)
    enter("embedding of tokens, forward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ELEMENTWISE, **row_cases((192, 384, 768)))
def test_embed_tokens_forward_backward(case, device, enter):
    rounds, facts = partial(embedding_rounds, case, device, backward=True), case.facts_of_embedding(backward=True)
    enter("embedding of tokens, forward and backward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@dataclass(frozen=True)
class Logits:
    """The logits of a batch of images."""

    batch: int
    classes: int = 1000
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.batch} x {self.classes} classes, {str(self.dtype).removeprefix('torch.')}"

    def facts(self, backward: bool) -> dict[str, float]:
        """Logits and int64 targets are read, and backward read again; the gradient of the logits is written."""
        elements, reads = self.batch * self.classes, 1 + backward
        moved = (reads + backward) * elements * self.dtype.itemsize + 8 * reads * self.batch
        facts = {"floor_bytes": moved, "floor_flops": (4 + 4 * backward) * elements}
        return {"length": self.classes, "ragged": False, **facts}


def entropy_rounds(case: Logits, device: torch.device, backward: bool) -> dict[str, Callable | str]:
    targets = torch.randint(case.classes, (case.batch,), device=device)
    inputs = (torch.randn(case.batch, case.classes, device=device).to(case.dtype),)
    grads = (torch.ones((), device=device),) if backward else None

    def ours(x: Tensor) -> Tensor:
        return kernels.cross_entropy(x, targets)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), targets)

    return elementwise_rounds(ours, plain, inputs, grads)


LOGITS = {
    "cpu": [Logits(8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)],
    "cuda": [Logits(batch) for batch in (8, 128, 512)],
}


@pytest.mark.contest(contestants=ELEMENTWISE, **LOGITS)
def test_cross_entropy_forward(case, device, enter):
    rounds, facts = partial(entropy_rounds, case, device, backward=False), case.facts(backward=False)
    enter("cross-entropy, forward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ELEMENTWISE, **LOGITS)
def test_cross_entropy_forward_backward(case, device, enter):
    rounds, facts = partial(entropy_rounds, case, device, backward=True), case.facts(backward=True)
    enter("cross-entropy, forward and backward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


def similarity_rounds(case: Tokens, device: torch.device, backward: bool) -> dict[str, Callable | str]:
    """Attention outputs (T, H, D), each sequence with its class token -> entropies (B,)."""
    sequences = case.sequences(device)
    cu_seqlens, longest, tokens = sequences.cu_seqlens, sequences.longest, sequences.tokens
    first = torch.arange(tokens, device=device) == cu_seqlens[sequence_of_tokens(cu_seqlens, tokens)]
    positions = torch.where(first, -1, 0).int()
    inputs = ((case.randn(tokens, device=device) + torch.randn(case.head_dim, device=device)).to(case.dtype),)
    grads = (torch.ones(case.batch, device=device),) if backward else None

    def ours(x: Tensor) -> Tensor:
        return kernels.patch_entropy(x, positions, cu_seqlens, longest)

    def plain(x: Tensor) -> Tensor:
        return patch_entropy_reference(x, positions, cu_seqlens, longest, 0.01, 10, True)

    return elementwise_rounds(ours, plain, inputs, grads)


def facts_of_similarities(case: Tokens, backward: bool) -> dict[str, float]:
    """x is read, and backward read again and its gradient written. Each unordered pair of tokens has a product of D
    channels, in the backward pass once more and two for the gradient."""
    pairs = sum(length**2 for length in case.lengths) / 2
    facts = case.facts(rows=3 if backward else 1, products=1)
    return facts | {"floor_flops": 2 * pairs * case.head_dim * (4 if backward else 1)}


SIMILARITIES = {
    "cpu": [Tokens(8, 197, 3, dtype=torch.float32), Tokens(8, 47, 3, dtype=torch.float32)],
    "cuda": [Tokens(b, n, h) for h in (3, 12) for b in (32, 128) for n in (47, 197)],
}


@pytest.mark.contest(contestants=ELEMENTWISE, **SIMILARITIES)
def test_patch_entropy_forward(case, device, enter):
    rounds, facts = partial(similarity_rounds, case, device, backward=False), facts_of_similarities(case, False)
    enter("patch entropy, forward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])


@pytest.mark.contest(contestants=ELEMENTWISE, **SIMILARITIES)
def test_patch_entropy_forward_backward(case, device, enter):
    rounds, facts = partial(similarity_rounds, case, device, backward=True), facts_of_similarities(case, True)
    enter("patch entropy, forward and backward", rounds, facts=facts, tolerance=TOLERANCE[case.dtype])
