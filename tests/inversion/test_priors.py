"""Priors against explicit loops over pixels."""

import pytest
import torch
from inversion_cases import total_variation_by_pairs

from smi_fast.inversion.priors import ImagePrior, l2_norm, total_variation, total_variation_l1


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)


def random_mask(images: torch.Tensor, share: float | None) -> torch.Tensor | None:
    return None if share is None else torch.rand(len(images), 1, *images.shape[2:]) < share


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0, None])
def test_total_variation_is_over_pairs_of_kept_pixels(images, share):
    kept = random_mask(images, share)
    mask = torch.ones(2, 1, 6, 8, dtype=torch.bool) if kept is None else kept
    ours, expected = total_variation(images, kept), total_variation_by_pairs(images, mask)
    torch.testing.assert_close(ours, expected)
    if expected.requires_grad:
        got, wanted = (torch.autograd.grad(3 * value, images)[0] for value in (ours, expected))
        torch.testing.assert_close(got, wanted)
        assert (got[~mask.expand_as(got)] == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.5, None])
def test_the_l1_form_is_the_mean_over_pairs_of_kept_pixels(images, share):
    kept = random_mask(images, share)
    mask = torch.ones(2, 1, 6, 8, dtype=torch.bool) if kept is None else kept
    expected = torch.zeros((), dtype=torch.float64)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pairs = [
            (images[b, :, y, x] - images[b, :, y + dy, x + dx]).abs().mean()
            for b in range(2)
            for y in range(6 - dy)
            for x in range(max(0, -dx), 8 - max(0, dx))
            if mask[b, 0, y, x] and mask[b, 0, y + dy, x + dx]
        ]
        expected = expected + sum(pairs) / max(1, len(pairs))
    torch.testing.assert_close(total_variation_l1(images, kept), expected)


@pytest.mark.parametrize("share", [0.5, None])
def test_norms_over_each_image_are_those_of_the_images_alone(images, share):
    kept = random_mask(images, share)
    for term in (total_variation, total_variation_l1, l2_norm):
        alone = [term(images[i : i + 1], None if kept is None else kept[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(term(images, kept, norm="image"), sum(alone))
        assert (term(images, kept) - sum(alone)).abs() > 0.1


def test_second_order_gradients_are_right(images):
    assert torch.autograd.gradgradcheck(lambda x: total_variation(x, random_mask(x, None)), images[:1, :1, :3, :3])


def test_gradients_are_zero_not_nan_where_a_norm_is_zero():
    flat = torch.ones(1, 3, 4, 4, requires_grad=True)
    assert torch.autograd.grad(total_variation(flat), flat)[0].abs().max() == 0
    zero = torch.zeros(1, 5, requires_grad=True)
    assert torch.autograd.grad(l2_norm(zero), zero)[0].abs().max() == 0


def test_pixels_that_are_not_kept_are_not_read(images):
    kept = random_mask(images, 0.5)
    lost = torch.where(kept, images, float("nan"))
    for term in (total_variation, total_variation_l1, l2_norm):
        torch.testing.assert_close(term(lost, kept), term(images, kept))


@pytest.mark.parametrize(
    ("options", "message"), [({"tv_l2": -1.0}, "-1"), ({"l2": float("inf")}, "inf"), ({"norm": "pixel"}, "pixel")]
)
def test_a_wrong_prior_is_refused_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        ImagePrior(**options)


@pytest.mark.parametrize("term", [total_variation, total_variation_l1, l2_norm])
def test_a_term_refuses_another_norm(images, term):
    with pytest.raises(ValueError, match="'pixel'"):
        term(images, None, "pixel")
