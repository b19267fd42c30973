"""Reading a folder that transformers' save_pretrained has written: a model, and how its images are preprocessed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from smi_fast.backbones.support import UnsupportedModelError

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers


def read_folder(folder: Path, known: Collection[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a model of one of the `known` classes, and what timm's data config says of its preprocessing. Nothing is
    downloaded, only safetensors in this folder are read, and no code that the folder names is run.

    Raises:
        UnsupportedModelError: the model is of another class or quantised, or its images do not lie in [0, 1].
        ValueError: a file is missing or damaged, lacks weights, or points out of the folder.
        ImportError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'reading a folder needs transformers: pip install ".[transformers]" in a checkout of smi-fast'
        ) from error
    config = _json(folder / "config.json")
    kind = _architecture(config)
    _check_contents(folder, config)
    if kind not in known or not hasattr(transformers, kind):
        names = ", ".join(name for name in known if hasattr(transformers, name))
        raise UnsupportedModelError(f"the architecture in {folder / 'config.json'} is {kind!r}, not one of {names}")
    try:
        with _quiet(transformers.utils.logging):
            model, found = getattr(transformers, kind).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype="auto",
                attn_implementation="eager",  # a config.json could name code on the hub, which would be run
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise many types of errors
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())}") from error
    missing, other = set(found["missing_keys"]), sorted(map(str, found["mismatched_keys"]))
    without_pooler = sorted(name for name in missing if not name.startswith("pooler."))
    if without_pooler or other:
        raise ValueError(f"{folder} cannot be read: {(without_pooler + other)[0]} is missing or has another shape")
    if missing:  # DINO's ViT, say, was trained without a pooler, and transformers makes up a random one
        model.pooler = None
    path = folder / "preprocessor_config.json"
    return model, preprocessing(_json(path)) if path.is_file() else {}


def _architecture(config: dict[str, Any]) -> str | None:
    """Return the name of the first class in a config.json."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _check_contents(folder: Path, config: dict[str, Any]) -> None:
    """Refuse quantised weights, and a folder whose model transformers would read from somewhere else.

    The files that an index names lie in this folder, and transformers would also read ../../other.safetensors.
    An adapter_config.json would make it read the folder of another model, which that file names.
    """
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(f"the weights in {folder} are quantised")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter, and only the model that it is for can be read")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    names = _json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index} holds no weight_map")
    for name in names.values():
        if not isinstance(name, str) or "\0" in name or name in ("", "..") or name != Path(name).name:
            raise ValueError(f"{index} names the file {name!r}, which does not lie in its folder")


@contextmanager
def named(folder: Path) -> Iterator[Path]:
    """Name the folder in every error that is raised inside the `with` block, except in an ImportError."""
    try:
        yield folder
    except UnsupportedModelError as error:
        raise UnsupportedModelError(_about(folder, error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(_about(folder, error)) from error  # values of kinds that transformers does not write


def _about(folder: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if isinstance(error, ValueError) else f"cannot be read ({type(error).__name__}: {text})"
    return text if str(folder) in text else f"{folder}: {text}"


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Let transformers log no more than errors, and draw no progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def preprocessing(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a preprocessor_config.json says in the words of timm's data config, and the `crop_size` (H, W).

    Raises:
        UnsupportedModelError: images do not lie in [0, 1] before they are normalised.
    """
    rescale, factor = given.get("do_rescale", True), given.get("rescale_factor", 1 / 255)
    if not rescale or abs(factor * 255 - 1) > 1e-6:
        raise UnsupportedModelError(
            f"do_rescale is {rescale} and rescale_factor is {factor}, so images lie not in [0, 1] before normalisation"
        )
    found: dict[str, Any] = {}
    if not given.get("do_normalize", True):
        found |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    else:
        found |= {name: given[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in given}
    if given.get("resample") in range(len(RESAMPLING)):
        found["interpolation"] = RESAMPLING[given["resample"]]
    size, crop = given.get("size"), given.get("crop_size")
    if crop is not None and given.get("do_center_crop", True):
        found["crop_size"] = _height_and_width(crop)
        edge = size.get("shortest_edge") if isinstance(size, dict) else size
        return found | ({"crop_pct": found["crop_size"][0] / edge} if edge else {})
    if isinstance(size, int) or (isinstance(size, dict) and "height" in size):
        found |= {"crop_size": _height_and_width(size), "crop_mode": "squash", "crop_pct": 1.0}
    return found


def _height_and_width(size: int | dict[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
