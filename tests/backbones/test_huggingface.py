"""from_huggingface(): the numbers of transformers' own models, dense and on kept patches, and what is refused."""

import inspect
import json
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import smi_fast
from smi_fast.backbones.base import class_names
from smi_fast.backbones.huggingface import MODELS
from smi_fast.backbones.huggingface_folder import preprocessing
from smi_fast.cli import main
from smi_fast.inversion.views import random_views
from smi_fast.models.loading import load_model

transformers = pytest.importorskip("transformers")

KINDS = [kind for kind in MODELS if hasattr(transformers, kind)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
REGISTERS = "Dinov2WithRegistersForImageClassification"
TEXTS = torch.tensor([[1, 7, 9, 2], [1, 8, 8, 2], [1, 3, 5, 2]])


def small(kind: str, gain: float = 2, **options) -> nn.Module:
    """A model of two blocks for images of 16x16 pixels and 5 classes, every weight random, float64, evaluating. With a
    smaller gain it amplifies rounding less."""
    family = kind.removesuffix("Model").split("For")[0].removesuffix("VisionModelWithProjection").removesuffix("Vision")
    vision = SMALL | ({"mlp_ratio": 2} if family.startswith("Dinov2") else {"intermediate_size": 48}) | options
    if "Vision" in kind:
        config = getattr(transformers, f"{family}VisionConfig")(**{"projection_dim": 24} | vision)
    elif family in ("CLIP", "Siglip"):
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4}
        vision["projection_dim"] = text["projection_dim"] = 24
        config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, num_labels=5)
        config.projection_dim = 24
    else:
        config = getattr(transformers, f"{family}Config")(**{"num_labels": 5} | vision)
    model = getattr(transformers, kind)(config)
    for name, parameter in model.named_parameters():
        scales = parameter.ndim < 2 and name.endswith("weight")  # of a LayerNorm
        nn.init.normal_(parameter, float(scales), 0.2 if parameter.ndim < 2 else gain / parameter[0].numel() ** 0.5)
    return model.double().eval()


def output(model: nn.Module, images: Tensor, **options) -> Tensor:
    """The logits that a model of transformers computes, or its embedding of the images."""
    features = getattr(model, "get_image_features", None)
    found = model(images, **options) if features is None else features(images, **options)
    names = ("logits", "image_embeds", "pooler_output")
    return found if isinstance(found, Tensor) else next(found[name] for name in names if found.get(name) is not None)


def tower_of(model: nn.Module) -> nn.Module:
    return getattr(model, MODELS[type(model).__name__].tower, model)


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    holder = getattr(tower, "encoder", tower)
    return holder.layer if hasattr(holder, "layer") else holder.layers


def tokens_of(model: nn.Module, images: Tensor, keep: Tensor, blocks: int = 2) -> tuple[Tensor, int]:
    """The tokens of one image after some blocks, by transformers' own modules, and the number of prefix tokens."""
    tower = tower_of(model)
    x = tower.embeddings(images)
    prefix = x.shape[1] - 16
    x = x[:, torch.cat((torch.arange(prefix), prefix + keep))]
    x = tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x
    for block in blocks_of(tower)[:blocks]:
        needed = [p for p in inspect.signature(block.forward).parameters.values() if p.default is p.empty]
        masks = [None for p in needed if "mask" in p.name]
        x = block(x, *masks)
        x = x[0] if isinstance(x, tuple) else x
    return x, prefix


def definition(model: nn.Module, images: Tensor, keep: list[Tensor]) -> Tensor:
    """What a model computes of the kept patches of each image: its own modules on its own tokens, gathered."""
    kind, tower, rows = type(model).__name__, tower_of(model), []
    for number in range(len(images)):
        x, prefix = tokens_of(model, images[number : number + 1], keep[number])
        if kind != "CLIPForImageClassification":
            x = (tower.post_layernorm if hasattr(tower, "post_layernorm") else tower.layernorm)(x)
        first, mean = x[:, 0], x[:, prefix:].mean(1)
        if kind.startswith("Dinov2") and hasattr(model, "classifier"):
            rows.append(model.classifier(torch.cat((first, mean), dim=1)))
        elif kind in ("CLIPForImageClassification", "SiglipForImageClassification"):
            rows.append(model.classifier(mean))
        elif hasattr(model, "cls_classifier"):
            rows.append((model.cls_classifier(first) + model.distillation_classifier(x[:, 1])) / 2)
        elif kind.startswith("Siglip"):
            rows.append(tower.head(x))
        else:
            last = getattr(model, "classifier", getattr(model, "visual_projection", getattr(tower, "pooler", None)))
            rows.append(first if last is None else last(x) if last is getattr(tower, "pooler", None) else last(first))
    return torch.cat(rows)


def takes_any_size(kind: str) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(getattr(transformers, kind).forward).parameters


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_outputs_and_gradients_are_those_of_transformers(seed, kind):
    model = small(kind)
    converted, images = smi_fast.from_huggingface(model), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected, results = output(model, images.requires_grad_()), []
    weights = torch.randn_like(expected)
    [gradient] = torch.autograd.grad((expected * weights).sum(), images)
    for ours in (converted, smi_fast.accelerate(converted)):
        assert_equal(ours(images), expected)
        results.append(torch.autograd.grad((ours(images) * weights).sum(), images)[0])
        assert_equal(results[-1], gradient)
    assert converted.num_classes == (5 if "Classification" in kind else 0)
    assert expected.std(0).mean() > 0.05  # the images matter
    assert not any(a.data_ptr() == b.data_ptr() for a in converted.parameters() for b in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_kept_patches_give_what_transformers_modules_give_on_their_tokens(seed, kind):
    model = small(kind)
    fast, images = smi_fast.accelerate(smi_fast.from_huggingface(model)), torch.randn(3, 3, 16, 16).double()
    ragged = [torch.randperm(16)[:count] for count in (5, 16, 1)]
    keep = torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    with torch.no_grad():
        assert_equal(definition(model, images, [torch.arange(16)] * 3), output(model, images))
    images.requires_grad_()
    for kept in (keep, ragged):
        ours, theirs = fast(images, keep=kept), definition(model, images, list(kept))
        assert_equal(ours, theirs)
        weights = torch.randn_like(ours)
        gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in (ours, theirs)]
        assert_equal(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_outputs_are_those_of_transformers(seed, kind):
    model, images = small(kind, gain=0.7).float(), torch.randn(3, 3, 16, 16)
    converted = smi_fast.from_huggingface(model)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float32}
    with torch.no_grad():
        assert_equal(smi_fast.accelerate(converted)(images), output(model, images), 1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
        ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "num_register_tokens": 3, "layer_norm_eps": 1e-3}),
        ("ViTForImageClassification", {"hidden_act": "gelu_new", "qkv_bias": False}),
        ("ViTForImageClassification", {"image_size": (12, 16), "patch_size": (2, 4), "num_channels": 1}),
        ("DeiTModel", {"hidden_act": "relu", "intermediate_size": 7}),
        ("CLIPVisionModel", {"hidden_act": "gelu", "num_hidden_layers": 1}),
    ],
)
def test_settings_of_the_config_are_obeyed(seed, kind, options):
    if kind not in KINDS:
        pytest.skip(f"this version of transformers has no {kind}")
    model, size = small(kind, **options), options.get("image_size", (16, 16))
    images = torch.randn(2, options.get("num_channels", 3), *size, dtype=torch.float64)
    gray = {"mean": (0.5,), "std": (0.5,)} if images.shape[1] == 1 else {}
    with torch.no_grad():
        assert_equal(smi_fast.accelerate(smi_fast.from_huggingface(model, **gray))(images), output(model, images))


@pytest.mark.parametrize(
    "kind", ["ViTModel", "DeiTModel", "Dinov2Model", REGISTERS, "CLIPVisionModel", "SiglipVisionModel"]
)
@pytest.mark.parametrize("size", [(24, 24), (12, 20)])
def test_other_sizes_are_those_of_interpolate_pos_encoding(seed, kind, size):
    needs_option = not kind.startswith("Dinov2")
    if kind not in KINDS or (needs_option and not takes_any_size(kind)):
        pytest.skip(f"in this version of transformers, {kind} is missing or takes only images of its config's size")
    model, images = small(kind), torch.randn(2, 3, *size, dtype=torch.float64)
    options = {"interpolate_pos_encoding": True} if needs_option else {}
    converted = smi_fast.from_huggingface(model, image_size=size)
    with torch.no_grad():
        assert_equal(smi_fast.accelerate(converted)(images), output(model, images, **options))
    assert smi_fast.accelerate(converted).image_size == size


def test_pixels_that_no_patch_covers_do_not_belong_to_the_image(seed):
    """SigLIP for 384 pixels has patches of 14, and reads 378 pixels."""
    model, images = small("SiglipVisionModel", image_size=18), torch.randn(2, 3, 18, 18, dtype=torch.float64)
    fast = smi_fast.accelerate(smi_fast.from_huggingface(model))
    assert fast.image_size == (16, 16)
    with torch.no_grad():
        assert_equal(fast(images[:, :, :16, :16]), output(model, images))


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "Dinov2ForImageClassification", "SiglipVisionModel"])
def test_importance_is_transformers_attention(seed, kind):
    model, images = small(kind), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    keep = torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    _, importance = smi_fast.accelerate(smi_fast.from_huggingface(model))(images, keep=keep, return_attention=True)
    for number in range(3):
        pools = kind == "SiglipVisionModel"
        x, prefix = tokens_of(model, images[number : number + 1], keep[number], blocks=2 if pools else 1)
        tower = tower_of(model)
        if pools:
            x = tower.post_layernorm(x)
            expected = tower.head.attention(tower.head.probe, x, x)[1][0, 0]
        else:
            expected = class_attention(blocks_of(tower)[-1], x)[prefix:]
        assert_equal(importance[number].double(), expected, 1e-6)


def class_attention(block: nn.Module, x: Tensor) -> Tensor:
    """The attention of the class token to all tokens (1, N, 32), averaged over the two heads."""
    part = block.self_attn if hasattr(block, "self_attn") else block.attention
    part = getattr(part, "attention", part)
    x = (block.layer_norm1 if hasattr(block, "layer_norm1") else block.norm1)(x)
    q, k = (
        getattr(part, new if hasattr(part, new) else old)(x)[0].view(-1, 2, 16).transpose(0, 1)
        for new, old in (("q_proj", "query"), ("k_proj", "key"))
    )
    return (q[:, :1] @ k.transpose(1, 2) / 4).softmax(-1).mean(0)[0]


# ---------------------------------------------------------------------------------------------- texts as classes


def text_embeddings(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.get_text_features(TEXTS)
    return found if isinstance(found, Tensor) else found.pooler_output


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_texts_are_classes_with_transformers_logits_per_image(seed, kind):
    exact = int(transformers.__version__.split(".")[0]) > 4  # before 5, CLIP's text model fails in float64
    dtype, tolerance = (torch.float64, 1e-9) if exact else (torch.float32, 1e-4)
    model, images = small(kind).to(dtype), torch.randn(4, 3, 16, 16, dtype=dtype, requires_grad=True)
    texts = text_embeddings(model)
    converted = smi_fast.from_huggingface(model, texts, class_names=["cat", "dog", "ship"])
    fast, expected = smi_fast.accelerate(converted), model(TEXTS, images).logits_per_image
    assert (fast.num_classes, class_names(fast)) == (3, ["cat", "dog", "ship"])
    assert fast.is_plain
    weights, target = torch.randn_like(expected), expected.detach()
    [gradient] = torch.autograd.grad((expected * weights).sum(), images)
    for ours in (converted(images), fast(images)):
        assert_equal(ours, target, tolerance)
        assert_equal(torch.autograd.grad((ours * weights).sum(), images)[0], gradient, tolerance)
    bias = getattr(model, "logit_bias", torch.zeros(1))
    with torch.no_grad():  # a temperature takes the place of the model's own
        cosine = (target - bias) / model.logit_scale.exp()
        ours = smi_fast.from_huggingface(model, 3 * texts, temperature=0.05)(images)
        assert_equal(ours, 20 * cosine + bias, tolerance)


def test_a_vision_model_alone_needs_a_temperature(seed):
    model, images = small("CLIPVisionModelWithProjection"), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    texts = torch.randn(3, 24, dtype=torch.float64)
    with torch.no_grad():
        cosine = F.cosine_similarity(output(model, images)[:, None], texts[None], dim=-1)
        assert_equal(smi_fast.from_huggingface(model, texts, 0.01)(images), 100 * cosine)
    with pytest.raises(ValueError, match="has no logit_scale: give temperature"):
        smi_fast.from_huggingface(model, texts)


def test_cosine_logits_keep_float32_where_products_are_in_bfloat16(seed):
    model, images = small("CLIPModel").float(), torch.randn(4, 3, 16, 16)
    converted = smi_fast.from_huggingface(model, text_embeddings(model), temperature=0.01)
    with torch.no_grad():
        embedding = smi_fast.accelerate(smi_fast.from_huggingface(model), dtype=torch.bfloat16)(images).float()
        logits = smi_fast.accelerate(converted, dtype=torch.bfloat16)(images)
        expected = 100 * F.cosine_similarity(embedding[:, None], text_embeddings(model)[None], dim=-1)
    assert logits.dtype == torch.float32
    assert_equal(logits, expected, 1e-4)


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_inversion_towards_texts_is_a_loop_over_transformers_model(seed, kind):
    model = small(kind).float()
    converted, targets = smi_fast.from_huggingface(model, text_embeddings(model)), torch.tensor([2, 0])
    options = {"iterations": 6, "lr": 0.02, "betas": (0.5, 0.9), "jitter": 0, "flip": 0, "progress": False}
    inverter = smi_fast.Inverter(converted, stopping="dense", objective=smi_fast.deep_inversion(tv_l2=0.0), **options)
    result = inverter.run(targets, seed)

    generator = torch.Generator().manual_seed(seed)
    random_views(6, (16, 16), jitter=0, flip=0, generator=generator)
    images, losses = torch.randn(2, 3, 16, 16, generator=generator).requires_grad_(), []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (inverter.mean, inverter.std))
    optimizer = torch.optim.Adam([images], lr=0.02, betas=(0.5, 0.9))
    for _ in range(6):
        loss = F.cross_entropy(model(TEXTS, images).logits_per_image, targets)
        losses.append(loss.item())
        [images.grad] = torch.autograd.grad(loss, images)
        optimizer.step()
        images.data = torch.minimum(torch.maximum(images.data, -mean / std), (1 - mean) / std)
    torch.testing.assert_close(result.losses, torch.tensor(losses), rtol=1e-3, atol=1e-3)
    # Where a gradient is all but zero, rounding decides Adam's first steps.
    assert ((result.images - (images.detach() * std + mean)).abs() > 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_sparse_inversion_towards_texts_convinces_transformers_modules(seed, kind):
    """To the model's own modules, the patches that are left after two stoppings are nearer to their texts than the same
    patches of the noise were, and as near as to the converted model."""
    model, targets = small(kind).float(), torch.tensor([2, 0, 1, 1])
    texts = text_embeddings(model)
    converted = smi_fast.from_huggingface(model, texts, temperature=0.1)
    options = {"iterations": 60, "lr": 0.1, "jitter": 0, "flip": 0, "progress": False}
    inverter = smi_fast.Inverter(converted, stopping={5: 0.3, 10: 0.3}, **options)
    noise = torch.randn(4, inverter.backbone.num_channels, *inverter.image_size)
    result = inverter.run(targets, seed, start=noise)
    assert result.keep.shape == (4, int(int(16 * 0.7) * 0.7))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (inverter.mean, inverter.std))
    images, losses = (result.images - mean) / std, []
    with torch.no_grad():
        for pixels in (noise, images):
            embedding = definition(model, pixels, list(result.keep))
            cosine = F.cosine_similarity(embedding[:, None], texts[None], dim=-1)
            losses.append(F.cross_entropy(cosine / 0.1, targets))
        ours = smi_fast.accelerate(converted)(images, keep=result.keep)
    assert losses[1] < losses[0].clamp(min=0.1)  # noise may happen to be near its texts
    torch.testing.assert_close(F.cross_entropy(ours, targets), losses[1], rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------- folders and files


@pytest.fixture
def folder(seed, tmp_path):
    """A classifier with three named classes and the preprocessing of CLIP."""
    model = small("ViTForImageClassification", gain=0.7, num_labels=3).float()
    model.config.id2label = {0: "cat", 1: "dog", 2: "ship"}
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "size": 16})
    )
    return tmp_path / "vit"


def test_a_folder_holds_weights_names_and_preprocessing(folder, capfd):
    loaded = load_model(str(folder))
    model, images = transformers.ViTForImageClassification.from_pretrained(folder), torch.randn(2, 3, 16, 16)
    capfd.readouterr()
    fast = smi_fast.accelerate(smi_fast.from_huggingface(folder))
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        for ours in (loaded, fast):
            assert_equal(ours(images), model(images).logits, 1e-5)
    assert class_names(fast) == ["cat", "dog", "ship"]
    assert (fast.mean, fast.std, fast.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (16, 16))
    assert not loaded.training
    config = resolve_data_config(model=loaded)
    assert (config["interpolation"], config["crop_mode"], config["crop_pct"]) == ("bicubic", "squash", 1.0)


def test_a_folder_does_not_hide_the_model_that_it_is_called_like(folder, monkeypatch):
    folder.rename(folder.parent / "cifar10_vit")
    monkeypatch.chdir(folder.parent)
    assert load_model("cifar10_vit").num_classes == 10
    assert load_model("./cifar10_vit").num_classes == 3


def test_a_folder_keeps_its_dtype(seed, tmp_path):
    model = small("CLIPVisionModelWithProjection").bfloat16()
    model.save_pretrained(tmp_path)
    for name, value in smi_fast.from_huggingface(tmp_path).state_dict().items():
        assert value.dtype == torch.bfloat16, name


def test_dinov2_takes_the_size_to_which_its_folder_crops(seed, tmp_path):
    model = small("Dinov2ForImageClassification")
    model.save_pretrained(tmp_path)
    crop = {"crop_size": {"height": 12, "width": 12}, "size": {"shortest_edge": 16}, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(crop))
    converted, images = smi_fast.from_huggingface(tmp_path), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(converted(images), output(model, images))
    assert converted.pretrained_cfg["input_size"] == (3, 12, 12)
    assert converted.pretrained_cfg["crop_pct"] == 12 / 16


def test_a_vit_that_was_saved_without_a_pooler_gives_its_class_token(seed, tmp_path):
    images = torch.randn(2, 3, 16, 16)
    model = transformers.ViTModel(small("ViTModel").config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_equal(smi_fast.from_huggingface(tmp_path)(images), model(images).last_hidden_state[:, 0], 1e-5)


@pytest.mark.parametrize("name", ["ViT", "CLIP", "Bit"])
def test_images_are_preprocessed_as_by_transformers(seed, name):
    processor = getattr(transformers, f"{name}ImageProcessor")()
    given = preprocessing(json.loads(processor.to_json_string()))
    rng, size = np.random.default_rng(seed), given.pop("crop_size")
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((320, 260), Image.BICUBIC)
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    ours = create_transform((3, *size), **given)(image)
    assert ours.shape == expected.shape
    difference = (ours - expected).abs() / expected.std()  # resizing and cropping round a little differently
    assert difference.max() < 0.2
    assert difference.mean() < 0.05


def test_invert_takes_a_folder_for_a_model(folder, tmp_path, capsys):
    options = ["--iterations", "4", "--images-per-class", "1", "--stopping", "2:0.5", "--quiet", "--device", "cpu"]
    assert (
        main(["invert", "--model", str(folder), "--classes", "dog,ship", "--out", str(tmp_path / "out"), *options]) == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["images"]["target"] == [1, 2]
    assert (report["mean"], report["weights"]) == ([0.1, 0.2, 0.3], "folder")
    assert main(["invert", "--model", str(folder), "--pretrained", "--out", str(tmp_path / "no")]) == 2
    assert "holds its weights: leave --pretrained out" in capsys.readouterr().err


def test_a_model_without_classes_is_not_inverted_from_the_command_line(seed, tmp_path, capsys):
    small("CLIPVisionModel").save_pretrained(tmp_path / "clip")
    assert main(["invert", "--model", str(tmp_path / "clip"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("the model has no classes, because it has no classifier\n")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", "[]", r"config\.json holds no JSON object"),
        ("config.json", '{"architectures": ["BertModel"]}', r"config\.json is 'BertModel', not one of ViTModel"),
        ("config.json", "{}", r"config\.json is None, not one of"),
        ("model.safetensors", "nothing", "cannot be read: "),
        ("preprocessor_config.json", '{"rescale_factor": 1}', "rescale_factor is 1, so images lie not in"),
        ("preprocessor_config.json", '{"image_mean": [0.5]}', "mean has 1 values, and images have 3 channels"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        smi_fast.from_huggingface(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_weights_is_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.weight is missing"):
        smi_fast.from_huggingface(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read: "):
        smi_fast.from_huggingface(folder)


# ---------------------------------------------------------------------------------------------- what is refused


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}


def with_part(change: Callable[[nn.Module], object]) -> nn.Module:
    model = small("ViTForImageClassification")
    change(model.vit)
    return model


def shrink(norm: nn.LayerNorm) -> None:
    norm.weight = nn.Parameter(norm.weight[:16])


class Own(nn.Linear):
    """A part of the user's own."""


REFUSED = {
    "activation": (lambda: small("ViTModel", hidden_act="mish"), "hidden_act is 'mish', and only gelu, "),
    "dropout": (
        lambda: small("ViTModel", hidden_dropout_prob=0.1).train(),
        r"hidden_dropout_prob is 0\.1, .*call model.eval",
    ),
    "attention dropout": (
        lambda: small("CLIPVisionModel", attention_dropout=0.2).train(),
        r"attention_dropout is 0\.2",
    ),
    "no pooling": (lambda: small("SiglipVisionModel", vision_use_head=False), "vision_use_head is False"),
    "another model": (lambda: transformers.BertModel(transformers.BertConfig(**TINY)), "BertModel, not one of"),
    "another library": (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear, not one of transformers'"),
    "a foreign part": (
        lambda: with_part(lambda vit: setattr(vit.layernorm, "part", Own(2, 2))),
        r"layernorm\.part is a .*\.Own, which is not part of transformers",
    ),
    "two dtypes": (lambda: with_part(lambda vit: vit.layernorm.half()), "all must have one floating dtype"),
    "an unknown weight": (
        lambda: with_part(lambda vit: vit.register_parameter("scale", nn.Parameter(torch.ones(2)))),
        "the weight scale has no place in timm's VisionTransformer",
    ),
    "a weight of another shape": (
        lambda: with_part(lambda vit: shrink(vit.layernorm)),
        r"norm\.weight is \(16,\), timm's is \(32,\)",
    ),
    "a subclass": (lambda: type("Sub", (transformers.ViTModel,), {})(small("ViTModel").config), r"\.Sub, not one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_timm_cannot_compute_is_refused_by_name(seed, case):
    model, message = REFUSED[case]
    with pytest.raises(smi_fast.UnsupportedModelError, match=message):
        smi_fast.from_huggingface(model())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ViTModel", {"image_size": 18}, r"image_size 18 is not divisible into patches of \(4, 4\) pixels"),
        ("ViTModel", {"image_size": 0}, "image_size 0 is not divisible"),
        ("ViTModel", {"mean": (0.5,)}, "mean has 1 values"),
        ("ViTForImageClassification", {"class_names": ["cat"]}, "1 class_names, and the model has 5 classes"),
        ("ViTModel", {"temperature": 0.1}, r"temperature 0\.1 needs text_embeddings"),
        ("ViTModel", {"text_embeddings": torch.ones(2, 32)}, "compared with, not for ViTModel"),
        ("CLIPVisionModel", {"text_embeddings": torch.ones(2, 32)}, "compared with, not for CLIPVisionModel"),
        ("CLIPModel", {"text_embeddings": torch.ones(2, 32)}, r"are \(2, 32\), expected a tensor \(classes, 24\)"),
        ("CLIPModel", {"text_embeddings": [1.0]}, "are list, expected a tensor"),
        ("CLIPModel", {"text_embeddings": torch.ones(4, 24).index_fill(0, torch.tensor(2), 0)}, "row 2 is zero or not"),
        ("SiglipModel", {"text_embeddings": torch.full((2, 32), torch.nan)}, "row 0 is zero or not finite"),
        ("SiglipModel", {"text_embeddings": torch.ones(0, 32)}, "there is no row"),
        ("SiglipModel", {"text_embeddings": torch.ones(2, 32), "temperature": 0.0}, "must be positive and finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(seed, kind, options, message):
    with pytest.raises(ValueError, match=message):
        smi_fast.from_huggingface(small(kind), **options)


def test_positions_of_a_grid_that_is_not_square_are_not_resampled(seed):
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"image_size is \(12, 16\) in the model's config"):
        smi_fast.from_huggingface(small("ViTModel", image_size=(12, 16)), image_size=16)


def test_accelerate_and_inverter_say_how_to_convert(seed):
    for take in (smi_fast.accelerate, smi_fast.Inverter):
        with pytest.raises(
            smi_fast.UnsupportedModelError, match=r"which smi_fast\.from_huggingface\(model\) makes of it"
        ):
            take(small("ViTForImageClassification"))


def test_the_mode_of_the_model_is_kept(seed):
    assert smi_fast.from_huggingface(small("ViTModel").train()).training
    assert not smi_fast.from_huggingface(small("ViTModel")).training


def test_a_folder_without_transformers_is_refused_in_one_sentence(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[transformers\]"'):
        smi_fast.from_huggingface(folder)
    assert main(["invert", "--model", str(folder), "--out", "unused"]) == 2
    assert "needs transformers: pip install" in capsys.readouterr().err
