"""The benchmarks' own arithmetic: contestants in turn, tables that say what was measured."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from smi_fast.kernels import cpu
from torch.utils.flop_counter import FlopCounterMode

import smi_fast
from smi_fast import kernels

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")

TINY_BENCHMARK = """
from dataclasses import dataclass
from functools import partial
import duel, pytest, torch
from duel import OURS

duel.CEILING_SECONDS = 0

@dataclass(frozen=True)
class Case:
    size: int
    def __str__(self):
        return f"{self.size} x {self.size}"

@pytest.mark.contest(contestants=[OURS, "twice", "wrong", "absent"], cpu=[Case(8), Case(64)], cuda=[])
def test_product(case, device, enter):
    def contestants():
        x = torch.rand(case.size, case.size, device=device)
        def twice():
            x @ x
            return x @ x
        return {OURS: lambda: x @ x, "twice": twice, "wrong": lambda: x @ x + 1, "absent": "not installed"}
    enter("product", contestants, tolerance=1e-6, rounds=5)
"""


@pytest.fixture
def bench(monkeypatch, pytestconfig):
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    for marker in ("contest", "rotate"):
        pytestconfig.addinivalue_line("markers", f"{marker}: as bench/conftest.py says")
    return importlib.import_module


@pytest.fixture
def duel(bench):
    return bench("duel")


@pytest.mark.parametrize("drift", [0.0, 0.02, -0.01])
def test_a_machine_that_changes_its_speed_changes_no_ratio(drift, duel):
    """Contestants are timed in turn: each call takes longer than the one before (or less), by a share of itself."""
    true, calls, factor = {"smi-fast": 1.0, "peer": 3.0, "slow": 9.0}, [], [1.0]

    def measured(call):
        call()
        factor[0] *= 1 + drift
        return [true[calls[-1]] * factor[0]]

    contestants = {name: lambda name=name: calls.append(name) for name in true}
    outcomes = duel.duel(contestants, device=CPU, rounds=30, memory=False, measure=measured)
    for name, seconds in true.items():
        assert len(outcomes[name].seconds) == 30
        ratio = outcomes[name].median / outcomes["smi-fast"].median
        assert ratio == pytest.approx(seconds, rel=2 * abs(drift))


def test_a_wrong_contestant_has_no_times_and_says_why(duel):
    contestants = {
        "smi-fast": lambda: torch.ones(3),
        "peer": lambda: torch.ones(3) + 1e-2,
        "nan": lambda: torch.ones(3) / 0 * 0,
    }
    outcomes = duel.duel(contestants, device=CPU, tolerance=1e-3, rounds=1)
    assert "peer: output 0 is off by 1.0e-02" in outcomes["peer"].wrong
    assert "off by nan" in outcomes["nan"].wrong
    assert not outcomes["peer"].seconds
    assert outcomes["smi-fast"].seconds


def test_outputs_are_made_comparable_first(duel):
    padded = torch.tensor([[1.0, 2.0, -7.0], [3.0, -7.0, -7.0]])
    unpad = duel.Round(lambda: padded, lambda out: (out[out > 0],))
    contestants = {"smi-fast": lambda: torch.tensor([1.0, 2.0, 3.0]), "peer": unpad, "raw": lambda: padded}
    outcomes = duel.duel(contestants, device=CPU, tolerance=0, rounds=1)
    assert len(outcomes["peer"].seconds) == 1
    assert outcomes["raw"].wrong


def test_a_peer_that_cannot_run_says_why(duel):
    def fails():
        raise RuntimeError("no such kernel\nlong story")

    outcomes = duel.duel({"smi-fast": lambda: None, "peer": fails, "other": "not installed"}, device=CPU, rounds=1)
    assert outcomes["peer"].absent == "RuntimeError: no such kernel"
    assert outcomes["other"].absent == "not installed"
    assert not outcomes["peer"].seconds


def test_where_ours_fails_the_others_are_still_timed(duel):
    def fails():
        raise RuntimeError("out of range")

    contestants = {"smi-fast": fails, "peer": lambda: torch.ones(3), "wrong": lambda: torch.zeros(3)}
    outcomes = duel.duel(contestants, device=CPU, tolerance=1e-3, rounds=2)
    assert outcomes["smi-fast"].wrong == "RuntimeError: out of range"
    assert not outcomes["smi-fast"].seconds
    assert len(outcomes["peer"].seconds) == 2
    assert "off by 1.0e+00" in outcomes["wrong"].wrong


def test_behind_a_contestant_that_breaks_the_device_nothing_is_timed(duel, monkeypatch):
    def breaks():
        monkeypatch.setattr(duel, "answers", lambda device: False)
        raise RuntimeError("an illegal memory access was encountered")

    contestants = {"smi-fast": lambda: torch.ones(3), "peer": breaks, "last": lambda: torch.ones(3)}
    outcomes = duel.duel(contestants, device=CPU, rounds=1)
    assert outcomes["peer"].absent == "RuntimeError: an illegal memory access was encountered"
    for name in ("smi-fast", "last"):
        assert outcomes[name].absent == "not run, because the device did not answer after peer"
        assert not outcomes[name].seconds


def test_the_peak_counts_what_is_held_at_once(duel):
    def call():
        for _ in range(3):
            first = torch.empty(1 << 20, dtype=torch.uint8)
            second = torch.empty(1 << 20, dtype=torch.uint8)
            del first, second

    assert 2 << 20 <= duel.peak_bytes(call, CPU) < 3 << 20


def run_benchmark(directory, text, *options):
    """Run a file of benchmarks with what bench/ gives them; the JSON is results.json in the directory."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    (directory / "conftest.py").write_text((BENCH / "conftest.py").read_text())
    (directory / "bench_tiny.py").write_text(text)
    (directory / "pytest.ini").write_text(f"[pytest]\npython_files = bench_*.py\npythonpath = {BENCH}\n")
    run = [sys.executable, "-m", "pytest", "-q", "-rs", "--bench-device=cpu", "--benchmark-json=results.json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run += ["--threads=1", *options]
    return subprocess.run(run, cwd=directory, env=environment, capture_output=True, text=True)


def test_tables_hold_the_medians_and_ratios_of_the_json(tmp_path):
    done = run_benchmark(tmp_path, TINY_BENCHMARK)
    assert "2 failed, 4 passed, 2 skipped" in done.stdout, done.stdout + done.stderr
    assert "wrong: output 0 is off by" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine_info"]["threads"] == 1
    assert "node" not in results["machine_info"]
    assert len(results["benchmarks"]) == 4

    report = subprocess.run(
        [sys.executable, str(BENCH / "report.py"), "results.json", "--markdown"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "1 thread;" in report.splitlines()[0]
    for size in ("8 x 8", "64 x 64"):
        entries = {
            entry["extra_info"]["contestant"]: entry
            for entry in results["benchmarks"]
            if entry["group"] == f"product: {size}"
        }
        assert list(entries) == ["smi-fast", "twice"]
        table = report.split(f"### product: {size}\n")[1].split("###")[0]
        rows = {cells[1]: cells[2:] for cells in ([c.strip() for c in r.split("|")] for r in table.splitlines() if r)}
        for name, entry in entries.items():
            stats, data = entry["stats"], sorted(entry["stats"]["data"])
            assert stats["rounds"] == 5
            assert stats["median"] == data[2]
            ratio = data[2] / sorted(entries["smi-fast"]["stats"]["data"])[2]
            assert entry["extra_info"]["ratio"] == pytest.approx(ratio)
            assert entry["extra_info"]["median_ms"] == pytest.approx(data[2] * 1e3)
            assert float(rows[name][0]) == pytest.approx(data[2] * 1e3, rel=1e-3)
            assert float(rows[name][2]) == pytest.approx(ratio, abs=0.006)


def test_a_run_that_is_killed_loses_nothing_and_goes_on_behind_what_it_has(tmp_path):
    """The second group kills the process. After a second time it would be entered as failed, and the first group keeps
    the very rounds that were measured in the first run."""
    kills = "            if case.size == 64: os.kill(os.getpid(), signal.SIGKILL)\n            return x @ x\n"
    text = "import os, signal" + TINY_BENCHMARK.replace("            return x @ x\n", kills)
    path = tmp_path / "written.json"
    assert run_benchmark(tmp_path, text, f"--results={path}").returncode == -signal.SIGKILL
    first = json.loads(path.read_text())
    assert [entry["group"] for entry in first["benchmarks"]] == ["product: 8 x 8"] * 2
    path.write_text(json.dumps(first | {"begun": first["begun"] + [{"group": "product: 64 x 64"}]}))
    done = run_benchmark(tmp_path, text, f"--results={path}")
    assert "5 failed, 2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    second = json.loads(path.read_text())
    assert second["benchmarks"] == first["benchmarks"]
    failed = [entry for entry in second["failed"] if entry["group"] == "product: 64 x 64"]
    assert {entry["wrong"] for entry in failed} == {"the process ended while the group was measured, twice"}
    assert {entry["extra_info"]["contestant"] for entry in failed} == {"smi-fast", "twice", "wrong", "absent"}


def test_results_of_other_code_are_put_aside_and_not_mixed(bench, tmp_path):
    journal, path = bench("journal"), tmp_path / "results.json"
    journal.Journal(path, "old", machine="a").add(rows=[{"n": 1}])
    again = journal.Journal(path, "old", machine="b")
    again.add(rows=[{"n": 2}])
    assert json.loads(path.read_text()) == {"source": "old", "machine": "a", "rows": [{"n": 1}, {"n": 2}]}
    new = journal.Journal(path, "new", machine="b")
    assert new["rows"] == []
    new.add(rows=[{"n": 3}])
    assert json.loads((tmp_path / "results.old.json").read_text())["rows"] == [{"n": 1}, {"n": 2}]
    assert json.loads(path.read_text()) == {"source": "new", "machine": "b", "rows": [{"n": 3}]}


def test_a_run_that_must_stop_begins_no_group(tmp_path):
    done = run_benchmark(tmp_path, TINY_BENCHMARK, "--stop-after=0")
    assert "8 skipped" in done.stdout
    assert "not begun 0 s into the run" in done.stdout
    assert done.returncode == 76


def test_the_ceiling_counts_the_operations_of_the_faster_way(duel, monkeypatch):
    seconds = {"torch": {torch.bfloat16: 0.5, torch.float32: 0.125}, "ours": {torch.bfloat16: 0.25, torch.float32: 0.5}}

    def measured(call):
        product = call()
        assert product.shape == (16, 16)
        return [seconds["torch" if product.any() else "ours"][product.dtype]]

    monkeypatch.setattr(duel, "on_host", measured)
    monkeypatch.setattr(duel, "can_pack", lambda dtype, device: True)
    monkeypatch.setattr(duel, "linear", lambda a, b: torch.zeros_like(a))
    rate = 2 * 16 * 16 * 16
    expected = {"bfloat16": rate / 0.25, "float32": rate / 0.125}
    assert duel.ceilings(CPU, side=16) == {"flops_per_second": expected}


def formula(qkv):
    """Attention of sequences of one length, (B, N, 3, H, D) -> (B, N, H, D), by nothing but two products."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("tokens", [7, None])
def test_the_floor_of_attention_counts_its_tensors_and_products(bench, tokens):
    case = bench("bench_kernels").Tokens(3, tokens, 2, 16, torch.bfloat16)
    operations = {"forward": 0, "both": 0}
    moved = {"forward": 0, "both": 0, "row": 0}
    for length in case.lengths:
        qkv = torch.randn(1, length, 3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = formula(qkv)
            operations["forward"] += counter.get_total_flops()
            (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        operations["both"] += counter.get_total_flops()
        moved["forward"] += qkv.nbytes + out.nbytes
        moved["both"] += qkv.nbytes + out.nbytes + qkv.nbytes + out.nbytes + grad.nbytes
        moved["row"] += 2 * length * torch.float32.itemsize
    forward, row = case.facts(rows=4, products=2), case.facts(rows=4, products=2, attention=True)
    both = case.facts(rows=4 + 7, products=2 + 4)
    assert (forward["floor_flops"], both["floor_flops"]) == (operations["forward"], operations["both"])
    assert (forward["floor_bytes"], both["floor_bytes"]) == (moved["forward"], moved["both"])
    assert row["floor_bytes"] == moved["forward"] + moved["row"]
    assert forward["length"] == sum(case.lengths) / 3
    assert forward["ragged"] == (tokens is None)


def test_the_floor_of_one_query_counts_keys_and_values_once(bench):
    case = bench("bench_kernels").Tokens(3, 7, 2, 16, torch.float32)
    q = torch.randn(3, 2, 1, 16, requires_grad=True)
    kv = torch.randn(2, 3, 2, 7, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = (q @ kv[0].mT).softmax(-1) @ kv[1]
        torch.autograd.grad(out, (q, kv), torch.ones_like(out))
    facts = case.facts(rows=2 + 4, queries=2 + 3, products=2 + 4)
    assert facts["floor_flops"] == counter.get_total_flops()
    assert facts["floor_bytes"] == (q.nbytes + kv.nbytes + out.nbytes) + 2 * (q.nbytes + kv.nbytes) + out.nbytes


def test_the_floors_of_selection_and_patches_count_bytes_moved(bench):
    benchmark = bench("bench_kernels")
    case = benchmark.Candidates(3, 9, 4, 128, torch.bfloat16)
    attention, values = torch.rand(3, 2, 9), torch.randn(3, 10, 128, dtype=torch.bfloat16)
    kept, kept_positions, _, _ = kernels.select_tokens(attention, values, k=4, num_prefix_tokens=1)
    moved = attention.nbytes + 2 * kept.nbytes + kept_positions.nbytes
    assert case.facts()["floor_bytes"] == moved
    assert "floor_bytes" not in benchmark.Candidates(3, 9, None, 128).facts()

    images = torch.randn(2, 3, 224, 224, requires_grad=True)
    positions, cu_seqlens = torch.arange(10, dtype=torch.int32) % 5, torch.tensor([0, 5, 10], dtype=torch.int32)
    patches, _ = kernels.gather_patches(images, positions, cu_seqlens, patch_size=16)
    (grad,) = torch.autograd.grad(patches.sum(), images)
    assert benchmark.Kept(2, 5).facts(backward=False)["floor_bytes"] == 2 * patches.nbytes
    assert benchmark.Kept(2, 5).facts(backward=True)["floor_bytes"] == 3 * patches.nbytes + grad.nbytes


def test_the_floors_of_embedding_cross_entropy_and_pixel_step_count_bytes_moved(bench):
    benchmark = bench("bench_kernels")
    x, class_token = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 16)
    cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
    tokens, positions, _ = kernels.embed_tokens(x, torch.arange(8, dtype=torch.int32), cu_seqlens, 4, class_token)
    of_patches = tokens[positions >= 0]
    (grad,) = torch.autograd.grad(tokens.sum(), x)
    case = benchmark.Rows(2, 5, 16, torch.bfloat16)
    forward, both = (case.facts_of_embedding(backward)["floor_bytes"] for backward in (False, True))
    assert forward == x.nbytes + tokens.nbytes
    assert both == forward + of_patches.nbytes + grad.nbytes

    logits, targets = torch.randn(3, 7, dtype=torch.bfloat16, requires_grad=True), torch.tensor([6, 0, 2])
    (grad,) = torch.autograd.grad(kernels.cross_entropy(logits, targets), logits)
    case = benchmark.Logits(3, 7, torch.bfloat16)
    forward, both = (case.facts(backward)["floor_bytes"] for backward in (False, True))
    assert forward == logits.nbytes + targets.nbytes
    assert both == 2 * forward + grad.nbytes

    grad, moments = torch.empty(10, 768, dtype=torch.bfloat16), torch.empty(2, 10, 768)
    pixels = moments[0]
    assert benchmark.Kept(2, 5).facts_of_step()["floor_bytes"] == grad.nbytes + 2 * (pixels.nbytes + moments.nbytes)


CONTESTS = {  # each with the functions in C++ that smi-fast runs in it, forward and backward
    "embedding": ([], []),
    "cross-entropy": ([], []),
    "patch entropy": ([], []),
    "norm": (["residual_norm"], ["residual_norm_backward"]),
    "GELU": ([], []),
    "attention": (["attention"], ["attention_backward"]),
    "patches": (["gather_patches"], None),
    "step": (["prior_squares", "pixel_step"], None),
}


@pytest.mark.parametrize("name", CONTESTS)
def test_contestants_agree_and_on_a_cpu_plain_torch_is_compared_with_cpp(name, bench, duel, seed):
    benchmark, bfloat16 = bench("bench_kernels"), torch.bfloat16
    tokens, rows, kept = benchmark.Tokens(2, 5, 1, 8), benchmark.Rows(2, 5, 24), benchmark.Kept(1, 5)
    contests = {
        "embedding": lambda *args: benchmark.embedding_rounds(rows, *args),
        "cross-entropy": lambda *args: benchmark.entropy_rounds(benchmark.Logits(3, 7, bfloat16), *args),
        "patch entropy": lambda *args: benchmark.similarity_rounds(tokens, *args),
        "norm": lambda *args: benchmark.norm_rounds(rows, *args),
        "GELU": lambda *args: benchmark.gelu_rounds(rows, *args),
        "attention": lambda device, backward: benchmark.attention_rounds(
            tokens, device, benchmark.attention_contest, backward
        ),
        "patches": lambda *args: benchmark.patches_contest(kept, *args),
        "step": lambda device, _: benchmark.step_contest(kept, device),
    }
    forward, backward = CONTESTS[name]
    for passes in (False, True)[: 1 if backward is None else 2]:
        contestants = contests[name](CPU, passes)
        outcomes = duel.duel(contestants, device=CPU, tolerance=benchmark.TOLERANCE[bfloat16], rounds=1, memory=False)
        assert {one: outcome.wrong for one, outcome in outcomes.items() if outcome.wrong} == {}
        plain = benchmark.PLAIN if benchmark.PLAIN in contestants else "torch"
        assert outcomes["smi-fast"].seconds
        assert outcomes[plain].seconds
        ran = {}
        for one in ("smi-fast", plain):
            ran[one] = []
            with cpu.recording(lambda _, arguments, seen=ran[one]: seen.append(arguments[0])):
                duel.as_round(contestants[one]).call()
        assert ran[plain] == []
        if cpu.library() is not None:
            assert ran["smi-fast"] == (forward + backward if passes else forward)


def entry(title, contestant, milliseconds, **facts):
    """An entry of pytest-benchmark's JSON, as far as report.py reads it."""
    facts = dict(title=title, contestant=contestant, batch="128", peak_bytes=None, graph=True, ragged=False) | facts
    group = f"{title}: {facts['batch']} x {facts.get('tokens', facts['length'])}"
    stats = dict(median=milliseconds / 1e3, iqr=0.0, rounds=11)
    return {"group": group, "extra_info": facts, "stats": stats}


def results_of(entries, **machine_info):
    machine = {"threads": 1, "machine": "x86", "cpu": {}, "torch": "2", "gpu": "NVIDIA H200"} | machine_info
    return {"benchmarks": entries, "machine_info": machine, "commit_info": {"id": "0" * 40}, "datetime": "2026-01-01T"}


BOTH = "attention, forward and backward"


def test_a_floor_is_the_slower_of_bytes_and_operations(bench):
    report = bench("report")
    entries = [
        entry(BOTH, "smi-fast", 3.0, tokens="47", length=47.0, floor_bytes=4e9, floor_flops=1e12),
        entry(BOTH, "peer", 8.0, tokens="47", length=47.0, floor_bytes=4e9, floor_flops=1e12, graph=False),
        entry(BOTH, "smi-fast", 6.0, tokens="96", length=96.0, floor_bytes=4e9, floor_flops=3e12),
    ]
    measured = results_of(entries, ceilings={"bytes_per_second": 4e12, "flops_per_second": {"bfloat16": 1e15}})
    short, long = report.tables(measured).values()
    head, ours, peer = (dict(zip(short[0], row, strict=True)) for row in short)
    assert "x floor" in head
    assert (ours["x floor"], peer["x floor"]) == ("3.00", "8.00")  # 4e9 bytes take 1 ms, 1e12 operations as long
    assert (ours["x smi-fast"], peer["x smi-fast"]) == ("1.00", "2.67")
    assert (ours["graph"], peer["graph"]) == ("yes", "no")
    assert dict(zip(long[0], long[1], strict=True))["x floor"] == "2.00"  # 3e12 operations take 3 ms
    assert "4.00 TB/s" in report.report(measured)
    assert "1,000,000 in bfloat16" in report.report(measured)
    bare = copy.deepcopy(entries)
    for one in bare:
        del one["extra_info"]["graph"]
    assert report.tables(results_of(bare))[bare[0]["group"]][0] == (
        "", "median ms", "IQR ms", "x smi-fast", "rounds", "peak MiB"
    )  # fmt: skip


def test_a_report_has_bytes_operations_nodes_and_floors_of_the_named_gpu(bench):
    report = bench("report")
    iteration = dict(length=46.0, kept="46", model="deit_tiny", dtype="torch.bfloat16", nodes=215, warm_ms=1.5)
    entries = [
        entry("selection", "smi-fast", 0.01, length=66.0, floor_bytes=33.5e6, floor_flops=0, nodes=1, warm_ms=0.008),
        entry("inversion, one iteration", "smi-fast", 2.0, median_ms=2.0, floor_bytes=3.35e6, floor_flops=989.4e9,
              elementwise_bytes=1675e6, **iteration),
    ]  # fmt: skip
    head, *rows = report.floors_section(results_of(entries, gpu="NVIDIA H100 80GB HBM3"))[1]
    kernel, loop = (dict(zip(head, row, strict=True)) for row in rows)
    assert (kernel["MB"], kernel["GFLOP"], kernel["floor us"], kernel["bound by"]) == ("33.5", "0", "10", "bytes")
    assert (loop["floor us"], loop["bound by"], loop["nodes"]) == ("1000", "operations", "215")
    assert (loop["measured us"], loop["floor / measured"], loop["warm us"]) == ("2000", "50%", "1500")
    assert (loop["elementwise us"], loop["elementwise / floor"]) == ("500", "50%")  # 1675 MB at 3.35 TB/s
    without = report.floors_section(results_of(entries, gpu="NVIDIA T4"))[1]
    assert without[0] == ("", "MB", "GFLOP", "measured us", "warm us", "nodes")


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35), ("NVIDIA H100 PCIe", None), ("NVIDIA H200", 4.8), ("NVIDIA L4", 0.3),
        ("NVIDIA A100-SXM4-80GB", 2.039), ("NVIDIA A100-SXM4-40GB", 1.555), ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA GeForce RTX 4090", 1.008), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA L40", None),
    ],
)  # fmt: skip
def test_published_peaks_are_of_exactly_the_named_gpus(bench, name, terabytes):
    peaks = bench("floors").published(name)
    assert (peaks and peaks["bytes_per_second"] / 1e12) == terabytes


def test_every_benchmark_of_a_gpu_has_its_floor_on_paper(bench):
    floors, benchmark = bench("floors"), bench("bench_kernels")
    groups = floors.on_paper()
    case = benchmark.Tokens(128, 47, 6)
    assert groups[f"attention, forward: {case}"].items() >= case.facts(rows=4, products=2).items()
    rows = {row[0]: row for row in floors.table(groups, floors.published("L4"))[1:]}
    assert {group for group in groups if "selection by mass" not in group} == {*rows}
    assert sum("inversion, one iteration" in group for group in rows) == 4


def test_on_a_cpu_the_share_of_the_product_ceiling_is_in_the_table(bench):
    report = bench("report")
    facts = dict(length=46.0, floor_bytes=1e9, floor_flops=4e9, dtype="torch.float32", graph=None)
    entries = [entry("inversion", "smi-fast", 40.0, **facts), entry("inversion", "published SMI", 80.0, **facts)]
    rates = {"float32": 2e11, "bfloat16": 1e12}
    ((head, *rows),) = report.tables(results_of(entries, gpu=None, ceilings={"flops_per_second": rates})).values()
    shares = [row[head.index("of the product ceiling")] for row in rows]
    assert shares == ["50%", "25%"]  # 4e9 operations take 20 ms at the ceiling


def test_a_contestant_that_failed_is_a_row_that_says_so(bench):
    report, facts = bench("report"), dict(tokens="47", length=47.0)
    good, gone, bad = (entry(BOTH, name, 1.0, **facts) for name in ("smi-fast", "peer", "other"))
    failed = [{"group": e["group"], "extra_info": e["extra_info"], key: why} for e, key, why in
              ((gone, "absent", "RuntimeError: no kernel"), (bad, "wrong", "off by 0.5"))]  # fmt: skip
    (rows,) = report.tables(results_of([good]) | {"failed": failed}).values()
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("smi-fast", "1", ""), ("peer", "-", "RuntimeError: no kernel"), ("other", "-", "off by 0.5")
    ]  # fmt: skip
    ours = {"group": good["group"], "extra_info": good["extra_info"], "wrong": "off by 2"}
    other = dict(tokens="96", length=96.0)
    entries = [bad, entry(BOTH, "smi-fast", 1.0, **other), entry(BOTH, "peer", 3.0, **other)]
    results = results_of(entries) | {"failed": [ours]}
    assert "off by 2" in report.report(results)
    verdict = next(row for row in report.targets(results) if row[:2] == ("fastest peer over smi-fast", BOTH))
    assert verdict[3:] == ("3", "3", "1 of 1", "128 x 96", "no")


@pytest.mark.parametrize("element", [2, 4])
def test_the_elementwise_bytes_are_those_of_the_tensors_that_fused_operations_need(bench, element):
    tokens, width, depth = 7, 12, 3

    def norm(rows):
        stream, row = 4 * rows * width, element * rows * width
        return (row + stream + stream + row) + (row + stream + stream + stream + row)

    def gelu(rows):
        return (2 + 3) * element * rows * 4 * width

    expected = (depth - 1) * (2 * norm(tokens) + gelu(tokens)) + norm(tokens) + norm(1) + gelu(1)
    assert bench("plain_loop").elementwise_bytes(tokens, width, element, depth) == expected


def test_the_counted_operations_are_those_that_ours_computes(bench):
    loop = bench("plain_loop")
    model = timm.create_model("deit_tiny_patch16_224", num_classes=0).eval().requires_grad_(False)
    keep, images = torch.arange(20)[None], torch.randn(1, 3, 224, 224, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        features = smi_fast.accelerate(model, dtype=torch.float32)(images, keep=keep)
        forward = counter.get_total_flops()
        features.sum().backward()
    assert forward == loop.forward_flops(21, 192)
    assert counter.get_total_flops() - forward == pytest.approx(loop.backward_flops(21, 192), rel=1e-3)


def test_the_plain_loop_computes_what_ours_does(bench, seed):
    inversion, loop = bench("bench_inversion"), bench("plain_loop")
    model = timm.create_model("deit_tiny_patch16_224").eval()
    plain, stage = loop.PlainLoop(model, torch.float32, compiled=False), inversion.Stage("deit_tiny", 2, 46)
    inversion.compare_plain(model, plain, stage, CPU)
    with torch.no_grad():
        plain.model.blocks[3].norm1.bias += 0.1
    with pytest.raises(AssertionError, match="plain PyTorch, compiled: output 0 is off"):
        inversion.compare_plain(model, plain, stage, CPU)
    seconds = inversion.plain_seconds(plain, torch.tensor([0, 1]), stage)
    assert seconds.shape == (inversion.TIMED,)
    assert (seconds > 0).all()


def verdicts(report, entries):
    ceilings = {"bytes_per_second": 4e12, "flops_per_second": {"bfloat16": 1e15}}
    head, *rows = report.targets(results_of(entries, ceilings=ceilings))
    return {row[:2]: dict(zip(head, row, strict=True)) for row in rows}


def test_a_target_is_met_only_if_the_worst_group_meets_it(bench):
    report = bench("report")
    entries = []
    for tokens, peer in (("47", 1.7), ("96", 1.2)):
        facts = dict(tokens=tokens, length=float(tokens))
        entries += [
            entry(BOTH, "smi-fast", 1.0, **facts),
            entry(BOTH, "smi-fast, no row", 0.1, **facts),  # ours in another form is no peer
            entry(BOTH, "slow", 9.0, **facts),
            entry(BOTH, "fast", peer, **facts),
        ]
    found = verdicts(report, entries)
    overall, short = found["fastest peer over smi-fast", BOTH], found["the same at 47 tokens", BOTH]
    assert (overall["limit"], overall["worst"], overall["met"]) == (">= 1.3", "1.2", "no")
    assert (overall["reached in"], overall["worst at"]) == ("1 of 2", "128 x 96")
    assert (short["worst"], short["met"]) == ("1.7", "yes")
    assert {row["met"] for key, row in found.items() if key[1] != BOTH} == {"not measured"}


def test_the_row_the_selection_and_the_floor_have_their_own_figures(bench):
    report = bench("report")
    row, facts = "attention with the class row, forward", dict(tokens="47", length=47.0)
    kept = dict(length=196.0, floor_bytes=4e9, floor_flops=0)
    entries = [
        entry(row, "smi-fast", 1.06, **facts),
        entry(row, "smi-fast, no row", 1.0, **facts),
        entry("selection", "smi-fast", 1.4, **kept),
        entry("selection", "torch", 5.6, **kept),
        entry("selection", "torch.compile", 2.7, **kept),
        entry("selection", "smi-fast", 9.0, **kept | {"batch": "32"}),  # too small for the figure on the floor
    ]
    found = verdicts(report, entries)
    assert found["with the row over without", row]["worst"] == "1.06"
    assert found["with the row over without", row]["met"] == "no"
    assert found["torch over smi-fast", "selection"]["met"] == "yes"
    assert found["torch.compile over smi-fast", "selection"]["met"] == "no"
    floor = found["time over the floor, batch >= 128", "selection"]
    assert (floor["worst"], floor["met"], floor["reached in"]) == ("1.4", "yes", "1 of 1")


def test_the_loop_has_its_own_figures(bench):
    report = bench("report")
    title, facts = "inversion, one iteration", dict(model="deit_base_patch16_224", kept="46", length=46.0)
    floors = dict(floor_bytes=0, floor_flops=1e12)
    entries = [
        entry(title, "smi-fast", 2.0, peak_bytes=30, **facts, **floors),
        entry(title, "plain PyTorch, compiled", 3.2, peak_bytes=10, **facts),
        entry(title, "published SMI", 28.0, peak_bytes=100, **facts),
    ]
    found = {figure: row for (figure, kernel), row in verdicts(report, entries).items() if kernel == title}
    assert found["published code over smi-fast, deit_base"]["met"] == "no"
    assert found["plain loop over smi-fast, deit_base"]["met"] == "yes"
    assert found["time over the floor, deit_base"]["worst"] == "2"
    assert found["peak memory over the published code's"]["worst"] == "0.3"
    assert found["iterations/s over 1500, deit_tiny"]["met"] == "not measured"
    gain = "sparse forward beside dense"
    entries = [
        entry(gain, "smi-fast", 1.0, dense_flops=5e12, length=46.0, **floors),
        entry(gain, "timm dense, torch.compile", 4.4, length=46.0),
    ]
    found = {figure: row for (figure, kernel), row in verdicts(report, entries).items() if kernel == gain}
    assert (found["dense compiled timm over smi-fast"]["worst"], found["dense compiled timm over smi-fast"]["met"]) == (
        "4.4", "yes"
    )  # fmt: skip
    assert (found["the same over the ratio of operations"]["worst"]) == "0.88"


def test_plots_hold_the_measured_points(bench, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    report = bench("report")
    lines = []
    monkeypatch.setattr(plt, "close", lambda figure: lines.extend(figure.axes[0].lines))
    entries = [
        entry(BOTH, name, time * length / 47, tokens=str(length), length=float(length), heads="3", floor_bytes=4e7,
              floor_flops=0)
        for length in (47, 96) for name, time in (("smi-fast", 0.02), ("SDPA flash", 0.05))
    ]  # fmt: skip
    entries.append(entry(BOTH, "smi-fast", 0.03, tokens="None", length=70.5, heads="3", ragged=True))
    ceilings = {"bytes_per_second": 4e12, "flops_per_second": {"bfloat16": 1e15}}
    (path,) = report.plots(results_of(entries, ceilings=ceilings), tmp_path)
    assert path.name == "attention-forward-backward.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    drawn = [[tuple(map(float, point)) for point in line.get_xydata()] for line in lines if len(line.get_xydata())]
    assert drawn == [
        [(47.0, pytest.approx(20.0)), (96.0, pytest.approx(20.0 * 96 / 47))],
        [(70.5, pytest.approx(30.0))],  # the ragged mix lies beside the line
        [(47.0, pytest.approx(50.0)), (96.0, pytest.approx(50.0 * 96 / 47))],
        [(47.0, pytest.approx(10.0)), (96.0, pytest.approx(10.0))],
    ]


@pytest.mark.cuda
def test_gpu_rounds_are_graphs_where_they_can_be(duel):
    """One that waits for the host in its middle cannot be a graph; what comes behind it still can."""
    device = torch.device("cuda")
    x = torch.rand(64, 64, device=device, requires_grad=True)

    def both():
        y = x @ x
        return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    def waiting():
        y, grad = both()
        return y * (y.sum().item() > 0), grad

    contestants = {"smi-fast": both, "waiting": waiting, "again": both, "wrong": lambda: (x @ x, x)}
    outcomes = duel.duel(contestants, device=device, tolerance=1e-5, rounds=3)
    assert [outcomes[name].graph for name in ("smi-fast", "waiting", "again")] == [True, False, True]
    assert all(len(outcomes[name].seconds) == 3 for name in ("smi-fast", "waiting", "again"))
    assert all(len(outcomes[name].warm) == 3 for name in ("smi-fast", "waiting", "again"))
    assert outcomes["smi-fast"].nodes == outcomes["again"].nodes >= 2
    assert outcomes["wrong"].wrong

    def failing():
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return x @ x

    assert duel.captured([failing]) is None
    assert duel.captured([lambda: x @ x])() is not None
    torch.cuda.empty_cache()
