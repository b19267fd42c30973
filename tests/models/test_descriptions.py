"""What a checkpoint says about its model: classes, normalisation and image size come back with the weights."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config

from smi_fast.backbones.base import class_names
from smi_fast.models.loading import load_model
from smi_fast.models.weights import save_weights

NAME = "vit_tiny_patch16_224"
ABOUT = {
    "classes": ["church", "pompe à essence", "🐟"],
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "image_size": (48, 64),
}


@pytest.fixture(scope="module")
def model():
    return timm.create_model(NAME, img_size=(48, 64), num_classes=3).eval()


def test_a_saved_model_comes_back_with_its_description(seed, tmp_path, model):
    save_weights(tmp_path / "model.safetensors", model, **ABOUT)
    loaded = load_model(NAME, checkpoint=tmp_path / "model.safetensors")
    images, config = torch.randn(2, 3, 48, 64), resolve_data_config(model=loaded)
    assert torch.equal(loaded(images), model(images))
    assert class_names(loaded) == ABOUT["classes"]
    assert (config["mean"], config["std"], config["input_size"]) == (ABOUT["mean"], ABOUT["std"], (3, 48, 64))


def test_a_tuple_as_python_prints_it_is_read(tmp_path, model):
    header = {key: str(tuple(value)) for key, value in ABOUT.items()}
    save_file(model.state_dict(), tmp_path / "model.safetensors", header)
    loaded = load_model(NAME, checkpoint=tmp_path / "model.safetensors")
    config = resolve_data_config(model=loaded)
    assert class_names(loaded) == ABOUT["classes"]
    assert (config["mean"], config["std"], config["input_size"]) == (ABOUT["mean"], ABOUT["std"], (3, 48, 64))


def test_without_a_description_the_positions_tell_the_size_of_square_images(seed, tmp_path):
    model = timm.create_model(NAME, img_size=48, num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_model(NAME, checkpoint=tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(images), model(images))
    assert resolve_data_config(model=loaded)["input_size"] == (3, 48, 48)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("classes", '["church"]'),
        ("classes", "church"),
        ("classes", '"abc"'),
        ("classes", '{"a": 0, "b": 1, "c": 2}'),
        ("mean", "[0.5, 0.5]"),
        ("mean", "0.5"),
        ("mean", '["a", 0.5, 0.5]'),
        ("std", "[0.0, 1.0, 1.0]"),
        ("std", "[1e999, 1.0, 1.0]"),
        ("image_size", "[48.0, 64.0]"),
        ("image_size", "[48]"),
        ("image_size", "[3, 48, 64]"),
        ("image_size", "(" * 5000),
    ],
)
def test_a_description_that_does_not_fit_is_named(tmp_path, model, entry, value):
    header = {key: json.dumps(list(good)) for key, good in ABOUT.items()} | {entry: value}
    save_file(model.state_dict(), tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=entry):
        load_model(NAME, checkpoint=tmp_path / "model.safetensors")


def test_a_normalisation_of_another_number_of_channels_is_refused(tmp_path, model):
    save_weights(tmp_path / "model.safetensors", model, **ABOUT | {"mean": [0.5], "std": [0.5]})
    with pytest.raises(ValueError, match="a mean of 1 numbers for 3 channels"):
        load_model(NAME, checkpoint=tmp_path / "model.safetensors")
