"""The file of a quantised model: the same bits come back, and damaged or foreign files are refused."""

import json
import random
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from damage_cases import cuts, read_or_refused
from safetensors import safe_open
from safetensors.torch import save_file

from smi_fast.data.sparse import InvertedDataset
from smi_fast.models import cifar10_vit
from smi_fast.quantization import QuantizedViT, quantize


@pytest.mark.parametrize("weight_bits", [8, 4, 3])
def test_saved_model_comes_back_with_the_same_bits(seed, tmp_path, weight_bits):
    model = cifar10_vit(depth=2, pretrained=False, num_classes=11, in_chans=1, qkv_bias=False, init_values=0.1)
    images = torch.randn(4, 1, 32, 32)
    quantized = quantize(model, images, weight_bits, 7)
    quantized.save(tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match="exists already"):
        quantized.save(tmp_path / "model.safetensors")
    quantized.save(tmp_path / "model.safetensors", overwrite=True)
    loaded = QuantizedViT.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), quantized(images))
    for name, value in quantized.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.ranges == quantized.ranges
    assert loaded.pretrained_cfg == quantized.pretrained_cfg
    assert (loaded.weight_bits, loaded.activation_bits) == (weight_bits, 7)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    weights = sum(layer.weight.numel() for layer in quantized.layers())
    others = sum(value.numel() for value in quantized.state_dict().values()) - weights
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - weights * (1 if weight_bits > 4 else 0.5) - 4 * others < 16_000  # the header


def rewrite(path, change, checksum: bool = True) -> None:
    """Change the header's text; the checksum is that of the changed text, or left out."""
    with safe_open(path, "pt") as file:
        text = change(file.metadata()["smi_fast_quantized"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        described = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        value = zlib.crc32(described + tensor.numpy().tobytes(), value)
    save_file(tensors, path, {"smi_fast_quantized": text} | ({"checksum": str(value)} if checksum else {}))


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_every_flipped_bit_is_found(seed, tmp_path, weight_bits):
    path = tmp_path / "model.safetensors"
    quantize(cifar10_vit(pretrained=False, depth=1), torch.randn(2, 3, 32, 32), weight_bits, 8).save(path)
    data = path.read_bytes()
    generator = random.Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [generator.randrange(header) for _ in range(40)] + [generator.randrange(len(data)) for _ in range(60)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        print(f"byte {place} of {len(data)}, header {header}: {data[place]} became {damaged[place]}")
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            QuantizedViT.load(path)


def test_every_cut_is_found(model, images, seed, tmp_path):
    path = tmp_path / "model.safetensors"
    quantize(model, images).save(path)
    for cut in cuts(path.read_bytes(), seed, 40):
        path.write_bytes(cut)
        assert read_or_refused(QuantizedViT.load, path) is None, len(cut)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_are_read(version, tmp_path):
    """A file that version 2 has written, and the logits that it gave. Version 1 differed by having no checksum."""
    path = Path(shutil.copy(Path(__file__).parent / "version_2.safetensors", tmp_path))
    if version == 1:
        rewrite(path, lambda text: text.replace('"format_version": 2', '"format_version": 1'), checksum=False)
    model = QuantizedViT.load(path)
    assert (model.weight_bits, model.activation_bits) == (4, 8)
    expected = [
        [0.011341068893671036, 0.2873070538043976, 0.4593132734298706],
        [0.02268213778734207, 0.2873070538043976, 0.46687397360801697],
    ]
    logits = model(torch.linspace(-2, 2, 2 * 1024).view(2, 1, 32, 32))
    step = model.quantizers["logits"].unit
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=0, atol=1.5 * step)  # another CPU sums otherwise
    model.save(tmp_path / "again.safetensors")
    again = QuantizedViT.load(tmp_path / "again.safetensors")
    images = torch.randn(3, 1, 32, 32)
    assert torch.equal(again(images), model(images))


def test_foreign_files_are_refused(model, images, tmp_path):
    path = tmp_path / "model.safetensors"
    quantize(model, images).save(path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        quantize(model, images).save(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        QuantizedViT.load(tmp_path / "other.safetensors")
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete quantised model"):
        QuantizedViT.load(path)
    path.write_bytes(data)
    rewrite(path, lambda text: text.replace('"format_version": 3', '"format_version": 9'))
    with pytest.raises(ValueError, match="format version 9 is newer than 3"):
        QuantizedViT.load(path)
    rewrite(path, lambda text: text.replace('": 9', '": 3').replace('"gelu"', '"gulu"'))
    with pytest.raises(ValueError, match=r"not a quantised model that is understood .*gulu"):
        QuantizedViT.load(path)
    path.write_bytes(data.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(ValueError, match=r"not a quantised model that is understood .*no checksum"):
        QuantizedViT.load(path)
    keep = torch.zeros(5, 1).long()
    InvertedDataset.from_images(torch.rand(5, 3, 32, 32), keep, keep[:, 0], (8, 8)).save(path, overwrite=True)
    with pytest.raises(ValueError, match="so it is not a quantised model"):
        QuantizedViT.load(path)


SETTINGS = {  # a change of a setting that does not fit the tensors
    "weight_bits": 4,
    "image_size": [96 * 10**6] * 2,
    "patch_size": [96 * 10**6] * 2,
    "num_channels": 96 * 10**6,
    "num_classes": 96 * 10**6,
    "inputs": 96 * 10**6,
    "heads": 96 * 10**6,
    "scale": "large",
    "gated": True,
    "stages": [["attn"], ["mlp"], ["other"]],
    "class": "Norm",
    "eps": [],
}


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_do_not_fit_the_tensors_are_refused_at_no_cost(model, images, tmp_path, name, weight_bits):
    path = tmp_path / "model.safetensors"
    quantize(model, images, weight_bits).save(path)

    def claim(text: str) -> str:
        header = json.loads(text)
        changed = header["model"]
        while name not in changed or (name == "class" and changed["class"] in ("QuantizedViT", "Quantizer")):
            parts = list(changed["parts"].values())
            changed = next(part for part in parts if f'"{name}": ' in json.dumps(part) and part["class"] != "Quantizer")
        assert changed[name] != SETTINGS[name] or name == "weight_bits"
        changed[name] = SETTINGS[name]
        return json.dumps(header)

    rewrite(path, claim)
    if name == "weight_bits" and weight_bits == 4:
        return
    before = resource.getrusage(resource.RUSAGE_SELF)
    assert read_or_refused(QuantizedViT.load, path) is None
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 200_000  # KB


def test_names_in_the_file_are_those_of_version_3(model, images, tmp_path):
    """Files that are there already have these names, so code may not change them."""
    quantize(model, images).save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["smi_fast_quantized"])
        tensors = set(file.keys())
    places = ["input", "patch_embed", "tokens", "pos_embed", "embedded", "norm", "logits"]
    in_block = [f"attn.{place}" for place in ("norm", "qkv", "scores", "attention", "proj", "sum")]
    in_block += [f"mlp.{place}" for place in ("norm", "act", "fc2", "sum")]
    places += [f"blocks.{number}.{place}" for number in range(2) for place in in_block]
    assert header["places"].keys() == set(places)
    assert all(place.keys() == {"low", "high", "scale", "zero_point"} for place in header["places"].values())
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    layers = ["patch_embed", "head"] + [f"blocks.{b}.{layer}" for b in range(2) for layer in inner]
    norms = ["norm"] + [f"blocks.{b}.{part}.norm" for b in range(2) for part in ("attn", "mlp")]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "weight_scale", "bias")}
    expected |= {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")} | {"prefix_tokens", "pos_embed"}
    assert tensors == expected


def test_a_model_without_calibration_is_neither_saved_nor_exported(tmp_path):
    model = QuantizedViT(cifar10_vit(False, depth=1))
    for use in (lambda: model.save(tmp_path / "model.safetensors"), model.export):
        with pytest.raises(ValueError, match="not calibrated"):
            use()
    assert not list(tmp_path.iterdir())
