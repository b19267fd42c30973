"""from_torchvision(): the logits of torchvision's own models, dense and on kept patches, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.vision_transformer import ConvStemConfig

import smi_fast
from smi_fast.backbones.base import class_names


def small(**options) -> VisionTransformer:
    """Two blocks for images of 16x16 pixels and 5 classes, every weight random, float64, evaluating."""
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    return randomised(VisionTransformer(**{"num_classes": 5} | sizes | options))


def randomised(model: nn.Module, gain: float = 2) -> nn.Module:
    for name, parameter in model.named_parameters():
        scales = parameter.ndim < 2 and name.endswith("weight")  # of a LayerNorm
        nn.init.normal_(parameter, float(scales), 0.2 if parameter.ndim < 2 else gain / parameter[0].numel() ** 0.5)
    return model.double().eval()


def replaced_head(head: nn.Module) -> VisionTransformer:
    model = small()
    model.heads = head
    return randomised(model)


def definition(model: VisionTransformer, images: Tensor, keep: list[Tensor]) -> Tensor:
    """The logits of the kept patches of each image: torchvision's modules on its own tokens, gathered."""
    rows = []
    for image, kept in zip(images, keep, strict=True):
        x = torch.cat((model.class_token, model._process_input(image[None])), dim=1) + model.encoder.pos_embedding
        x = x[:, torch.cat((torch.zeros(1, dtype=torch.long), 1 + kept))]
        rows.append(model.heads(model.encoder.ln(model.encoder.layers(x))[:, 0]))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("make", "num_classes"),
    [
        (small, 5),
        (lambda: small(representation_size=20), 5),
        (lambda: replaced_head(nn.Linear(32, 7)), 7),
        (lambda: replaced_head(nn.Identity()), 0),
    ],
    ids=["plain", "pre-logits", "another head", "no head"],
)
def test_logits_and_gradients_are_those_of_torchvision(seed, make, num_classes):
    model, images = make(), torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    converted = smi_fast.from_torchvision(model)
    fast, everything = smi_fast.accelerate(converted), [torch.arange(16)] * 3
    ragged = [torch.randperm(16)[:count] for count in (5, 16, 1)]
    keep = torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    assert converted.num_classes == num_classes
    with torch.no_grad():
        torch.testing.assert_close(definition(model, images, everything), model(images), rtol=1e-9, atol=1e-9)
    for ours, theirs in (
        (converted(images), model(images)),
        (fast(images), model(images)),
        (fast(images, keep=keep), definition(model, images, list(keep))),
        (fast(images, keep=ragged), definition(model, images, ragged)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(ours)
        gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_float32_logits_are_those_of_torchvision(seed):
    model, images = randomised(small(), gain=0.7).float(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        ours = smi_fast.accelerate(smi_fast.from_torchvision(model))(images)
        torch.testing.assert_close(ours, model(images), rtol=1e-5, atol=1e-5)


def test_names_and_normalisation_are_those_given(seed):
    names = ["cat", "dog", "ship", "truck", "deer"]
    fast = smi_fast.accelerate(smi_fast.from_torchvision(small(), std=(0.1, 0.2, 0.3), class_names=names))
    assert (class_names(fast), fast.std, fast.image_size) == (names, (0.1, 0.2, 0.3), (16, 16))
    assert fast.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (resnet18, r"torchvision\.models\.resnet\.ResNet, not torchvision's own ViT"),
        (
            lambda: small(conv_stem_configs=[ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]),
            r"the weight conv_proj\.\S+ has no place",
        ),
        (lambda: small(norm_layer=nn.RMSNorm), r"the weight of blocks\.0\.norm1\.bias is missing, timm's is \(32,\)"),
        (lambda: small(dropout=0.1).train(), r"dropout is 0\.1, .* call model\.eval\(\) first"),
    ],
    ids=["a CNN", "a stem", "another norm", "dropout"],
)
def test_what_timm_cannot_compute_is_refused_by_name(seed, make, message):
    with pytest.raises(smi_fast.UnsupportedModelError, match=message):
        smi_fast.from_torchvision(make())


def test_accelerate_says_how_to_convert(seed):
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"smi_fast\.from_torchvision\(model\) makes of it"):
        smi_fast.accelerate(small())
