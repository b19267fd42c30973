"""load_model() loads models by name and weights from files, and names what is wrong with a broken file."""

import random
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from cnn_cases import at_random
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn

from smi_fast import accelerate
from smi_fast.backbones.base import class_names
from smi_fast.models import CIFAR10_CLASSES, cifar10_resnet20, cifar10_student, cifar10_vit
from smi_fast.models.loading import load_model


@pytest.fixture
def test_vit(seed) -> torch.nn.Module:
    return timm.create_model("test_vit", num_classes=7).eval()


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w}])
def test_torch_checkpoints_load_with_their_number_of_classes(test_vit, tmp_path, wrap):
    torch.save(wrap(test_vit.state_dict()), tmp_path / "weights.pth")
    loaded = load_model("test_vit", checkpoint=tmp_path / "weights.pth")
    assert not loaded.training
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(loaded(images), test_vit(images))


def test_safetensors_checkpoints_load(test_vit, tmp_path):
    save_file(test_vit.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model("test_vit", checkpoint=tmp_path / "weights.safetensors")
    for name, value in test_vit.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_checkpoint_of_the_model_inside_loads(seed, tmp_path):
    model = cifar10_vit(pretrained=False)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    loaded = load_model(checkpoint=tmp_path / "own.pth")
    assert torch.equal(loaded.head.weight, model.head.weight)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_checkpoint_is_refused_by_name(test_vit, tmp_path, suffix, size):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(test_vit.state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"weights\{suffix} cannot be read"):
        load_model("test_vit", checkpoint=path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Sneaky:
        def __reduce__(self):
            return (print, ("this must never run",))

    torch.save({"head.weight": Sneaky()}, tmp_path / "sneaky.pth")
    with pytest.raises(ValueError, match=r"sneaky.pth cannot be read"):
        load_model("test_vit", checkpoint=tmp_path / "sneaky.pth")


def test_a_checkpoint_of_another_model_is_refused(test_vit, tmp_path):
    torch.save(test_vit.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"does not fit test_vit2"):
        load_model("test_vit2", checkpoint=tmp_path / "weights.pth")


def test_models_of_the_hub_are_read_from_its_cache_where_it_cannot_be_reached(seed, tmp_path, monkeypatch):
    model = timm.create_model("test_vit", num_classes=3).eval()
    folder = tmp_path / "models--me--mine"
    snapshot = folder / "snapshots" / ("0" * 40)
    save_for_hf(model, snapshot, model_config={"label_names": ["church", "horn", "tench"]})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded, images = load_model("hf-hub:me/mine"), torch.randn(1, 3, 160, 160)
    assert torch.equal(loaded(images), model(images))
    assert class_names(loaded) == ["church", "horn", "tench"]
    save_file({name: -value for name, value in model.state_dict().items()}, tmp_path / "own.safetensors")
    own = load_model("hf-hub:me/mine", checkpoint=tmp_path / "own.safetensors")
    assert torch.equal(own.head.weight, -model.head.weight)
    with pytest.raises(ValueError, match=r"hf-hub:me/other cannot be downloaded: http://127.0.0.1:9 cannot be reached"):
        load_model("hf-hub:me/other")
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9 cannot be reached"):
        load_model("hf-hub:me/other", checkpoint=tmp_path / "own.safetensors")


def test_a_hub_that_answers_with_an_error_counts_as_one_that_cannot_be_reached(tmp_path, monkeypatch):
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=503), close=lambda: None)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"hf-hub:me/other cannot be downloaded: http://127.0.0.1:9 answers 503"):
        load_model("hf-hub:me/other")


def test_a_vit_takes_images_of_another_size_with_timms_positions(seed, tmp_path):
    model = timm.create_model("test_vit", num_classes=4).eval()
    torch.nn.init.normal_(model.pos_embed)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("test_vit", checkpoint=tmp_path / "w.safetensors", image_size=(96, 192))
    resampled = timm.create_model("test_vit", num_classes=4, img_size=(96, 192)).eval()
    resampled.load_state_dict(checkpoint_filter_fn(model.state_dict(), resampled))
    images = torch.randn(2, 3, 96, 192)
    torch.testing.assert_close(loaded(images), resampled(images))
    assert accelerate(loaded).image_size == (96, 192)
    assert loaded.pretrained_cfg["input_size"] == (3, 96, 192)


def test_unknown_names_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean deit_tiny"):
        load_model("deit_tinny_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match=r"nowhere\.pth does not exist"):
        load_model("test_vit", checkpoint=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="pretrained=True downloads"):
        load_model("test_vit")
    with pytest.raises(ValueError, match="not both"):
        load_model("test_vit", pretrained=True, checkpoint=tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "holds no state dict"),
        (torch.zeros(3), "holds no state dict"),
        ({3: torch.zeros(3)}, "holds no state dict"),
        ({"state_dict": 5}, "holds no state dict"),
        ({"head.weight": torch.tensor(1.0)}, r"its head.weight is \(\), the model's is \(1000, 64\)"),
        (
            {"head.weight": torch.zeros(7, 64, dtype=torch.int8)},
            "its head.weight is torch.int8, the model's is torch.f",
        ),
        ({"head.weight": torch.zeros(7, 64)}, r"it lacks cls_token, pos_embed, [\w.]+ and \d+ more$"),
        ({"head.weight": torch.zeros(7, 64).to_sparse()}, "its head.weight is torch.sparse_coo$"),
        ({"head.weight": torch.full((7, 64), torch.nan)}, "its weight head.weight holds 448 values that are NaN"),
        ({"head.weight": TypeError}, "cannot be read: it is damaged, or holds more than weights$"),
    ],
    ids=["list", "tensor", "int keys", "no dict", "0-d", "int8", "missing keys", "sparse", "nan", "unsafe"],
)
def test_files_that_hold_more_than_weights_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"checkpoint .*weights\.pth .*{message}") as caught:
        load_model("test_vit", checkpoint=tmp_path / "weights.pth")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    assert "weights_only" not in str(caught.value)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        load_model("test_vit", checkpoint=tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"config\.json cannot be read: .*No such file"):
        load_model(str(tmp_path))


def test_a_name_with_an_unknown_tag_is_refused(test_vit, tmp_path):
    torch.save(test_vit.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"test_vit\.nonsense cannot be made: Invalid pretrained tag"):
        load_model("test_vit.nonsense", checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"num_classes": 5}),
        ("cifar10_student", {}),
        ("cifar10_resnet20", {"num_classes": 4}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_a_checkpoint_decides_the_number_of_classes(seed, tmp_path, name, options):
    build = {"cifar10_student": cifar10_student, "cifar10_resnet20": cifar10_resnet20}.get(name)
    model = timm.create_model(name, **options) if build is None else build(pretrained=False, **options)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model(name, checkpoint=tmp_path / "weights.safetensors")
    assert loaded.num_classes == model.num_classes
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_classes_have_the_models_names():
    assert class_names(cifar10_vit(pretrained=False)) == list(CIFAR10_CLASSES)
    with torch.device("meta"):
        assert class_names(timm.create_model("deit_tiny_patch16_224"))[:2] == ["tench", "goldfish"]
        assert class_names(timm.create_model("deit_tiny_patch16_224", num_classes=3)) == ["0", "1", "2"]


def test_damaged_torch_files_are_one_sentence(tmp_path, seed):
    path = tmp_path / "old.pth"
    torch.save(cifar10_vit(False, depth=1).state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    draw = random.Random(seed).randrange
    for _ in range(60):
        damaged = bytearray(whole[: draw(1, len(whole))] if draw(2) else whole)
        damaged[draw(min(len(damaged), 4096))] ^= 1 << draw(8)
        path.write_bytes(damaged)
        with suppress(ValueError):
            load_model("cifar10_vit", checkpoint=path)


@pytest.mark.parametrize("classes", [1000, 4])
def test_torchvisions_models_load_with_their_statistics_and_describe_their_data(tmp_path, seed, classes):
    model = at_random(lambda: torchvision.models.mobilenet_v2(num_classes=classes), torch.float32)
    weights = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(weights, tmp_path / "weights.pth")  # torchvision's older files hold no counts of batches
    loaded = load_model("torchvision/mobilenet_v2", checkpoint=tmp_path / "weights.pth")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert class_names(loaded)[-1] == ("toilet tissue" if classes == 1000 else "3")
    config = timm.data.resolve_data_config(model=loaded)
    expected = torchvision.models.MobileNet_V2_Weights.DEFAULT.transforms()
    assert config["mean"] == tuple(expected.mean)
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == pytest.approx(224 / 232)
    transform, picture = (
        timm.data.create_transform(**config),
        Image.fromarray((np.random.rand(300, 300, 3) * 255).astype("uint8")),
    )
    torch.testing.assert_close(transform(picture), expected(picture), rtol=0, atol=0.05)


def test_torchvisions_vits_load_as_timms(tmp_path, seed, monkeypatch):
    small = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}

    def small_vit(name, weights, **options):
        return torchvision.models.VisionTransformer(**small, **options)

    monkeypatch.setattr(torchvision.models, "get_model", small_vit)
    model = small_vit("vit_b_16", None, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded, images = load_model("torchvision/vit_b_16", checkpoint=tmp_path / "weights.pth"), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(accelerate(loaded)(images), model(images))
    assert class_names(loaded) == ["0", "1", "2"]


def test_torchvisions_names_are_checked():
    with pytest.raises(ValueError, match=r"torchvision [\d.+a-z]+ has no model 'torchvision/resnet19'; did you mean"):
        load_model("torchvision/resnet19", pretrained=True)
    with pytest.raises(ValueError, match="pretrained=True downloads torchvision's"):
        load_model("torchvision/resnet18")


def test_a_checkpoint_of_a_cnn_needs_its_statistics(tmp_path, seed):
    weights = cifar10_resnet20(False).state_dict()
    del weights["bn1.running_var"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"it lacks bn1\.running_var$"):
        load_model("cifar10_resnet20", checkpoint=tmp_path / "weights.safetensors")
