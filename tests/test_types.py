"""Every public function, class and method says the types of what it takes and returns. `make types` checks them."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import smi_fast
from smi_fast import kernels


def without_types(name: str, function: object) -> list[str]:
    """The parameters of a function that have no annotation, and "return" if its result has none."""
    signature = inspect.signature(function)
    missing = [each for each, parameter in signature.parameters.items() if parameter.annotation is inspect._empty]
    missing = [each for each in missing if each not in ("self", "cls")]
    returns = signature.return_annotation is inspect._empty and not name.endswith("__init__")
    return [f"{name}: {each}" for each in [*missing, *(["return"] if returns else [])]]


def members(name: str, kind: type) -> list[tuple[str, object]]:
    """The public methods and properties of a class, and its constructor, that are written in this package."""
    found = []
    for base in kind.__mro__:
        for member, value in vars(base).items():
            value = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            if not inspect.isfunction(value) or not value.__module__.startswith("smi_fast"):  # such as a Protocol's
                continue
            if member == "__init__" or not member.startswith("_"):
                found.append((f"{name}.{member}", value))
    return found


@pytest.mark.parametrize("module", [smi_fast, kernels], ids=lambda module: module.__name__)
def test_public_names_are_annotated(module: ModuleType):
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            missing += [each for member in members(name, value) for each in without_types(*member)]
        elif callable(value):
            missing += without_types(name, inspect.unwrap(value))
    assert not missing


def test_the_typed_program_uses_each_public_name():
    program = (Path(__file__).parent / "typed" / "program.py").read_text()
    assert set(re.findall(r"\bsmi_fast\.([A-Za-z_]\w*)", program)) >= set(smi_fast.__all__)
