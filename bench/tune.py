"""Write the dispatch table, kernels/dispatch.json: python bench/tune.py [--arch sm_90,...] [--processes N]

On a GPU, this times every candidate that compiles without a fault and enters the fastest one for the GPU's own
architecture. It begins with what is used most, and begins no further operation after --seconds. The candidates of an
operation are compiled by parallel processes before they are timed. With --results every time is written when it is
taken, and a later run with the same file goes on from there. For the architectures named with --arch no GPU is needed:
the candidates are compiled, and of those without a fault the one is entered that a count of operations and bytes ranks
first. All other rows stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from duel import CALLS, answers, captured, on_device
from journal import DEAD, STOPPED, Journal, source, write_whole
from launches import launches
from resources import job, usages
from smi_fast.kernels import dispatch
from smi_fast.kernels.attention import launch_attention, launch_attention_backward, needs_statistics
from smi_fast.kernels.backend import Launch, recording
from smi_fast.kernels.class_attention import launch_class_attention, launch_class_attention_backward
from smi_fast.kernels.cross_entropy import launch_cross_entropy, launch_cross_entropy_backward
from smi_fast.kernels.dispatch import choice_of, override
from smi_fast.kernels.embedding import launch_embed_tokens, launch_embed_tokens_backward
from smi_fast.kernels.mlp import launch_bias_gelu, launch_bias_gelu_backward
from smi_fast.kernels.norm import launch_residual_norm, launch_residual_norm_backward
from smi_fast.kernels.patch_entropy import launch_patch_entropy, launch_patch_entropy_backward
from smi_fast.kernels.patches import launch_gather_patches, launch_gather_patches_backward
from smi_fast.kernels.pixels import launch_pixel_step, patch_sites
from smi_fast.kernels.rows import uniform_lengths
from smi_fast.kernels.selection import launch_select, launch_select_backward

DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
KINDS = [
    {"dtype": dtype, "head_dim": head_dim} for dtype in DTYPES for head_dim in (64, 32, 128, 16)
]  # most used first
# The sizes that rows go up to, each with the size that is measured for it. Tokens are those of a 224 x 224 image that
# is thinned in four steps, and 577 of a 384 x 384 image.
TOKENS = {16: 16, 32: 32, 64: 47, 80: 67, 96: 96, 128: 128, 160: 138, 208: 197, 256: 256, 4096: 577}
CANDIDATES = {32: 32, 64: 64, 128: 95, 256: 196, 512: 324, 1024: 576, 2048: 1369, 4096: 4096}
ACCESSES = {2**31 - 1: 48}  # how many accesses of 16 bytes a row of channels takes
PATCHES = {192: (3, 8, 8), 256: (1, 16, 16), 640: (3, 14, 14), 768: (3, 16, 16), 2**31 - 1: (3, 32, 32)}
PIXELS = {2**31 - 1: (3, 16, 16)}
WIDTHS = {256: 192, 512: 384, 1024: 768, 2048: 1408, 4096: 3072}  # channels of a row that one program computes
HEAD_DIMS = {64: 64, 128: 128}  # channels of a patch, on average over heads
HIDDEN = {2**31 - 1: 1536}  # channels between the products of an MLP
OPERATIONS = {
    "attention_forward": TOKENS,
    "attention_backward": TOKENS,
    "class_attention_forward": TOKENS,
    "class_attention_backward": TOKENS,
    "select_tokens": CANDIDATES,
    "select_tokens_backward": ACCESSES,
    "gather_patches": PATCHES,
    "gather_patches_backward": PATCHES,
    "residual_norm": WIDTHS,
    "residual_norm_backward": WIDTHS,
    "embed_tokens": WIDTHS,
    "embed_tokens_backward": WIDTHS,
    "cross_entropy": WIDTHS,
    "cross_entropy_backward": WIDTHS,
    "patch_entropy": HEAD_DIMS,
    "patch_entropy_backward": HEAD_DIMS,
    "bias_gelu": HIDDEN,
    "bias_gelu_backward": HIDDEN,
    "prior_sums": PIXELS,
    "pixel_step": PIXELS,
}
ATTENTION = [operation for operation, sizes in OPERATIONS.items() if sizes is TOKENS]
BATCH, HEADS, CHANNELS, ROUNDS = 128, 6, 384, 15

Row = dict[str, Any]
Table = dict[str, dict[str, Any]]


def candidates(operation: str, purpose: Row) -> Iterator[Row]:
    """The forms and constants of an operation that are worth trying for a row. The first one has the fewest
    instructions, which decides where `estimate` does not rank them."""
    size, half = purpose["up_to"], purpose.get("dtype") == "half"
    holding = max(16, 1 << (size - 1).bit_length())  # the least tile that holds a sequence
    if operation == "select_tokens":
        # 16 candidates a thread, so that one warp sums up to 512 without waiting for another.
        BN, least = max(32, holding), max(1, holding // 512)
        for num_warps in (least, 2 * least, 4 * least):
            yield from ({"BN": BN, "BR": 32 * num_warps, "BC": BC, "num_warps": num_warps} for BC in (16, 8))
        return
    if operation == "select_tokens_backward":
        # No thread idles where a row is a multiple of 128 bytes.
        for BR, BC, num_warps in ((64, 8, 4), (32, 8, 4), (32, 16, 4), (16, 8, 4), (64, 16, 8)):
            yield {"BR": BR, "BC": BC, "num_warps": num_warps}
        return
    if OPERATIONS[operation] is WIDTHS:
        least = max(1, size // 512)  # 16 channels a thread, so that one warp sums up to 512 without waiting for another
        yield from ({"BC": size, "num_warps": num_warps} for num_warps in (least, 2 * least, 4 * least))
        return
    if OPERATIONS[operation] is HEAD_DIMS:
        shapes = ((32, 4), (32, 8), (16, 4), (64, 8))
        yield from ({"BN": BN, "num_warps": num_warps} for BN, num_warps in shapes if BN * size <= 512 * num_warps)
        return
    if operation.startswith("bias_gelu"):
        yield from ({"BE": BE, "num_warps": num_warps} for BE, num_warps in ((1024, 4), (2048, 4), (2048, 8), (512, 2)))
        return
    if operation.startswith("gather_patches"):
        elements = math.prod(PATCHES[size])
        BE = min((256, 128, 64), key=lambda block: math.ceil(elements / block) * block)  # the last as full as can be
        for tile, num_warps in ((2048, 4), (1024, 4), (4096, 8), (4096, 4), (1024, 2)):
            yield {"BT": tile // BE, "BE": BE, "num_warps": num_warps}
        return
    if operation == "prior_sums":
        for BT, PER_SM, num_warps in ((8, 2, 32), (4, 4, 16), (2, 8, 8)):
            yield {"BT": BT, "BE": 128, "PER_SM": PER_SM, "num_warps": num_warps}
        return
    if operation == "pixel_step":
        for BT, PER_SM, num_warps in ((2, 5, 8), (1, 10, 4), (2, 10, 4), (4, 2, 16), (4, 5, 8)):
            yield {"BT": BT, "BE": 128, "PER_SM": PER_SM, "num_warps": num_warps}
        return
    if operation.startswith("class_attention"):
        yield from ({"BN": BN, "num_warps": warps} for BN in (32, 64, 128, 256) for warps in (2, 4, 8))
        return
    for BN in {holding, 64} if half else {holding}:
        if holding <= BN <= 128:
            yield from ({"form": "tile", "BN": BN, "num_warps": warps} for warps in (2, 4, 8))
    if half and holding <= 64:
        return  # several programs or steps would only be slower here
    shapes = ((16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 64)) if half else ((16, 16), (32, 32), (64, 32))
    blocks = [
        {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}
        for BM, BN in shapes
        for warps in (4, 8)
        for stages in ((1, 2, 3) if half else (1,))
    ]
    if operation == "attention_forward":
        yield from ({"form": "blocks", **tiles} for tiles in blocks)
        return
    if 64 < holding <= 256 and half:
        for BN in (32, 64):
            for warps in (8, 16):
                tiles = {"BM": holding, "BN": BN, "num_warps": warps, "num_stages": 1}
                yield {"form": "rows", **tiles, "CHANNELS_FIRST": BN < 64}
    for tiles in blocks:
        yield {"form": "blocks", "dq": tiles, "dkv": {**tiles, "BM": tiles["BN"], "BN": tiles["BM"]}}


def estimate(operation: str, row: Row, occupancy: float) -> float:
    """Estimate how many microseconds a multiprocessor takes for one head and sequence, to rank candidates without a
    GPU. The estimate is 0 for operations other than attention.

    It is the sum of four terms. The operations that the tiles compute run at a rate that 16 resident warps reach, and
    that falls with the root of their number. Bytes move at an H200's bandwidth. Each step of a program waits 1 us for
    what it loads, and resident programs share this time. Each launch takes 2 us, which all heads and sequences share.
    """
    if operation not in ATTENTION:
        return 0.0
    size, head_dim, half = TOKENS[row["up_to"]], row["head_dim"], row["dtype"] == "half"
    parts = []  # of each kernel: products of N x N x D, steps, warps
    counts = (3, 4) if "dq" in row else (5 if "backward" in operation else 2,)
    for tiles, products in zip(kernels_of(row), counts, strict=True):
        BM = tiles.get("BM", tiles["BN"] if row.get("form") == "tile" else 1)
        steps = [math.ceil(size / block) for block in (BM, tiles["BN"])]
        if operation.startswith("class_attention"):
            steps[0] = 1
        area = math.prod(count * block for count, block in zip(steps, (BM, tiles["BN"]), strict=True))
        parts.append((products * area, math.prod(steps), tiles["num_warps"]))
    moved = {"tile": 7, "rows": 8, "blocks": 14}[row["form"]] if operation == "attention_backward" else 4
    rate = (3e6 if half and operation.startswith("attention") else 0.2e6) * min(1.0, occupancy * 64 / 16) ** 0.5
    return (
        sum(2 * products * head_dim / rate for products, _, _ in parts)
        + moved * size * head_dim * (2 if half else 4) / 36e3
        + sum(steps * warps / (occupancy * 64) for _, steps, warps in parts)
        + 2 * len(parts) * 132 / (BATCH * HEADS)
    )


def rows_to_fill(operation: str, kind: Row) -> list[tuple[Row, list[Row]]]:
    """The purpose of each row of an operation, with the candidates for it."""
    result = []
    for size in OPERATIONS[operation]:
        purpose = {"up_to": size, **kind}
        rows = [{**purpose, **candidate} for candidate in candidates(operation, purpose)]
        result.append((purpose, [row for row in rows if operation not in ATTENTION or is_small(row)]))
    return result


def kernels_of(row: Row) -> list[Row]:
    """The constants of each kernel that a row launches."""
    return [row["dq"], row["dkv"]] if "dq" in row else [row]


def is_small(row: Row) -> bool:
    """Whether tiles can lie in registers, and the products of float32, which are unrolled, compile in seconds."""
    for tiles in kernels_of(row):
        threads, BN = 32 * tiles["num_warps"], tiles["BN"]
        BM = tiles.get("BM", BN if row.get("form") == "tile" else 1)  # queries; one in class attention
        unrolled = BM * BN * row["head_dim"] if row["dtype"] == "float32" else 0
        if max(BM * BN, max(BM, BN) * row["head_dim"]) > 128 * threads or unrolled > 2048 * threads:
            return False
    return True


def plainest(operation: str, row: Row) -> list[Launch]:
    return launches(operation, row, plainest=True)


def occupancies(
    arch: str, operation: str, rows: list[Row], processes: int | None, launched: Callable = plainest
) -> list[float]:
    """Compile what `launched(operation, row)` gives for each row. Return the least occupancy among the kernels of each
    row; 0 where one of them has a fault."""
    cases = [launched(operation, row) for row in rows]
    results = iter(usages([job(launch, arch) for case in cases for launch in case], processes))
    uses = [[next(results) for _ in case] for case in cases]
    return [0.0 if any(use.faults() for use in row) else min(use.occupancy for use in row) for row in uses]


def faulty(arch: str, operation: str, rows: list[Row], processes: int | None) -> list[bool]:
    """Whether any kernel that a row can launch has a fault, in any case."""
    cases = [launches(operation, row) for row in rows]
    results = iter(usages([job(launch, arch) for row in cases for launch in row], processes))
    return [any(use.faults() for use in [next(results) for _ in row]) for row in cases]


def merged(rows: list[Row]) -> list[Row]:
    """Merge neighbours that choose the same, in rows that ascend by the size that they go up to."""
    result: list[Row] = []
    for row in rows:
        if result and {**result[-1], "up_to": 0} == {**row, "up_to": 0}:
            result[-1] = row
        else:
            result.append(row)
    return result


def compiled_as(row: Row) -> str:
    """A key for the parts of a row that its machine code depends on."""
    return str({**row, "up_to": 0})


def best(arch: str, operation: str, kind: Row, processes: int | None, seconds: Callable | None) -> list[Row]:
    """The best rows of an operation for a dtype and head dim.

    Args:
        arch: the architecture to compile for.
        kind: the dtype and head dim.
        processes: how many compile at a time; None: one for each CPU.
        seconds: measures (operation, row), infinite for a candidate that fails. Without it, `estimate` ranks the
            candidates. With it, the very launches that it times are compiled first: Triton finds them in its cache.

    Raises:
        RuntimeError: every candidate for a row has a fault.
    """
    wanted = rows_to_fill(operation, kind)
    distinct = {compiled_as(row): row for _, rows in wanted for row in rows}
    launched = timed_launches if seconds else plainest
    compiled = occupancies(arch, operation, list(distinct.values()), processes, launched)
    known = dict(zip(distinct, compiled, strict=True))
    ranked = []
    for _, rows in wanted:
        usable = [row for row in rows if known[compiled_as(row)]]
        costs = [
            seconds(operation, row) if seconds else estimate(operation, row, known[compiled_as(row)]) for row in usable
        ]
        pairs = sorted(zip(costs, usable, strict=True), key=lambda pair: pair[0])
        ranked.append([row for cost, row in pairs if cost < math.inf])
    while all(ranked):
        wrong = faulty(arch, operation, [rows[0] for rows in ranked], processes)
        if not any(wrong):
            return merged([rows[0] for rows in ranked])
        ranked = [rows[is_wrong:] for rows, is_wrong in zip(ranked, wrong, strict=True)]
    raise RuntimeError(f"{arch}: a row of {operation} for {kind} has no candidate without a fault")


def seconds_on_gpu(operation: str, row: Row) -> float:
    """How long an operation takes with the form and constants of a row, behind calls of the same: the loop, too, finds
    in the caches what the kernel before has written. The median of replays of a CUDA graph of several calls."""
    with override({operation: choice_of(row)}):
        replay = captured([call_of(operation, row, torch.device("cuda"))] * CALLS)
    replay()
    return median(on_device(replay) / CALLS for _ in range(ROUNDS))


def timed_launches(operation: str, row: Row) -> list[Launch]:
    """The launches that `seconds_on_gpu` times, on tensors without memory."""
    with override({operation: choice_of(row)}), recording() as launched:
        call = call_of(operation, row, torch.device("meta"))
        launched.clear()  # what prepares the inputs
        call()
    return launched


def call_of(operation: str, row: Row, device: torch.device) -> Callable[[], object]:
    representative = OPERATIONS[operation][row["up_to"]]
    if operation in ATTENTION:
        return attention_call(operation, row, representative, device)
    if operation.startswith("select_tokens"):
        return selection_call(operation, representative, device)
    if operation.startswith("gather_patches"):
        return patches_call(operation, representative, device)
    if operation.startswith("residual_norm"):
        return norm_call(operation, representative, device)
    if operation.startswith("embed_tokens"):
        return embedding_call(operation, representative, device)
    if operation.startswith("cross_entropy"):
        return entropy_call(operation, representative, device)
    if operation.startswith("patch_entropy"):
        return similarity_call(operation, representative, device)
    if operation.startswith("bias_gelu"):
        return gelu_call(operation, representative, device)
    return pixels_call(representative, device)


def attention_call(operation: str, row: Row, size: int, device: torch.device) -> Callable[[], object]:
    head_dim = row["head_dim"]
    qkv = torch.randn(BATCH * size, 3, HEADS, head_dim, device=device, dtype=DTYPES[row["dtype"]])
    problem = uniform_lengths(BATCH, size, device), size, head_dim**-0.5
    q, kv = qkv[::size, 0].contiguous(), qkv[:, 1:].contiguous()
    if operation == "attention_forward":
        return partial(launch_attention, qkv, *problem, True, needs_statistics(qkv, size))
    if operation == "attention_backward":
        out, _, statistics = launch_attention(qkv, *problem, False, True)
        return partial(launch_attention_backward, torch.randn_like(out), qkv, out, statistics, *problem)
    if operation == "class_attention_forward":
        return partial(launch_class_attention, q, kv, *problem)
    out, _, statistics = launch_class_attention(q, kv, *problem)
    return partial(launch_class_attention_backward, torch.randn_like(out), q, kv, statistics, *problem)


def selection_call(operation: str, size: int, device: torch.device) -> Callable[[], object]:
    if operation == "select_tokens_backward":
        size = 196
    kept = max(1, int(0.7 * size))
    attention = torch.rand(BATCH, 1, size, device=device)
    values = torch.randn(BATCH, 1 + size, CHANNELS, device=device, dtype=torch.bfloat16)
    counts = kept, 1, 1 + size, BATCH * (1 + kept)
    call = partial(launch_select, attention, values, None, None, None, None, *counts)
    if operation == "select_tokens":
        return call
    packed, *_, slots = call()
    return partial(launch_select_backward, torch.randn_like(packed), slots)


def norm_call(operation: str, channels: int, device: torch.device) -> Callable[[], object]:
    """Of the tokens of images that are thinned to 46 patches, with LayerScale."""
    x, grad = torch.randn(2, BATCH, 47, channels, device=device)
    update, (gamma, weight, bias) = grad.bfloat16(), torch.randn(3, channels, device=device)
    if operation == "residual_norm":
        return partial(launch_residual_norm, x, update, gamma, weight, bias, 1e-6, torch.bfloat16)
    statistics = torch.ones(BATCH, 47, 2, device=device)
    return partial(
        launch_residual_norm_backward, grad, update, x, statistics, gamma, weight, torch.float32, torch.bfloat16
    )


def embedding_call(operation: str, channels: int, device: torch.device) -> Callable[[], object]:
    """Of images that are thinned to 46 of 196 patches, with a class token."""
    positions = torch.rand(BATCH, 196, device=device).argsort(1)[:, :46].sort(1).values.flatten().int()
    tokens, pos_embed = torch.randn(BATCH * 47, channels, device=device), torch.randn(197, channels, device=device)
    cu_seqlens, patches = uniform_lengths(BATCH, 46, device), tokens[: len(positions)].bfloat16()
    if operation == "embed_tokens":
        return partial(launch_embed_tokens, patches, positions, cu_seqlens, 46, pos_embed[:1], pos_embed, True)
    return partial(launch_embed_tokens_backward, tokens, cu_seqlens, 46, len(positions), 1, torch.bfloat16)


def entropy_call(operation: str, classes: int, device: torch.device) -> Callable[[], object]:
    logits = torch.randn(BATCH, classes, device=device).bfloat16()
    targets = torch.randint(classes, (BATCH,), device=device)
    if operation == "cross_entropy":
        return partial(launch_cross_entropy, logits, targets, "mean")
    statistics = torch.ones(BATCH, 2, device=device)
    return partial(launch_cross_entropy_backward, torch.ones((), device=device), logits, targets, statistics, "mean")


def similarity_call(operation: str, channels: int, device: torch.device) -> Callable[[], object]:
    """Of images that are thinned to 95 patches, with a class token."""
    x = torch.randn(BATCH * 96, HEADS, channels, device=device).bfloat16()
    positions = torch.arange(-1, 95, device=device, dtype=torch.int32).repeat(BATCH)
    packed = x, positions, uniform_lengths(BATCH, 96, device)
    call = partial(launch_patch_entropy, *packed, 96, 0.01, 10, True)
    if operation == "patch_entropy":
        return call
    entropies, *statistics = call()
    return partial(launch_patch_entropy_backward, torch.randn_like(entropies), *packed, *statistics, 96, 0.01)


def gelu_call(operation: str, channels: int, device: torch.device) -> Callable[[], object]:
    x, grad = torch.randn(2, BATCH, 47, channels, device=device).bfloat16()
    bias = torch.randn(channels, device=device)
    if operation == "bias_gelu":
        return partial(launch_bias_gelu, x, bias, "none")
    return partial(launch_bias_gelu_backward, grad, x, bias, "none")


def patches_call(operation: str, patch: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    channels, ph, pw = patch
    images = torch.randn(BATCH, channels, 14 * ph, 14 * pw, device=device)
    positions = torch.rand(BATCH, 196, device=device).argsort(1)[:, :95].sort(1).values.flatten().int()
    view = torch.tensor([ph // 3, -pw, 1], device=device, dtype=torch.int32)
    cu_seqlens = uniform_lengths(BATCH, 95, device)
    call = partial(launch_gather_patches, images, positions, cu_seqlens, view, ph, pw, torch.bfloat16)
    if operation == "gather_patches":
        return call
    out, _, inverse = call()
    grad = torch.randn_like(out)
    return partial(launch_gather_patches_backward, grad, inverse, view, channels, ph, pw, torch.float32)


def pixels_call(patch: tuple[int, int, int], device: torch.device) -> Callable[[], object]:
    """A whole step, which launches both kernels."""
    channels, ph, pw = patch
    images = torch.randn(BATCH, channels, 14 * ph, 14 * pw, device=device)
    positions = torch.rand(BATCH, 196, device=device).argsort(1)[:, :95].sort(1).values.flatten().int()
    view = torch.tensor([ph // 3, -pw, 1], device=device, dtype=torch.int32)
    cu_seqlens = uniform_lengths(BATCH, 95, device)
    grad, _, inverse = launch_gather_patches(images, positions, cu_seqlens, view, ph, pw, torch.bfloat16)
    moments = torch.zeros(2, *grad.shape, device=device)
    steps, highest = torch.zeros(BATCH, dtype=torch.int64, device=device), torch.ones(channels, device=device)
    return partial(
        launch_pixel_step, images.clone(), *moments, steps, images, grad, patch_sites(positions, cu_seqlens, (14, 14)),
        -highest, highest, inverse, view, ph, pw, 0.25, 0.5, 0.99, 1e-8, 1e-4, 0.0,
    )  # fmt: skip


def enter(table: Table, arch: str, operation: str, rows: list[Row]) -> None:
    """Replace the rows for the same dtype and head dim by these."""
    kind = {name: rows[0].get(name) for name in ("dtype", "head_dim")}
    others = [row for row in table[arch].get(operation, []) if {name: row.get(name) for name in kind} != kind]
    table[arch][operation] = sorted(
        others + rows, key=lambda row: [str(row.get(name)) for name in kind] + [row["up_to"]]
    )


def write(table: Table, *paths: Path | None) -> None:
    for path in filter(None, paths):
        write_whole(path, as_json(table))


def in_order() -> Iterator[tuple[str, list[str], Row]]:
    """The groups in which rows are tuned, the most used first: a name, the operations, and the dtype and head dim."""
    yield "all but attention", [name for name in OPERATIONS if name not in ATTENTION], {}
    for kind in KINDS:
        yield f"attention in {kind['dtype']}, head dim {kind['head_dim']}", ATTENTION, kind


class Measured:
    """Times on a GPU, kept in a journal: "timed" has a record for each candidate, "chosen" one for each operation."""

    def __init__(self, journal: Journal):
        self.journal = journal
        self.seconds = {self._key(**record): record["seconds"] for record in journal["timed"]}

    def __call__(self, operation: str, row: Row) -> float:
        """The seconds of a candidate; infinite if it fails. If it breaks the GPU, the process ends."""
        key = self._key(operation, row)
        if key not in self.seconds:
            record: dict[str, Any] = {"operation": operation, "row": row, "seconds": None}
            try:
                record["seconds"] = seconds_on_gpu(operation, row)
            except Exception as error:
                record["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                print(f"{operation}, {row}: {record['failed']}", flush=True)
            self.seconds[key] = record["seconds"]
            self.journal.add(timed=[record])
            if not answers(torch.device("cuda")):
                sys.exit(DEAD)
        return math.inf if self.seconds[key] is None else self.seconds[key]

    @staticmethod
    def _key(operation: str, row: Row, **_) -> str:
        return json.dumps([operation, row])

    def best(self, arch: str, operation: str, kind: Row, processes: int | None) -> list[Row]:
        for record in self.journal["chosen"]:
            if (record["operation"], record["kind"]) == (operation, kind):
                return record["rows"]
        rows = best(arch, operation, kind, processes, self)
        self.journal.add(chosen=[{"operation": operation, "kind": kind, "rows": rows}])
        return rows


def derive(table: Table, arch: str, only: str, processes: int | None) -> None:
    """Choose the rows of an architecture without a GPU."""
    for name, operations, kind in in_order():
        if not only or arch not in table:
            table.setdefault(arch, {})["source"] = "compiler report"
        for operation in [operation for operation in operations if operation.startswith(only)]:
            enter(table, arch, operation, best(arch, operation, kind, processes, None))
            write(table, dispatch.TABLE)
        print(f"{arch}: {name}", flush=True)


def measure(table: Table, arguments: argparse.Namespace) -> None:
    """Choose rows for the GPU of this machine, as many as there is time for."""
    gpu, started = torch.cuda.get_device_name(), time.monotonic()
    arch = dispatch.nearest(*torch.cuda.get_device_capability())
    measured = Measured(Journal(arguments.results, source(gpu, table=False), gpu=gpu))
    done: dict[str, list[str]] = {}
    for name, operations, kind in in_order():
        for operation in operations:
            if not operation.startswith(arguments.only):
                continue
            if time.monotonic() - started > arguments.seconds:
                sys.exit(STOPPED)
            enter(table, arch, operation, measured.best(arch, operation, kind, arguments.processes))
            done.setdefault(name, []).append(operation)
            parts = (f"{name} ({', '.join(chosen)})" for name, chosen in done.items())
            table[arch]["source"] = f"measured on {gpu}: {'; '.join(parts)}"
            write(table, None if arguments.keep else dispatch.TABLE, arguments.copy)
            print(f"{arch}: {name}, {operation}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", help="derive the rows of these architectures from the compiler report")
    parser.add_argument("--processes", type=int, help="how many compile at a time; one for each CPU")
    parser.add_argument("--seconds", type=float, default=480, help="after this time no further operation is measured")
    parser.add_argument("--only", default="", help="choose only for the operations whose names begin so")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="write every time here, and go on from what it has"
    )
    parser.add_argument("--copy", type=Path, metavar="FILE", help="also write the table here")
    parser.add_argument(
        "--keep", action="store_true", help="leave the package's table as it is, and write the copy only"
    )
    arguments = parser.parse_args()
    if not arguments.arch and not torch.cuda.is_available():
        parser.error("without a GPU, name the architectures to derive rows for: --arch sm_80,sm_90")
    table = json.loads(dispatch.TABLE.read_text()) if dispatch.TABLE.exists() else {}
    if not arguments.arch:
        return measure(table, arguments)
    for arch in arguments.arch.split(","):
        derive(table, arch, arguments.only, arguments.processes)


def as_json(table: Table) -> str:
    """The table as text, with one line for each row."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\{\s+\"up_to\"[^{}]*(\{[^{}]*\}[^{}]*)*\}", lambda row: re.sub(r"\s+", " ", row[0]), text) + "\n"


if __name__ == "__main__":
    main()
