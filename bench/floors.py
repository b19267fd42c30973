"""The least time that a kernel or an iteration can take: what it must move and compute, at the rates of a GPU.

    python bench/floors.py "H100 SXM"

prints this for every case of bench_kernels.py and bench_inversion.py that is meant for a GPU. No GPU is needed, and
nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

OURS = "smi-fast"  # the contestant whose floors these are
Ceilings = dict[str, Any]  # "bytes_per_second": a number, "flops_per_second": a number for each dtype
Facts = dict[str, Any]  # of a group: "floor_bytes", "floor_flops", "elementwise_bytes", "dtype", "nodes", ...


def _peaks(terabytes: float, bfloat16: float, float32: float) -> Ceilings:
    rates = {"bfloat16": bfloat16 * 1e12, "float16": bfloat16 * 1e12, "float32": float32 * 1e12}
    return {"bytes_per_second": terabytes * 1e12, "flops_per_second": rates}


class Gpu(NamedTuple):
    name: str
    pattern: str  # matches the names by which CUDA knows the GPU
    peaks: Ceilings


# Terabytes and teraflops a second, as published: dense products with float32 accumulation, and float32 without tensor
# cores. Sources: NVIDIA's data sheets of the H100 (2024), H200 (2024), A100 (2021) and L4 (2023) Tensor Core GPUs, of
# whose sparse bfloat16 figures this is half, and for the RTX 4090 appendix A of "NVIDIA Ada GPU Architecture" (2.01).
GPUS = [
    Gpu("H100 SXM", r"H100( SXM|-SXM| 80GB HBM3)", _peaks(3.35, 989.4, 66.9)),
    Gpu("H200", r"H200", _peaks(4.8, 989.4, 66.9)),
    Gpu("A100 SXM 80GB", r"A100[- ]SXM\S*[- ]80GB", _peaks(2.039, 312, 19.5)),
    Gpu("A100 SXM 40GB", r"A100[- ]SXM\S*[- ]40GB", _peaks(1.555, 312, 19.5)),
    Gpu("RTX 4090", r"RTX 4090$", _peaks(1.008, 165.2, 82.6)),
    Gpu("L4", r"\bL4$", _peaks(0.3, 121, 30.3)),
]


def published(name: str) -> Ceilings | None:
    """The published peaks of a GPU, by CUDA's name for it or by one of GPUS. None if they are not in the table."""
    return next((gpu.peaks for gpu in GPUS if re.search(gpu.pattern, name)), None)


class Floor(NamedTuple):
    seconds: float
    bound: str  # "bytes" or "operations", whichever takes longer


def floor(facts: Facts, ceilings: Ceilings | None) -> Floor | None:
    """The bytes that must move at the bandwidth, or the operations at the rate of products in the dtype of the group,
    whichever takes longer. None if the facts or the rates that they need are unknown."""
    if ceilings is None or "floor_flops" not in facts:
        return None
    dtype = str(facts.get("dtype", "bfloat16")).removeprefix("torch.")
    times = {}
    if facts["floor_flops"]:
        if dtype not in ceilings["flops_per_second"]:
            return None
        times["operations"] = facts["floor_flops"] / ceilings["flops_per_second"][dtype]
    if facts["floor_bytes"] and "bytes_per_second" in ceilings:
        times["bytes"] = facts["floor_bytes"] / ceilings["bytes_per_second"]
    return max((Floor(seconds, bound) for bound, seconds in times.items()), default=None)


def table(groups: dict[str, Facts], ceilings: Ceilings | None) -> list[tuple[str, ...]]:
    """A row for each group whose bytes and operations are known, under a head. Columns without a figure are left out.

    Besides the floor a row says what was measured of smi-fast (`median_ms`, `warm_ms`, `nodes`), and for an iteration
    the time of its elementwise part at the memory's bandwidth: what that part may cost once it is fused, if the caches
    keep nothing."""
    rows = [
        (
            "", "MB", "GFLOP", "floor us", "bound by", "measured us", "floor / measured", "warm us", "nodes",
            "elementwise us", "elementwise / floor",
        )
    ]  # fmt: skip
    for group, facts in groups.items():
        least = floor(facts, ceilings)
        if "floor_flops" not in facts:
            continue
        elementwise = None
        if ceilings and "elementwise_bytes" in facts and "bytes_per_second" in ceilings:
            elementwise = facts["elementwise_bytes"] / ceilings["bytes_per_second"]
        rows.append(
            (
                group, number(facts["floor_bytes"], 1e-6), number(facts["floor_flops"], 1e-9),
                number(least and least.seconds, 1e6), least.bound if least else "-",
                number(facts.get("median_ms"), 1e3), _share(least and least.seconds * 1e3, facts.get("median_ms")),
                number(facts.get("warm_ms"), 1e3), number(facts.get("nodes")),
                number(elementwise, 1e6), _share(elementwise, least and least.seconds),
            )
        )  # fmt: skip
    used = [n for n, column in enumerate(zip(*rows, strict=True)) if n == 0 or {*column[1:]} != {"-"}]
    return [tuple(row[n] for n in used) for row in rows]


def _share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.0%}" if part and whole else "-"


def number(value: float | None, scale: float = 1) -> str:
    return "-" if value is None else f"{value * scale:.4g}"


def on_paper() -> dict[str, Facts]:
    """The facts of every group that the benchmarks have for a GPU. None of them is set up or run."""
    groups: dict[str, Facts] = {}
    request = SimpleNamespace(config=SimpleNamespace(option=SimpleNamespace(smi_checkout=None)))
    for module in map(importlib.import_module, ("bench_kernels", "bench_inversion")):
        for name, function in vars(module).items():
            marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "contest"]
            for case in marks[0].kwargs["cuda"] if name.startswith("test_") and marks else ():

                def enter(title, contestants, facts=None, case=case, **options) -> None:
                    groups[f"{title}: {case}"] = {**{key: str(value) for key, value in vars(case).items()}, **facts}

                wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
                given = {"case": case, "device": None, "enter": enter, "request": request}
                function(**{key: given[key] for key in wanted})
    return groups


def main() -> None:
    from report import as_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpu", nargs="?", default="H100 SXM", help=f"one of {', '.join(gpu.name for gpu in GPUS)}")
    gpu = parser.parse_args().gpu
    if published(gpu) is None:
        parser.error(f"{gpu!r} is none of {', '.join(gpu.name for gpu in GPUS)}")
    print(as_text(table(on_paper(), published(gpu)), left=(0, 4)))


if __name__ == "__main__":
    main()
