"""The mode `published=True`, against the authors' own loop in a checkout."""

import random

import timm
import torch
from published_cases import needs_checkout, published_model, published_synthesis, with_weights_at_random

from smi_fast.inversion.presets import InversionSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STOPS = {20: 0.3, 40: 0.3, 60: 0.3, 80: 0.3}


def published_views(iterations: int, generator: torch.Generator) -> torch.Tensor:
    """The views that the published loop draws from Python's random numbers, for 224x224 pixels: (iterations, 3)."""
    draw, views = random.Random(generator.initial_seed()), torch.zeros(iterations, 3, dtype=torch.int32)
    for iteration in range(iterations):
        if iteration not in STOPS and iteration + 1 not in STOPS:
            offsets = draw.randint(-28, 28), draw.randint(-28, 28)
            views[iteration] = torch.tensor([*offsets, draw.random() > 0.5])
    return views


@needs_checkout
def test_a_published_run_keeps_the_patches_and_makes_the_images_of_the_published_code(seed, monkeypatch, tmp_path):
    """From the same noise, through the same views: four stoppings in 100 iterations, 16x16 patches, float32."""
    model = timm.models.VisionTransformer(
        img_size=224, patch_size=16, embed_dim=48, depth=3, num_heads=3, num_classes=7
    )
    model.pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 224, 224)}
    theirs, their_tokens = published_model(with_weights_at_random(model).eval(), monkeypatch), []
    theirs.register_forward_hook(lambda module, args, output: their_tokens.append(output[2]))
    random.seed(seed)
    torch.manual_seed(seed)
    noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
    synthesis = published_synthesis(theirs, tmp_path / "pool", mean=MEAN, std=STD, patch_size=16, iterations=100)
    their_images = synthesis.synthesize(torch.tensor([1, 4]), 197, list(STOPS), list(STOPS.values()))

    settings, steps = InversionSettings(iterations=100, stopping=STOPS, published=True), []
    inverter = settings.inverter(model, views=published_views, dtype=torch.float32, progress=False)
    note = lambda step: steps.append((step.keep, step.state_dict()["images"]))  # noqa: E731
    result = inverter.run([1, 4], seed, note, start=noise)
    for stop, count in zip(STOPS, (137, 95, 66, 46), strict=True):
        assert steps[stop][0].shape == (2, count)
        assert torch.equal(steps[stop][0], their_tokens[stop][:, 1:].sort(1).values - 1)
    assert result.keep.shape == (2, 47)
    images = steps[-1][1] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(images, their_images["synthetic"], rtol=0, atol=1e-3)
    torch.testing.assert_close(result.images, their_images["masked_synthetic"], rtol=0, atol=1e-3)
