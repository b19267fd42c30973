"""The commands whose processes are killed, and their undisturbed runs."""

import shutil

import pytest
from fault_cases import COMMANDS, Chain, Whole


@pytest.fixture(scope="module", params=COMMANDS.values(), ids=COMMANDS)
def command(request):
    return request.param


@pytest.fixture(scope="module")
def the_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults") / "run"


@pytest.fixture(scope="module")
def whole(command, the_folder):
    """The run that nothing disturbs, in the same folder as all others, whose name is in the manifest."""
    return Whole.make(command.arguments(the_folder), the_folder)


@pytest.fixture
def folder(the_folder):
    """The folder of a run, which does not exist yet."""
    shutil.rmtree(the_folder, ignore_errors=True)
    return the_folder


@pytest.fixture
def chain(command, folder, whole):
    return Chain(command, folder, whole)
