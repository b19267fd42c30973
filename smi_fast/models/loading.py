"""Models by name: the one inside, or timm's with downloaded or local weights."""

from __future__ import annotations

import difflib
import logging
import warnings
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import nn

from smi_fast.data.files import first_line
from smi_fast.models import cifar10_student, cifar10_vit

MODEL_INSIDE, STUDENT_INSIDE = "cifar10_vit", "cifar10_student"
INSIDE = {MODEL_INSIDE: cifar10_vit, STUDENT_INSIDE: cifar10_student}
SHOWN = 3  # names that a message lists, of those that it counts


def load_model(
    name: str = MODEL_INSIDE,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    options: tuple[str, str] = ("pretrained=True", "checkpoint"),
) -> nn.Module:
    """A model in evaluation mode, on the CPU, with weights.

    Args:
        name: `cifar10_vit` or `cifar10_student`, the models inside, or one of timm's names.
        pretrained: download timm's weights for it.
        checkpoint: read the weights from a safetensors file, or from a torch file, which is read with weights_only. The
            number of classes is taken from the weights.
        options: what a message calls the two arguments before, such as the options of a command.

    Raises:
        ValueError: an unknown name; neither or both sources of weights; a file that is missing, truncated or of another
            model; no network. The message says which.
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"give either {options[0]} or {options[1]}, not both")
    if name not in INSIDE:
        _check_name(name)
    if checkpoint is not None:
        return _from_checkpoint(name, Path(checkpoint))
    if name in INSIDE:
        return INSIDE[name]()
    if not pretrained:
        raise ValueError(f"{name} needs weights: {options[0]} downloads timm's, {options[1]} reads a file")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry would be a line
    try:
        return timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # the hub, its client and timm raise a dozen types between them
        raise ValueError(f"the pretrained weights of {name} cannot be had: {first_line(error)}") from error


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*INSIDE, *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")


def _from_checkpoint(name: str, path: Path) -> nn.Module:
    weights = _read_weights(path)
    try:
        config = timm.get_pretrained_cfg(name)
        model = _build(name, weights, "head" if config is None else config.classifier)
    except RuntimeError as error:  # timm's, for a name whose tag it does not know
        raise ValueError(f"{name} cannot be made: {first_line(error)}") from error
    contradiction = _contradiction(model, weights)
    if contradiction is not None:
        raise ValueError(f"the checkpoint {path} does not fit {name}: {contradiction}")
    return model.eval()


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a safetensors or torch file. Nothing but weights is ever unpickled."""
    if not path.is_file():
        raise ValueError(f"the checkpoint {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about forms of pickles; what comes of them is checked
            weights = load_state_dict(str(path), device="cpu", weights_only=True)
    except (AttributeError, TypeError):  # no dict, or one whose keys are not names
        weights = None
    except Exception as error:  # damaged pickles raise almost anything
        unsafe = "weights_only" in str(error)  # timm's own message advises to load the file all the same
        reason = "it is damaged, or holds more than weights" if unsafe else first_line(error)
        raise ValueError(f"the checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError(f"the checkpoint {path} holds no state dict")
    return weights


def _build(name: str, weights: dict[str, torch.Tensor], classifier: str | tuple[str, ...] | None) -> nn.Module:
    """A model with as many classes as the classifier (the first, if there are two) has in the weights."""
    first = classifier if isinstance(classifier, str) else next(iter(classifier or ()), None)
    weight = weights.get(f"{first}.weight")
    classes = {"num_classes": len(weight)} if weight is not None and weight.ndim else {}
    if name in INSIDE:
        return INSIDE[name](pretrained=False, **classes)
    return timm.create_model(name, **classes)


def _contradiction(model: nn.Module, weights: dict[str, torch.Tensor]) -> str | None:
    """Load the weights. Returns the first way in which they are not those of the model, in words; None if they are."""
    for name, tensor in model.state_dict().items():
        found = weights.get(name, tensor)
        if found.shape != tensor.shape:
            return f"its {name} is {tuple(found.shape)}, the model's is {tuple(tensor.shape)}"
        if found.layout != torch.strided:
            return f"its {name} is {found.layout}, the model's is dense"
        if found.is_floating_point() != tensor.is_floating_point():
            return f"its {name} is {found.dtype}, the model's is {tensor.dtype}"
        wrong = int((~found.isfinite()).sum())
        if wrong:
            return f"its weight {name} holds {wrong} values that are NaN or infinite"
    missing, unknown = model.load_state_dict(weights, strict=False)
    for names, what in ((missing, "it lacks"), (unknown, "the model has no")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            return f"{what} {', '.join(names[:SHOWN])}{more}"
    return None
