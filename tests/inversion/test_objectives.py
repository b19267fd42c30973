"""Loss terms against explicit loops."""

import pytest
import torch
import torch.nn.functional as F

from smi_fast import deep_inversion
from smi_fast.inversion.objectives import KeptPixels, as_objective, l2_norm, total_variation


def total_variation_by_pairs(images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbouring pixels written out."""
    batch, _, height, width = images.shape
    total = images.new_zeros(())
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = [
            (images[b, :, y, x] - images[b, :, y + dy, x + dx]).square().sum()
            for b in range(batch)
            for y in range(height - dy)
            for x in range(width)
            if 0 <= x + dx < width and kept[b, 0, y, x] and kept[b, 0, y + dy, x + dx]
        ]
        total = total + (torch.stack(squares).sum().sqrt() if squares else 0)
    return total


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)


def random_kept(images: torch.Tensor, count: int) -> KeptPixels:
    """`count` patches of 2x2 pixels an image."""
    return KeptPixels(torch.stack([torch.randperm(12)[:count] for _ in images]), (3, 4), (2, 2))


@pytest.mark.parametrize("count", [1, 5, 11, 12, None])
def test_total_variation_sums_the_norms_over_pairs_of_kept_pixels(images, count):
    kept = None if count is None else random_kept(images, count)
    mask = torch.ones(2, 1, 6, 8, dtype=torch.bool) if kept is None else kept.mask
    ours, expected = total_variation(images, kept), total_variation_by_pairs(images, mask)
    torch.testing.assert_close(ours, expected)
    got, wanted = (torch.autograd.grad(3 * value, images)[0] for value in (ours, expected))
    torch.testing.assert_close(got, wanted)
    assert (got[~mask.expand_as(got)] == 0).all()


def test_the_mask_of_kept_pixels_is_that_of_their_patches(images):
    kept = random_kept(images, 5)
    for image in range(2):
        for y in range(6):
            for x in range(8):
                assert kept.mask[image, 0, y, x] == ((y // 2) * 4 + x // 2 in kept.keep.indices()[image])
    assert torch.equal(kept.scatter(kept.gather(images), torch.zeros_like(images)), images * kept.mask)


def test_gradients_are_zero_not_nan_where_a_norm_is_zero():
    flat = torch.ones(1, 3, 4, 4, requires_grad=True)
    assert torch.autograd.grad(total_variation(flat), flat)[0].abs().max() == 0
    zero = torch.zeros(5, requires_grad=True)
    assert torch.autograd.grad(l2_norm(zero), zero)[0].abs().max() == 0


def test_deep_inversion_is_cross_entropy_and_the_weighted_priors(images):
    logits, targets = torch.randn(2, 5, dtype=torch.float64), torch.tensor([3, 1])
    kept = KeptPixels(torch.tensor([[1, 2, 5, 6], [1, 2, 5, 6]]), (3, 4), (2, 2))
    loss = deep_inversion(tv_l2=0.3, l2=0.7).loss(logits, images, targets, kept)
    expected = (
        -logits.log_softmax(1)[[0, 1], targets].mean()
        + 0.3 * total_variation_by_pairs(images, kept.mask)
        + 0.7 * images[:, :, :4, 2:6].norm()
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        deep_inversion(tv_l2=0).loss(logits, images, targets, None).double(), F.cross_entropy(logits, targets)
    )


def test_a_plain_function_serves_as_an_objective(images):
    objective = as_objective(lambda logits, images, targets: logits.sum() + images.sum() + targets.sum())
    value = objective.loss(torch.ones(2), images, torch.tensor([4]), None)
    torch.testing.assert_close(value, 6 + images.sum())
    with pytest.raises(TypeError, match="42"):
        as_objective(42)
