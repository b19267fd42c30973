"""Compiles what the benchmarks launch, in parallel processes, before anything is timed.

Triton keeps what was compiled in its cache on disk, where a run that times the same launches finds it.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import torch
from duel import as_round
from floors import OURS
from resources import Job, job, usages
from smi_fast.kernels.backend import recording


class Ahead:
    """Collects what smi-fast launches in groups of contestants on this machine's GPU."""

    def __init__(self):
        self.jobs: list[Job] = []

    def take(self, contestants: Callable[[], dict]) -> None:
        """Add the launches of a group. None of them runs, so that outputs are left unwritten."""
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        with recording() as launched:
            try:
                for name, one in contestants().items():
                    if name.startswith(OURS) and not isinstance(one, str):
                        as_round(one).call()
            except Exception:  # one that reads unwritten outputs may fail; when it is timed, this will be recorded
                traceback.print_exc()
        self.jobs += [job(launch, arch) for launch in launched]

    def compile(self, processes: int | None = None) -> None:
        started = time.monotonic()
        uses = usages(self.jobs, processes)
        print(f"{len(uses)} launches of {len({*uses})} kernels compiled in {time.monotonic() - started:.0f} s")
