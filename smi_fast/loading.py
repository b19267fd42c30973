"""Models by name: the one inside, or timm's with downloaded or local weights."""

from __future__ import annotations

import difflib
import logging
import pickle
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict
from torch import nn

from smi_fast.models import cifar10_student, cifar10_vit

MODEL_INSIDE, STUDENT_INSIDE = "cifar10_vit", "cifar10_student"


def load_model(
    name: str = MODEL_INSIDE, *, pretrained: bool = False, checkpoint: str | Path | None = None
) -> nn.Module:
    """A model in evaluation mode, on the CPU, with weights.

    Args:
        name: `cifar10_vit` or `cifar10_student`, the models inside, or one of timm's names.
        pretrained: download timm's weights for it.
        checkpoint: read the weights from a safetensors file, or from a torch file, which is read with weights_only. The
            number of classes is taken from the weights.

    Raises:
        ValueError: an unknown name; neither or both sources of weights; a file that is missing, truncated or of another
            model; no network. The message says which.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("give either pretrained weights or a checkpoint, not both")
    if checkpoint is not None:
        return _from_checkpoint(name, Path(checkpoint))
    if name == MODEL_INSIDE:
        return cifar10_vit()
    if name == STUDENT_INSIDE:
        return cifar10_student()
    _check_name(name)
    if not pretrained:
        raise ValueError(f"{name} needs weights: download timm's with --pretrained or give a file with --checkpoint")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry would be a line
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the hub, its client and timm raise a dozen types between them
        raise ValueError(f"the pretrained weights of {name} cannot be had: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [MODEL_INSIDE, *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")


def _from_checkpoint(name: str, path: Path) -> nn.Module:
    if name != MODEL_INSIDE:
        _check_name(name)
    if not path.is_file():
        raise ValueError(f"the checkpoint {path} does not exist")
    try:
        weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = f"it is truncated or not of weights alone: {_first_line(error)}"
        raise ValueError(f"the checkpoint {path} cannot be read, {reason}") from error
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f"the checkpoint {path} holds no state dict")
    classes = {"num_classes": len(weights["head.weight"])} if "head.weight" in weights else {}
    model = cifar10_vit(pretrained=False, **classes) if name == MODEL_INSIDE else timm.create_model(name, **classes)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"the checkpoint {path} does not fit {name}: {first}") from error
    return model.eval()


def class_names(model: nn.Module) -> list[str]:
    """A name for each class, the number where the model does not say."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if names is not None and len(names) == model.num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i).split(",")[0] for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]
