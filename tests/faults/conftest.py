"""The commands whose processes are killed, and their undisturbed runs."""

import shutil
from dataclasses import replace

import pytest
from fault_cases import COMMANDS, EVERYTHING, INVERT, Chain, Whole, make_data


@pytest.fixture(scope="module", params=COMMANDS.values(), ids=COMMANDS)
def command(request, tmp_path_factory):
    if not (EVERYTHING or request.param is INVERT or request.module.__name__.endswith("test_kill")):
        pytest.skip("make faults runs it")
    data = make_data(tmp_path_factory.mktemp("data")) if "{data}" in request.param.options else None
    return replace(request.param, options=request.param.options.format(data=data))


@pytest.fixture(scope="module")
def the_folder(command, tmp_path_factory):
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
