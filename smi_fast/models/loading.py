"""Models by their names: load_model() with weights from this package, from a download, from a file or from a folder
that transformers has written; untrained_model() with random weights."""

from __future__ import annotations

import difflib
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision import __version__ as torchvision_version
from torchvision import models as torchvisions

from smi_fast.backbones.base import class_names
from smi_fast.backbones.conversion import as_backbone
from smi_fast.backbones.huggingface import from_huggingface
from smi_fast.backbones.torchvision import from_torchvision
from smi_fast.data.files import first_line
from smi_fast.data.network import hub, impatient
from smi_fast.grid import PatchGrid
from smi_fast.models import CNN_INSIDE, MODEL_INSIDE, STUDENT_INSIDE, cifar10_resnet20, cifar10_student, cifar10_vit
from smi_fast.models.weights import read_description, read_weights

INSIDE = {MODEL_INSIDE: cifar10_vit, STUDENT_INSIDE: cifar10_student, CNN_INSIDE: cifar10_resnet20}
WITHOUT_WEIGHTS = {f"cifar10_resnet{depth}": partial(cifar10_resnet20, depth=depth) for depth in (8, 14)}
OURS = INSIDE | WITHOUT_WEIGHTS
TORCHVISION, HUB = "torchvision/", "hf-hub:"  # what names begin with whose models are not of timm's list
SHOWN = 3  # A message lists this many names of weights and counts the rest.


def load_model(
    name: str = MODEL_INSIDE,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    options: tuple[str, str] = ("pretrained=True", "checkpoint"),
) -> nn.Module:
    """Load a model with its weights, in evaluation mode, on the CPU.

    Args:
        name: `cifar10_vit`, `cifar10_student` or `cifar10_resnet20`, which come with the package, a name that timm
            knows, `hf-hub:ORG/NAME` for a timm model on Hugging Face's hub, one such as `torchvision/resnet18`, or a
            folder that `from_huggingface` takes. Write ./NAME for a folder that is called like a model.
        pretrained: whether to download timm's or torchvision's weights for the model. Without a checkpoint, those of
            `hf-hub:ORG/NAME` always are. If the hub cannot be reached, they are read from its cache.
        checkpoint: a safetensors file or a torch file with the weights, see `read_weights`. The model gets as many
            classes as the weights have.
        image_size: (height, width) in pixels of the images that the model is to take. A ViT's position embedding is
            resampled for them, as timm does it. None: the model's own.
        options: the names of the arguments `pretrained` and `checkpoint` in error messages, such as the options of a
            command.

    Raises:
        ValueError: the name is unknown, weights are given twice or not at all, the file is missing, damaged or belongs
            to another model, the download fails, or the patches of a ViT do not divide the images. The message says
            which.
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"give either {options[0]} or {options[1]}, not both")
    if Path(name).is_dir() and not _is_known(name):
        model = _from_folder(name, given=options[0] if pretrained else options[1] if checkpoint is not None else None)
    else:
        _check_name(name)
        model = _with_weights(name, pretrained, checkpoint, options)
    return model if image_size is None else resized(model, image_size)


def _with_weights(name: str, pretrained: bool, checkpoint: str | Path | None, options: tuple[str, str]) -> nn.Module:
    if checkpoint is not None:
        return _from_checkpoint(name, Path(checkpoint))
    if name in INSIDE:
        return INSIDE[name]()
    if name in WITHOUT_WEIGHTS:
        raise ValueError(f"{name} comes without weights: {options[1]} reads a file")
    if not (pretrained or name.startswith(HUB)):
        source = "torchvision's" if name.startswith(TORCHVISION) else "timm's"
        raise ValueError(f"{name} needs weights: {options[0]} downloads {source}, {options[1]} reads a file")
    try:
        return _as_timms(_make(name, pretrained=True)).eval()
    except Exception as error:  # The hub, its client and timm raise a dozen types of errors.
        raise ValueError(
            f"the pretrained weights of {name} cannot be downloaded: {first_line(error)}; without a network, "
            f"{options[1]} reads weights from a file"
        ) from error


def resized(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """Let a model take images of another size, (height, width) in pixels, and return it. A ViT's position embedding is
    resampled.

    Raises:
        ValueError: the patches of a ViT do not divide the images. The message names both sizes.
    """
    if isinstance(model, VisionTransformer):
        PatchGrid.of(image_size, model.patch_embed.patch_size)  # raises an error that names both sizes
        model.set_input_size(img_size=image_size)
    config = resolve_data_config(model=model) | (getattr(model, "pretrained_cfg", None) or {})
    model.pretrained_cfg = config | {"input_size": (config["input_size"][0], *image_size)}
    return model


def untrained_model(name: str, teacher: nn.Module, seed: int = 0) -> nn.Module:
    """Make a model with random weights that has a teacher's classes and takes the teacher's images, in evaluation mode
    on the CPU.

    Args:
        name: as for `load_model`, or `cifar10_resnet8` or `cifar10_resnet14`.
        teacher: a model that `Inverter` takes. The new model gets its number of classes, its image size and its
            normalisation.
        seed: decides the weights.

    Raises:
        ValueError: the name is unknown, or the model cannot be made for these classes and images.
        UnsupportedModelError: the teacher is no model that can be inverted.
    """
    _check_name(name)
    backbone = as_backbone(teacher)
    with torch.random.fork_rng([]):  # of the CPU: torch.manual_seed would also seed GPUs
        torch.default_generator.manual_seed(seed)
        try:
            model = _make(name, num_classes=backbone.num_classes)
            if isinstance(model, VisionTransformer):
                torch.default_generator.manual_seed(seed)
                model = _make(name, num_classes=backbone.num_classes, img_size=backbone.image_size)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{name} cannot be made: {first_line(error)}") from error
    model.pretrained_cfg = resolve_data_config(model=teacher) | {
        "architecture": name, "input_size": (backbone.num_channels, *backbone.image_size), "mean": backbone.mean,
        "std": backbone.std, "num_classes": backbone.num_classes, "label_names": tuple(class_names(teacher)),
    }  # fmt: skip
    return model.eval()


def _from_folder(folder: str, given: str | None) -> nn.Module:
    if given is not None:
        raise ValueError(f"the folder {folder} holds its weights: leave {given} out")
    try:
        return from_huggingface(folder).eval()
    except ImportError as error:
        raise ValueError(str(error)) from error


def _is_known(name: str) -> bool:
    if name.startswith(TORCHVISION):
        return name.removeprefix(TORCHVISION) in torchvisions.list_models(torchvisions)
    return name in OURS or name.startswith(HUB) or timm.is_model(name)


def _check_name(name: str) -> None:
    if _is_known(name):
        return
    library, known = f"timm {timm.__version__}", [*OURS, *timm.list_models()]
    if name.startswith(TORCHVISION):
        library = f"torchvision {torchvision_version}"
        known = [TORCHVISION + model for model in torchvisions.list_models(torchvisions)]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{library} has no model {name!r}{hint}")


def _make(name: str, *, pretrained: bool = False, **overrides) -> nn.Module:
    """Make a model with weights at random or, if it is pretrained, with those of its library."""
    if name in OURS:
        return OURS[name](pretrained=pretrained, **overrides)
    if name.startswith(TORCHVISION):
        with impatient():
            return _make_torchvisions(name, pretrained, **overrides)
    with hub() if pretrained or name.startswith(HUB) else nullcontext():
        return timm.create_model(name, pretrained=pretrained, **overrides)


def _make_torchvisions(name: str, pretrained: bool, **overrides) -> nn.Module:
    """Make a model of torchvision, with its data described in the form of timm's configurations."""
    known = name.removeprefix(TORCHVISION)
    weights = torchvisions.get_model_weights(known).DEFAULT
    model = torchvisions.get_model(known, weights=weights if pretrained else None, **overrides)
    data, classes = weights.transforms(), weights.meta["categories"]
    (size,), (resized,) = data.crop_size, data.resize_size
    model.num_classes = overrides.get("num_classes", len(classes))
    model.pretrained_cfg = {
        "architecture": name, "input_size": (3, size, size), "num_classes": model.num_classes,
        "mean": tuple(data.mean), "std": tuple(data.std), "interpolation": data.interpolation.value,
        "crop_pct": size / resized, "label_names": tuple(classes),
    }  # fmt: skip
    return model


def _as_timms(model: nn.Module) -> nn.Module:
    """Return a ViT of torchvision as a model of timm, and any other model as it is."""
    if not isinstance(model, torchvisions.VisionTransformer):
        return model
    config = model.pretrained_cfg
    names = config["label_names"] if len(config["label_names"]) == config["num_classes"] else None
    return from_torchvision(model, mean=config["mean"], std=config["std"], class_names=names)


def _from_checkpoint(name: str, path: Path) -> nn.Module:
    weights, described = read_weights(path), read_description(path)
    try:
        weight = weights.get(f"{_classifier(name)}.weight")
        options = {"num_classes": len(weight)} if weight is not None and weight.ndim else {}
        model = _make(name, **options)
        size = _image_size(model, weights, described)
        if size is not None:
            model = _make(name, **options, img_size=size)
    except (RuntimeError, AssertionError) as error:  # an unknown tag, or images that are no multiple of the patches
        raise ValueError(f"{name} cannot be made: {first_line(error)}") from error
    mismatch = _load_weights(model, weights)
    if mismatch is not None:
        raise ValueError(f"the checkpoint {path} does not fit {name}: {mismatch}")
    if described or size is not None:
        _describe(
            model,
            described | ({} if size is None else {"input_size": (model.patch_embed.proj.in_channels, *size)}),
            path,
        )
    return _as_timms(model).eval()


def _image_size(model: nn.Module, weights: dict[str, torch.Tensor], described: dict) -> tuple[int, int] | None:
    """Return the height and the width of the images of a ViT's weights, or None if they are those of the model as its
    library makes it. Where the file does not say, the positions are taken to form a square."""
    if not isinstance(model, VisionTransformer):
        return None
    position, default = weights.get("pos_embed"), model.pos_embed
    size = described.get("input_size", (0, 0, 0))[1:]
    if not all(size):
        if position is None or default is None or position.ndim != 3 or position.shape[1] == default.shape[1]:
            return None
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        side = math.isqrt(max(position.shape[1] - prefix, 0))
        if side == 0 or side**2 + prefix != position.shape[1]:
            return None
        size = tuple(side * patch for patch in model.patch_embed.patch_size)
    return None if size == tuple(model.patch_embed.img_size) else size


def _describe(model: nn.Module, described: dict, path: Path) -> None:
    """Replace parts of the model's configuration by what its checkpoint says.

    Raises:
        ValueError: the checkpoint names another number of classes or of channels than the model has.
    """
    own = resolve_data_config(model=model) | (getattr(model, "pretrained_cfg", None) or {})
    config, channels, names = own | described, own["input_size"][0], described.get("label_names")
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"the checkpoint {path} names {len(names)} classes, and its weights have {model.num_classes}")
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            raise ValueError(f"the checkpoint {path} has a {key} of {len(config[key])} numbers for {channels} channels")
    model.pretrained_cfg = config | {"num_classes": model.num_classes}


def _classifier(name: str) -> str | None:
    """Return the name of the layer whose rows are the classes, the first one if the model has two."""
    config = None if name in OURS or name.startswith((TORCHVISION, HUB)) else timm.get_pretrained_cfg(name)
    if config is not None:
        found = config.classifier
        return found if isinstance(found, str) else next(iter(found or ()), None)
    layers = [name for name, layer in _make(name).named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return layers[-1]


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> str | None:
    """Load the weights into the model. Return None, or a text about the first weight that does not fit the model."""
    for name, tensor in model.state_dict().items():
        found = weights.get(name, tensor)
        if found.shape != tensor.shape:
            return f"its {name} is {tuple(found.shape)}, the model's is {tuple(tensor.shape)}"
        in_8_bits = found.is_floating_point() and found.itemsize == 1  # of which torch cannot say that they are finite
        if found.is_floating_point() != tensor.is_floating_point() or in_8_bits:
            return f"its {name} is {found.dtype}, the model's is {tensor.dtype}"
        wrong = int((~found.isfinite()).sum())
        if wrong:
            return f"its weight {name} holds {wrong} values that are NaN or infinite"
    missing, unknown = model.load_state_dict(weights, strict=False)
    for names, what in ((missing, "it lacks"), (unknown, "the model does not have")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            return f"{what} {', '.join(names[:SHOWN])}{more}"
    return None
