"""A pytest plugin that writes the outcome of each test when it is known, and skips tests that passed in an earlier run.

    PYTHONPATH=bench python -m pytest -p resume --outcomes FILE

A test that failed runs again. With pytest-xdist the main process reads and writes the file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from journal import Journal, source


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="write outcomes here, and skip what passed")


def pytest_configure(config):
    path = config.getoption("outcomes")
    if path is not None:
        config.pluginmanager.register(Outcomes(config, path), "outcomes")


class Outcomes:
    def __init__(self, config, path: Path):
        self.is_worker = hasattr(config, "workerinput")
        if self.is_worker:
            self.passed = set(config.workerinput["passed"])  # the same in all workers, whenever they start
        else:
            self.journal = Journal(path, source())
            self.passed = {test["test"] for test in self.journal["tests"] if test["outcome"] == "passed"}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["passed"] = sorted(self.passed)

    def pytest_collection_modifyitems(self, config, items):
        kept = [item for item in items if item.nodeid not in self.passed]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.passed])
        items[:] = kept

    def pytest_runtest_logreport(self, report):
        if not self.is_worker and (report.when == "call" or report.outcome != "passed"):
            text = report.longreprtext[-2000:] if report.failed else ""
            record = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.journal.add(tests=[{**record, "error": text} if text else record])

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = pytest.ExitCode.OK  # all have passed before
