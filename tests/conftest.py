"""Set-up shared by all tests: Triton's interpreter where there is no GPU, seeds that are printed, two devices."""

import os
import secrets
import signal
import zlib

import hypothesis
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of what is drawn while tests are collected, which has to be the same in all processes
# A script's job in the background ignores Ctrl-C, and so would the tests and every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
FRESH = os.environ.get("SMI_FAST_TEST_SEED") == "fresh"
hypothesis.settings.register_profile("smi-fast", deadline=None, derandomize=not FRESH)  # the machine may be busy
hypothesis.settings.load_profile("smi-fast")


def pytest_collection_modifyitems(items):
    if not CUDA:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def seed(request) -> int:
    """The test's own seed, shown when it fails. SMI_FAST_TEST_SEED sets another for all, and "fresh" draws one each."""
    value = os.environ.get("SMI_FAST_TEST_SEED", zlib.crc32(request.node.name.encode()))
    value = secrets.randbelow(2**31) if FRESH else int(value)
    print(f"SMI_FAST_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")
