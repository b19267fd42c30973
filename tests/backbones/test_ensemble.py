"""An ensemble of ViTs: what it computes, and how it is inverted and teaches."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import Ensemble, InvertedDataset, Inverter, accelerate, distill
from smi_fast.backbones.base import Backbone
from smi_fast.packed import pack_keep

OPTIONS = dict(iterations=8, stopping={3: 0.4, 6: 0.4}, progress=False)


def vit(**overrides):
    options = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5) | overrides
    return VisionTransformer(**options).eval()


def test_logits_and_importance_are_means_over_the_members(seed):
    models, images = [vit().double(), vit(depth=1).double()], torch.randn(3, 3, 16, 16, dtype=torch.float64)
    keep = torch.rand(3, 16).argsort(1)[:, :6]
    ensemble = Ensemble(models)
    assert isinstance(ensemble, Backbone)
    torch.testing.assert_close(ensemble(images), sum(model(images) for model in models) / 2, rtol=1e-12, atol=1e-12)
    logits, attention = zip(*(accelerate(m)(images, keep=keep, return_attention=True) for m in models), strict=True)
    torch.testing.assert_close(ensemble(images, keep=keep), sum(logits) / 2, rtol=1e-12, atol=1e-12)
    grid, kept = ensemble.grid((16, 16)), pack_keep(keep, 3, 16, images.device)
    outputs = ensemble.outputs(replace(kept, values=grid.gather(images, kept)), grid_size=grid.size, importance=True)
    torch.testing.assert_close(outputs.logits, sum(logits) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs.importance.view(3, 6), sum(attention) / 2)


def test_equal_members_are_inverted_as_one_of_them_is(seed):
    model = vit()
    one = Inverter(model, **OPTIONS).run([0, 4], seed=1)
    several = Inverter(Ensemble([model, copy.deepcopy(model)]), **OPTIONS).run([0, 4], seed=1)
    assert torch.equal(one.keep, several.keep)
    torch.testing.assert_close(one.images, several.images, rtol=1e-4, atol=1e-4)


def test_a_patch_that_matters_to_one_member_goes_on(seed):
    """A member of huge attention to some patches decides beside one that attends to all alike."""
    plain, strict = vit(depth=1), vit(depth=1)
    for model, scale in ((plain, 0.0), (strict, 30.0)):
        model.blocks[0].attn.qkv.weight.data[:48] *= scale
    alone = Inverter(strict, **OPTIONS | {"iterations": 4, "stopping": {3: 0.5}}).run([1, 2], seed=0)
    images = (alone.images - 0.5) / 0.5
    _, importance = accelerate(strict)(images, return_attention=True)
    _, even = accelerate(plain)(images, return_attention=True)
    torch.testing.assert_close(even, torch.full_like(even, 1 / 17))
    grid, kept = accelerate(plain).grid((16, 16)), pack_keep(None, 2, 16, images.device)
    patches = replace(kept, values=grid.gather(images, kept))
    both = Ensemble([plain, strict]).outputs(patches, grid_size=grid.size, importance=True).importance.view(2, 16)
    assert torch.equal(both.topk(4).indices.sort().values, importance.topk(4).indices.sort().values)


def test_an_ensemble_teaches_the_mean_of_its_logits(seed):
    """With one fixed image, the student's head learns the probabilities of the mean."""
    ensemble, student = Ensemble([vit(), vit()]), vit()
    images = torch.rand(1, 3, 16, 16)
    dataset = InvertedDataset.from_images(images, None, torch.tensor([0]), (4, 4))
    distill(
        ensemble, student, dataset=dataset, rounds=1, steps=300, batch_size=1, temperature=1.0, lr=0.1, flip=False,
        progress=False,
    )  # fmt: skip
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (ensemble.mean, ensemble.std))
    with torch.no_grad():
        normalised = (images - mean) / std
        torch.testing.assert_close(
            student(normalised).softmax(1), ensemble(normalised).softmax(1), rtol=0.02, atol=0.01
        )


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_classes: one has 5, another 4"):
        Ensemble([vit(), vit(num_classes=4)])
    with pytest.raises(ValueError, match=r"patch_size: one has \(4, 4\), another \(8, 8\)"):
        Ensemble([vit(), vit(patch_size=8)])
    first, second = vit(num_classes=2), vit(num_classes=2)
    first.pretrained_cfg, second.pretrained_cfg = {"label_names": ("cat", "dog")}, {"label_names": ["dog", "cat"]}
    with pytest.raises(ValueError, match=r"in their classes: one has \['cat', 'dog'\], another \['dog', 'cat'\]"):
        Ensemble([first, vit(num_classes=2), second])
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])
    with pytest.raises(TypeError, match="takes a list of models, got a VisionTransformer"):
        Ensemble(vit())
    with pytest.raises(ValueError, match="come too late"):
        Ensemble([accelerate(vit())], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no features, and block were"):
        Ensemble([vit()]).outputs(None, features=["block"])
