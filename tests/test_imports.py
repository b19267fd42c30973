"""Imports run one way through the house: from the command line down to the kernels."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # each folder or file imports only from itself and from the floors below
    ["__init__", "__main__"],
    ["cli"],
    ["studies"],
    ["quantization", "distillation"],
    ["runs"],
    ["inversion"],
    ["models"],
    ["data"],
    ["backbones"],
    ["grid"],
    ["packed", "seeds", "bars"],
    ["kernels"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """The modules of the package by their names, such as "inversion.state"."""
    files = {f"kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "smi_fast").rglob("*.py"):
        files[".".join(path.relative_to(ROOT / "smi_fast").with_suffix("").parts)] = path
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join(["smi_fast", *parts] if node.level else []) + ("." if node.level and node.module else "")
            module += node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    names = {target.removeprefix("smi_fast.") for target in found if target.startswith("smi_fast.")}
    return {target for target in names if target in known and target != name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def test_imports_run_from_the_command_line_down_to_the_kernels():
    wrong = []
    for name, targets in graph().items():
        room = name.split(".")[0]
        for target in targets:
            below = target.split(".")[0]
            if below != room and FLOOR[below] <= FLOOR[room]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(f"imports go round in a circle: {' -> '.join(error.args[1])}") from None


def test_the_kernels_know_nothing_of_timm_or_of_files():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"timm", "safetensors", "torchvision", "unittest"} & {name.split(".")[0] for name in names}


def test_the_graph_is_drawn_from_all_of_the_source():
    drawn = graph()
    assert {name.split(".")[0] for name in drawn} == FLOOR.keys()
    assert "kernels.rows" in drawn["packed"]
    assert "kernels.rows" in drawn["kernels.attention"]
    assert "inversion.state" in drawn["inversion.inverter"]


def test_the_folder_of_kernels_is_imported_under_one_name(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    assert not hasattr(import_module("kernels"), "pixel_step")
    with pytest.raises(ModuleNotFoundError):
        import_module("kernels.pixels")
