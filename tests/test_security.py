"""No code of this repository reads a pickle that could run code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("smi_fast", "kernels", "examples", "bench", "cpp")
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"torch.jit.load", "torch.hub.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load"}
SAFE = {  # call -> the keyword that makes it safe, the value that it must have, and whether it has it by default
    "torch.load": ("weights_only", True, False),
    "torch.hub.load_state_dict_from_url": ("weights_only", True, False),
    "timm.models.load_state_dict": ("weights_only", True, True),
    "timm.models.load_checkpoint": ("weights_only", True, True),
    "numpy.load": ("allow_pickle", False, True),
}
NEVER = {"trust_remote_code", "pickle_module"}  # keywords


def unsafe(source: str) -> list[str]:
    """What in this source could run code that a file holds, or is not seen to be safe."""
    tree, found, names = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                whole = f"{module}.{alias.name}" if module else alias.name
                names[alias.asname or alias.name.split(".")[0]] = (
                    whole if alias.asname or module else whole.split(".")[0]
                )
                found += [f"imports {whole}"] if whole.split(".")[0] in MODULES else []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, *rest = ast.unparse(node.func).split(".")
        call = ".".join([names.get(first, first), *rest])
        keywords = {keyword.arg: getattr(keyword.value, "value", "unknown") for keyword in node.keywords}
        found += [f"{call}({name}=...)" for name in NEVER & keywords.keys()]
        found += [call] if call in CALLS else []
        if call in SAFE:
            name, value, by_default = SAFE[call]
            is_safe = keywords[name] is value if name in keywords else by_default
            found += [] if is_safe and None not in keywords else [f"{call} without {name}={value}"]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file)",
        "import torch as t\nt.load(file, weights_only=False)",
        "import torch\ntorch.load(file, weights_only=flag)",
        "import torch\ntorch.load(file, **{'weights_only': False})",
        "from torch import load as read\nread(file)",
        "import torch\ntorch.load(file, weights_only=True, pickle_module=p)",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill as d",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "from timm.models import load_state_dict\nload_state_dict(file, weights_only=False)",
        "import yaml\nyaml.load(file)",
        "import torch.hub\ntorch.hub.load('a/b', 'c')",
        "Model.from_pretrained(folder, trust_remote_code=True)",
        "import torch\ntorch.jit.load(file)",
    ],
)
def test_the_check_finds_what_could_run_code(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(file)",
        "import numpy as np\nnp.load(file, allow_pickle=False)",
        "model.eval()\njson.load(file)",
        "from torch import save\nsave(model, file)",
    ],
)
def test_the_check_lets_pass_what_could_not(source):
    assert not unsafe(source)


def test_no_file_of_the_repository_reads_a_pickle_that_could_run_code():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text()) for path in files}
    assert not {name: calls for name, calls in found.items() if calls}
