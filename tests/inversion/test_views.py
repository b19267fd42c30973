"""Views: pixels against torch.roll and flip, patch indices against where a patch's pixels go."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from smi_fast.inversion.views import apply_view, random_views, view_cells

offsets = st.integers(-100, 100)


@given(offsets, offsets, st.booleans())
def test_apply_view_is_roll_then_flip(dy, dx, flip):
    images = torch.rand(2, 3, 12, 20)
    rows, columns = torch.arange(12), torch.arange(20)
    columns_seen = 19 - columns if flip else columns
    expected = images[:, :, (rows - dy) % 12][:, :, :, (columns_seen - dx) % 20]
    assert torch.equal(apply_view(images, (dy, dx, flip)), expected)


@given(offsets, offsets, st.booleans())
def test_the_patch_map_is_one_to_one(dy, dx, flip):
    cells = view_cells(torch.arange(15), torch.tensor([dy, dx, flip]), (3, 5), (4, 2))
    assert sorted(cells.tolist()) == list(range(15))


@given(st.integers(-5, 5), st.integers(-5, 5), st.booleans())
def test_whole_offsets_map_a_patch_to_its_cell(down, right, flip):
    marks = torch.arange(15).view(1, 1, 3, 5).repeat_interleave(4, 2).repeat_interleave(2, 3)
    seen = apply_view(marks, (4 * down, 2 * right, flip))[0, 0, ::4, ::2].flatten()  # the patch shown by each cell
    cells = view_cells(torch.arange(15), torch.tensor([4 * down, 2 * right, flip]), (3, 5), (4, 2))
    assert torch.equal(seen[cells], torch.arange(15))


@given(offsets, offsets, st.booleans())
def test_a_patch_maps_to_the_cell_nearest_to_its_centre(dy, dx, flip):
    rows, columns, height, width = 3, 5, 4, 2
    for patch in range(15):
        cell = int(view_cells(torch.tensor(patch), torch.tensor([dy, dx, flip]), (rows, columns), (height, width)))
        y = (patch // columns + 0.5) * height + dy
        x = (patch % columns + 0.5) * width + dx
        x = columns * width - x if flip else x
        off_y = abs((cell // columns + 0.5) * height - y) % (rows * height)
        off_x = abs((cell % columns + 0.5) * width - x) % (columns * width)
        assert min(off_y, rows * height - off_y) <= height / 2
        assert min(off_x, columns * width - off_x) <= width / 2


def test_random_views_cover_the_whole_range_and_nothing_beyond(seed):
    views = random_views(20_000, (32, 64), jitter=1 / 8, flip=0.5, generator=torch.Generator().manual_seed(seed))
    assert views[:, 0].unique().tolist() == list(range(-4, 5))
    assert views[:, 1].unique().tolist() == list(range(-8, 9))
    assert abs(views[:, 2].float().mean() - 0.5) < 0.02  # six standard deviations
    still = random_views(10, (32, 64), jitter=0, flip=0, generator=torch.Generator().manual_seed(seed))
    assert not still.any()
