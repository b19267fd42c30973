"""Folders that transformers has written: none is read beyond its files, and damage is one sentence that names it."""

import json
import shutil

import pytest
import torch
from damage_cases import cuts, flips, read_or_refused
from sneaky_cases import sneaky_files

import smi_fast

transformers = pytest.importorskip("transformers")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(seed, tmp_path):
    """A small classifier in a folder with several files of weights, and the preprocessing of its images."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder, max_shard_size="4KB")
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing | {"rescale_factor": 1 / 255}))
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def images():
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "../../vit/x", "{outside}", "", "..", "a\0b", "sub/x", 5, None]
)
def test_an_index_cannot_name_files_outside_its_folder(folder, name):
    secret = folder.parent / "secret.safetensors"
    index = json.loads((folder / INDEX).read_text())
    tensor, inside = next(iter(index["weight_map"].items()))
    shutil.copy(folder / inside, secret)  # transformers would read it
    name = str(secret) if name == "{outside}" else name
    index["weight_map"][tensor] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"which does not lie in its folder$") as caught:
        smi_fast.from_huggingface(folder)
    assert str(caught.value).startswith(f"{folder / INDEX} names the file {name!r}")


def test_links_such_as_those_of_the_hubs_cache_are_followed(folder):
    expected = smi_fast.from_huggingface(folder)(images())
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder.parent / str(number))
        file.symlink_to(folder.parent / str(number))
    assert torch.equal(smi_fast.from_huggingface(folder)(images()), expected)


def test_an_adapter_does_not_redirect_to_another_folder(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder.parent / "other")}))
    with pytest.raises(ValueError, match=f"^{folder} holds an adapter"):
        smi_fast.from_huggingface(folder)


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_does_not_choose_the_code_that_runs(folder, entry):
    """transformers would take a name with a slash for code on the hub, download it and run it."""
    expected = smi_fast.from_huggingface(folder)(images())
    change_config(folder, **{entry: "someone/kernel"}, auto_map={"AutoModel": "someone/model--code.Model"})
    assert torch.equal(smi_fast.from_huggingface(folder)(images()), expected)


def test_quantised_weights_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "unknown"})  # transformers would ignore it
    with pytest.raises(smi_fast.UnsupportedModelError, match=f"^the weights in {folder} are quantised$"):
        smi_fast.from_huggingface(folder)


def test_a_folder_with_pickled_weights_is_refused_and_they_do_not_run(folder, tmp_path):
    for file in folder.glob("model*"):
        file.unlink()
    for name, data in sneaky_files(tmp_path / "it ran"):
        (folder / "pytorch_model.bin").write_bytes(data)
        assert read_or_refused(smi_fast.from_huggingface, folder) is None, name
        assert not (tmp_path / "it ran").exists(), name


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", INDEX, "weights"])
def test_a_damaged_folder_is_refused_or_understood(seed, folder, name):
    """The files have no checksums. A changed digit in a config can be another config, and a changed weight is one.
    Whatever else happens is one sentence that names the folder."""
    expected = smi_fast.from_huggingface(folder)(images())
    path = sorted(folder.glob("*.safetensors"))[0] if name == "weights" else folder / name
    data, refused = path.read_bytes(), 0
    end = 8 + int.from_bytes(data[:8], "little") if name == "weights" else len(data)  # of the header
    damages = [damaged + data[end:] for _, damaged in flips(data[:end], seed, 30)] + cuts(data, seed, 5)
    for damaged in damages:
        path.write_bytes(damaged)
        loaded = read_or_refused(lambda _: smi_fast.from_huggingface(folder), folder)
        refused += loaded is None
        if loaded is not None and name in (INDEX, "weights"):
            assert torch.equal(loaded(images()), expected)
    assert refused > len(damages) / 3
