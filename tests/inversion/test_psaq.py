"""PSAQ-ViT's objective: against its formula, against timm's model with hooks and, where there is one, a checkout."""

import ast
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inversion_cases import small_model
from kernel_cases import cu_seqlens_of
from torch import Tensor

from smi_fast import Inverter, PackedTokens, psaq
from smi_fast.backbones.base import Outputs
from smi_fast.grid import PatchGrid
from smi_fast.inversion.priors import total_variation
from smi_fast.inversion.psaq import mean_root_of_pairs

CHECKOUT = os.environ.get("SMI_FAST_PSAQ")  # a work tree of the authors' code
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="needs SMI_FAST_PSAQ, a work tree of the published code")
GRID = PatchGrid(3, 3, (2, 2))
DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))


def outputs_of(keep: list[list[int]], dtype=torch.float64, blocks=2, classes=5) -> Outputs:
    """Outputs of a model for images of 6 x 6 pixels, with a class token before each image's patches."""
    cells = [torch.tensor(row, dtype=torch.int32) for row in keep]
    tokens = [torch.cat((torch.tensor([-1], dtype=torch.int32), row)) for row in cells]
    shared = torch.randn(4, dtype=torch.float64)
    features = {
        f"blocks.{number}.attn.heads": PackedTokens.from_sequences(
            [(torch.randn(len(row), 2, 4, dtype=torch.float64) + shared).to(dtype).requires_grad_() for row in tokens],
            tokens,
        )
        for number in range(blocks)
    }
    pixels = [torch.randn(len(row), 12, dtype=torch.float64).to(dtype).requires_grad_() for row in cells]
    return Outputs(
        logits=torch.randn(len(keep), classes, dtype=torch.float64).to(dtype).requires_grad_(),
        features=features,
        patches=PackedTokens.from_sequences(pixels, cells),
        grid=GRID,
    )


def entropies_by_hand(batch: list[Tensor], bandwidth=0.01, points=10, diagonal=True) -> Tensor:
    """Of each image's patches (K, H, D), whose class tokens have been dropped."""
    found = []
    for patches in batch:
        a = patches.mean(1)
        similarities = F.cosine_similarity(a[:, None], a[None], dim=-1)
        found.append(similarities.flatten() if diagonal else similarities[~torch.eye(len(a), dtype=torch.bool)])
    at = torch.linspace(torch.cat(found).min().item(), torch.cat(found).max().item(), points, dtype=a.dtype)
    normal = torch.distributions.Normal(at[:, None], bandwidth)
    q = torch.stack([normal.log_prob(similarities).exp().mean(1) for similarities in found]) + 1e-4
    return torch.trapezoid(-q * q.log(), at)


def pixels_by_hand(outputs: Outputs) -> list[dict]:
    """The colours (C,) of each image's pixels that were given, by their (row, column)."""
    images, grid = [], outputs.grid
    ph, pw = grid.patch_size
    for values, cells in zip(outputs.patches.sequences(), outputs.patches.indices(), strict=True):
        image = {}
        for value, cell in zip(values.view(len(values), -1, ph, pw), cells.tolist(), strict=True):
            for y in range(ph):
                for x in range(pw):
                    image[cell // grid.columns * ph + y, cell % grid.columns * pw + x] = value[:, y, x]
        images.append(image)
    return images


def tv_by_hand(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The total variation, and the mean over directions of the root of the number of differences."""
    norms, roots = [], []
    for dy, dx in DIRECTIONS:
        differences = [
            image[y, x] - image[y + dy, x + dx]
            for image in pixels_by_hand(outputs)
            for y, x in image
            if (y + dy, x + dx) in image
        ]
        norms.append(torch.cat(differences).square().sum().sqrt())
        roots.append(torch.tensor(float(sum(map(len, differences)))).sqrt())
    return sum(norms), torch.stack(roots).mean()


DENSE, KEPT = [list(range(9))] * 2, [[4, 1, 7, 8], [3, 0, 4, 6]]
RAGGED = [[0, 4, 3, 8, 7], [2, 5]]


@pytest.mark.parametrize("keep", [DENSE, KEPT, RAGGED], ids=["dense", "kept", "ragged"])
@pytest.mark.parametrize(
    "options", [{}, {"diagonal": False, "bandwidth": 0.1, "points": 4}], ids=["published", "other"]
)
def test_the_loss_and_its_gradient_are_the_formulas(keep, options, seed):
    outputs, targets = outputs_of(keep), torch.tensor([3, 0])
    objective = psaq(entropy=0.7, classification=2.0, tv=0.3, tv_target=1.2, **options)
    entropy = 0
    for block in outputs.features.values():
        entropy = entropy + entropies_by_hand([tokens[1:] for tokens in block.sequences()], **options).mean()
    variation, root = tv_by_hand(outputs)
    chosen = outputs.logits[[0, 1], targets]
    expected = -0.7 * entropy + 2 * (outputs.logits.exp().sum(1).log() - chosen).mean()
    expected = expected + 0.3 * (variation - 1.2 * root).abs()
    found = objective.loss(outputs, targets)
    torch.testing.assert_close(found, expected)
    leaves = [outputs.logits, outputs.patches.values, *(block.values for block in outputs.features.values())]
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_target_is_the_published_one_for_the_published_batch_and_scales_to_others(seed):
    images, kept = torch.empty(32, 3, 1, 1), torch.ones(1, 1, 224, 224, dtype=torch.bool)
    root = mean_root_of_pairs(images, kept.expand(32, -1, -1, -1)).item()
    drawn = [psaq(seed=seed + number).target * root for number in range(200)]
    assert 2500 <= min(drawn) < 2550
    assert 2950 < max(drawn) <= 3000.001
    quarter = mean_root_of_pairs(images[:8], kept.expand(8, -1, -1, -1)).item()
    assert psaq(seed=seed).target * quarter == pytest.approx(drawn[0] / 2)
    assert psaq(seed=seed).target == psaq(seed=seed).target == psaq(tv_target=psaq(seed=seed).target).target


def test_soft_labels_are_targets_too(seed):
    outputs, targets = outputs_of(KEPT), torch.tensor([3, 0])
    objective = psaq(entropy=0, tv=0)
    one_hot = F.one_hot(targets, 5).double()
    torch.testing.assert_close(objective.loss(outputs, one_hot), objective.loss(outputs, targets))
    mixed = 0.25 * one_hot + 0.15
    expected = -(mixed * outputs.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(objective.loss(outputs, mixed), expected)


def test_a_term_of_weight_0_reads_nothing(seed):
    outputs, targets = outputs_of(KEPT), torch.tensor([3, 0])
    bare = Outputs(outputs.logits)
    only = psaq(entropy=0, tv=0)
    assert only.features == ()
    assert torch.equal(only.loss(bare, targets), only.loss(outputs, targets))
    assert psaq().features == ("heads",)
    with pytest.raises(ValueError, match="no attention outputs"):
        psaq().loss(bare, targets)


def test_half_precision_pixels_have_a_total_variation_in_float32(seed):
    outputs, targets = outputs_of(DENSE, torch.bfloat16), torch.tensor([3, 0])
    objective = psaq(entropy=0, classification=0, tv=1.0, tv_target=0.0)
    images, _ = outputs.seen()
    expected = total_variation(images.double()).float()
    torch.testing.assert_close(objective.loss(outputs, targets).float(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stopping", ["dense", {3: 0.5}], ids=["dense", "sparse"])
def test_a_run_minimises_what_timms_model_and_the_formulas_give(stopping, seed):
    """In its first iteration, and with the published constants; later, the target is still the same."""
    model, images, steps = small_model(), [], []

    def note(step):
        images.append(step.state_dict()["images"])
        steps.append(step.loss.item())

    objective = psaq(seed=seed)
    options = {"jitter": 0, "flip": 0, "lr": 0.01, "progress": False, "dtype": torch.float32}
    Inverter(model, objective=objective, stopping=stopping, iterations=5, **options).run([0, 3], seed, note)
    heads = []
    hooks = [block.attn.proj.register_forward_pre_hook(lambda _, args: heads.append(args[0])) for block in model.blocks]
    dense = range(4) if stopping == "dense" else range(2)
    for number in dense:
        x = images[number].requires_grad_()
        heads.clear()
        logits = model(x)
        batches = [list(found.unflatten(2, (model.blocks[0].attn.num_heads, -1))[:, 1:]) for found in heads]
        entropy = sum(entropies_by_hand(batch).mean() for batch in batches)
        root = mean_root_of_pairs(x, torch.ones_like(x[:, :1]).bool())
        loss = F.cross_entropy(logits, torch.tensor([0, 3])) - entropy
        loss = loss + 0.05 * (total_variation(x) - objective.target * root).abs()
        assert steps[number + 1] == pytest.approx(loss.item(), rel=1e-3)
    for hook in hooks:
        hook.remove()


def test_a_sparse_run_lowers_the_loss_and_brings_the_variation_to_its_target(seed):
    """The total variation is that of the kept pixels."""
    objective, states = psaq(seed=seed), []
    options = {"stopping": {10: 0.3}, "iterations": 40, "lr": 0.1, "jitter": 0, "flip": 0, "progress": False}
    inverter = Inverter(small_model(), objective=objective, **options, dtype=torch.float32)
    result = inverter.run([0, 3, 1, 2], seed, lambda step: states.append(step.state_dict()))
    ratios = []
    for state in (states[0], states[-1]):
        lengths = state["cu_seqlens"].diff()
        keep = PackedTokens(None, state["positions"], state["cu_seqlens"], int(lengths.max()))
        images, kept = state["images"], inverter.grid.mask(keep)
        ratios.append((total_variation(images, kept) / mean_root_of_pairs(images, kept)).item() / objective.target)
    assert ratios[0] > 3  # of noise
    assert 0.7 < ratios[1] < 1.4
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"entropy": -1.0}, "entropy must be at least 0 and finite, got -1.0"),
        ({"classification": float("inf")}, "classification .* inf"),
        ({"tv": float("nan")}, "tv .* nan"),
        ({"tv_target": -2.0}, "tv_target .* -2.0"),
        ({"bandwidth": 0.0}, "bandwidth .* 0.0"),
        ({"points": 1}, "points .* 1"),
        ({"seed": -1}, "seed .* -1"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        psaq(**changed)


def test_single_patches_have_no_pairs_without_the_diagonal(seed):
    outputs = outputs_of([[4], [2]])
    with pytest.raises(ValueError, match="single patch"):
        psaq(diagonal=False, tv=0).loss(outputs, torch.tensor([0, 1]))


def published(name: str):
    """A function of the published code, or its class of kernel densities, without what that code imports."""
    if name == "KernelDensityEstimator":
        spec = importlib.util.spec_from_file_location("published_kde", Path(CHECKOUT) / "utils" / "kde.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.KernelDensityEstimator
    tree = ast.parse((Path(CHECKOUT) / "generate_data.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {"torch": torch}
    exec(compile(tree, "generate_data.py", "exec"), scope)
    return scope[name]


@needs_checkout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entropies_are_those_of_the_published_density(dtype, seed):
    heads = (torch.randn(4, 3, 17, 16) + torch.randn(16)).to(dtype).requires_grad_()  # (B, H, N, D), as there
    similarities = heads.mean(dim=1)[:, 1:]
    similarities = torch.cosine_similarity(similarities.unsqueeze(1), similarities.unsqueeze(2), dim=3)
    bounds = similarities.min().item(), similarities.max().item()
    x = torch.linspace(*bounds, steps=10, dtype=dtype).repeat(4, 1)
    density = published("KernelDensityEstimator")(similarities.view(4, -1))(x)
    expected = published("differential_entropy")(density, x)
    tokens = heads.transpose(1, 2).flatten(0, 1)
    packed = PackedTokens(tokens, torch.arange(-1, 16).repeat(4).int(), cu_seqlens_of([17] * 4), 17)
    found = psaq().entropies(Outputs(torch.empty(4, 5), features={"blocks.0.attn.heads": packed})).sum()
    error = 1e-4 if dtype == torch.float32 else 1e-6  # a factor of the published kernel is always float32
    tolerance = {"rtol": error, "atol": error}
    torch.testing.assert_close(found, expected, **tolerance)
    gradients = (torch.autograd.grad(loss, heads, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients, **tolerance)


@needs_checkout
def test_the_total_variation_is_the_published_one(seed):
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(total_variation(images), published("get_image_prior_losses")(images))
