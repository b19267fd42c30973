"""examples/plug_and_play.py: five changed lines make a dense inversion loop sparse, and nothing else."""

import ast
import difflib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from smi_fast import StoppingSchedule

ITERATIONS, SIDE, PATCH = 160, 32, 8
STOPS = {2: 11, 4: 7, 8: 4, 12: 2}  # iteration -> patches kept of 16, at 30 % a stopping


@pytest.fixture
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "plug_and_play.py"
    spec = importlib.util.spec_from_file_location("plug_and_play", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(seed) -> Iterator[nn.Module]:
    """A grid of 4x4 patches, float64: Adam's first steps depend on the sign of gradients, which rounding can turn."""
    torch.set_default_dtype(torch.float64)
    yield timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, depth=2, embed_dim=48, num_heads=3, num_classes=5
    ).eval()
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def seen(example, monkeypatch) -> SimpleNamespace:
    """What the loop did: offsets, images and logits of every iteration, patches of every stopping."""
    seen = SimpleNamespace(offsets=[], images=[], logits=[], gradients=[], keeps=[])
    jitter, own_loss, select_patches = example.jitter, example.own_loss, example.select_patches

    def noted_jitter(*args):
        seen.offsets.append(jitter(*args))
        return seen.offsets[-1]

    def noted_loss(logits, images, targets):
        seen.images.append(images.detach().clone())
        seen.logits.append(logits.detach().clone())
        seen.gradients.append(torch.autograd.grad(logits.square().sum(), images, retain_graph=True)[0])
        return own_loss(logits, images, targets)

    def noted_selection(*args, **options):
        seen.keeps.append(select_patches(*args, **options))
        return seen.keeps[-1]

    monkeypatch.setattr(example, "jitter", noted_jitter)
    monkeypatch.setattr(example, "own_loss", noted_loss)
    monkeypatch.setattr(example, "select_patches", noted_selection)
    return seen


def body(function) -> list[str]:
    """The lines of a function behind its docstring."""
    source = inspect.getsource(function)
    docstring, *_ = ast.parse(source).body[0].body
    assert isinstance(docstring.value, ast.Constant)
    return source.splitlines()[docstring.end_lineno :]


def pixels_of(keep: torch.Tensor) -> torch.Tensor:
    """(B, K) -> (B, 3, H, W) bool, patch by patch."""
    mask = torch.zeros(len(keep), 3, SIDE, SIDE, dtype=torch.bool)
    for image, row in enumerate(keep.tolist()):
        for patch in row:
            y, x = patch // (SIDE // PATCH) * PATCH, patch % (SIDE // PATCH) * PATCH
            mask[image, :, y : y + PATCH, x : x + PATCH] = True
    return mask


def logits_through_the_rolled_image(model, images, keep, offsets) -> torch.Tensor:
    """timm's own blocks on the patches of the rolled image nearest to where the kept ones went."""
    columns = SIDE // PATCH
    down, right = ((2 * offset + PATCH) // (2 * PATCH) for offset in offsets)
    cells = (keep // columns + down) % columns * columns + (keep % columns + right) % columns
    x = model._pos_embed(model.patch_embed(images.roll(offsets, dims=(2, 3))))
    tokens = torch.cat((torch.zeros_like(cells[:, :1]), cells + 1), dim=1)
    x = model.blocks(x.gather(1, tokens[..., None].expand(-1, -1, x.shape[2])))
    return model.forward_head(model.norm(x))


def test_the_loops_differ_in_five_lines(example):
    dense, sparse = body(example.invert_dense), body(example.invert_sparse)
    changed = 0
    for operation, i, j, k, m in difflib.SequenceMatcher(None, dense, sparse, autojunk=False).get_opcodes():
        changed += max(j - i, m - k) if operation != "equal" else 0
    assert 0 < changed <= 5
    assert max(map(len, sparse)) <= 120


def test_the_docstring_lists_each_changed_line(example):
    assert [number for number in range(1, 10) if f"\n{number}. " in example.__doc__] == [1, 2, 3, 4, 5]


def test_losses_are_the_same_until_the_first_stopping(example, model, seed):
    targets, first = torch.arange(5), min(STOPS)
    assert StoppingSchedule.paper(ITERATIONS).patches(16) == STOPS
    dense = example.invert_dense(model, targets, ITERATIONS, seed)
    sparse = example.invert_sparse(model, targets, ITERATIONS, seed)
    torch.testing.assert_close(sparse[2][:first], dense[2][:first], rtol=1e-9, atol=0)
    assert (sparse[2][first] - dense[2][first]).abs() > 1e-6
    assert dense[2][-1] < dense[2][0]
    assert sparse[2][-1] < sparse[2][0]


def test_stopped_patches_keep_their_pixels_bit_for_bit(example, model, seen, seed):
    result, _, _ = example.invert_sparse(model, torch.tensor([3, 0, 3]), ITERATIONS, seed)
    assert [keep.shape[1] for keep in seen.keeps] == list(STOPS.values())
    for stop, keep in zip(STOPS, seen.keeps, strict=True):
        stopped = ~pixels_of(keep)
        assert all(torch.equal(later[stopped], seen.images[stop][stopped]) for later in [*seen.images[stop:], result])
    moved = result != seen.images[max(STOPS)]
    assert torch.equal(moved, pixels_of(seen.keeps[-1]) & moved)
    assert moved[pixels_of(seen.keeps[-1])].float().mean() > 0.5


def test_the_model_sees_the_kept_patches_of_the_rolled_image(example, model, seen, seed):
    example.invert_sparse(model, torch.tensor([1, 2]), ITERATIONS, seed)
    every = torch.arange(16).expand(2, -1)
    for iteration, (images, offsets, logits) in enumerate(zip(seen.images, seen.offsets, seen.logits, strict=True)):
        keep = ([every, *seen.keeps])[sum(stop <= iteration for stop in STOPS)]
        expected = logits_through_the_rolled_image(model, images, keep, offsets)
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-10)
    assert any(dy % PATCH and dx % PATCH for dy, dx in seen.offsets)


def test_the_gradient_reaches_as_many_pixels_as_are_kept(example, model, seen, seed):
    example.invert_sparse(model, torch.tensor([1, 2]), ITERATIONS, seed)
    for iteration, gradient in enumerate(seen.gradients):
        kept = [16, *STOPS.values()][sum(stop <= iteration for stop in STOPS)]
        assert (gradient != 0).flatten(1).sum(1).tolist() == [kept * 3 * PATCH**2] * 2


def test_without_jitter_stopped_patches_have_no_gradient(example, model, seen, seed, monkeypatch):
    monkeypatch.setattr(example, "jitter", lambda *_: (0, 0))
    example.invert_sparse(model, torch.tensor([4]), ITERATIONS, seed)
    for stop, keep in zip(STOPS, seen.keeps, strict=True):
        assert torch.equal(seen.gradients[stop] != 0, pixels_of(keep))


def test_the_command_line_prints_both_loops(example, capsys):
    example.main(["--iterations", "5", "--classes", "8,3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "inverting ship, cat"
    for line, name, kept in zip(lines[2:], ("dense", "sparse"), (64, 14), strict=True):
        assert line.startswith(name)
        assert line.endswith(f"{kept} of 64 patches in the end")
