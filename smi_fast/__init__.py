"""Fast sparse model inversion of Vision Transformers."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


def _kernels_of_checkout() -> None:
    """Make `smi_fast.kernels` importable from the root of a checkout, where `kernels/` lies beside this package. An
    installed package contains it."""
    package = Path(__file__).parent
    source = package.parent / "kernels" / "__init__.py"
    if not (package / "kernels").is_dir() and source.is_file():
        name = f"{__name__}.kernels"
        spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=[str(source.parent)])
        module = sys.modules[name] = sys.modules[__name__].kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_kernels_of_checkout()

from smi_fast.backbones.cnn import CNN  # noqa: E402
from smi_fast.backbones.ensemble import Ensemble  # noqa: E402
from smi_fast.backbones.huggingface import from_huggingface  # noqa: E402
from smi_fast.backbones.pruning import Drop, Mass, Merge  # noqa: E402
from smi_fast.backbones.published import SMIAdaptor  # noqa: E402
from smi_fast.backbones.support import UnsupportedModelError  # noqa: E402
from smi_fast.backbones.torchvision import from_torchvision  # noqa: E402
from smi_fast.backbones.vit import AcceleratedViT, accelerate, restore  # noqa: E402
from smi_fast.data.labelled import accuracy, load_data  # noqa: E402
from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip, normalize_patches  # noqa: E402
from smi_fast.distillation import DistillationResult, Round, distill, transfer_loss  # noqa: E402
from smi_fast.inversion.competition import competition  # noqa: E402
from smi_fast.inversion.inverter import InversionResult, Inverter, NonFiniteError, Stage, Step  # noqa: E402
from smi_fast.inversion.objectives import Objective, deep_inversion, deep_inversion_cnn  # noqa: E402
from smi_fast.inversion.psaq import psaq  # noqa: E402
from smi_fast.inversion.schedule import RebirthSchedule, Release, StoppingSchedule, WarmupCosine  # noqa: E402
from smi_fast.inversion.selection import select_patches  # noqa: E402
from smi_fast.inversion.until import Until  # noqa: E402
from smi_fast.inversion.verifier import Verifier  # noqa: E402
from smi_fast.packed import PackedTokens  # noqa: E402
from smi_fast.quantization import QuantizedViT, quantize  # noqa: E402
from smi_fast.runs.inversion import invert  # noqa: E402
from smi_fast.runs.signals import Stopped  # noqa: E402

__all__ = [
    "CNN",
    "AcceleratedViT",
    "DistillationResult",
    "Drop",
    "Ensemble",
    "InversionResult",
    "InvertedDataset",
    "Inverter",
    "Mass",
    "Merge",
    "NonFiniteError",
    "Objective",
    "PackedTokens",
    "QuantizedViT",
    "RandomHorizontalFlip",
    "RebirthSchedule",
    "Release",
    "Round",
    "SMIAdaptor",
    "Stage",
    "Step",
    "Stopped",
    "StoppingSchedule",
    "UnsupportedModelError",
    "Until",
    "Verifier",
    "WarmupCosine",
    "accelerate",
    "accuracy",
    "competition",
    "deep_inversion",
    "deep_inversion_cnn",
    "distill",
    "from_huggingface",
    "from_torchvision",
    "invert",
    "load_data",
    "normalize_patches",
    "psaq",
    "quantize",
    "restore",
    "select_patches",
    "transfer_loss",
]
