"""PatchGrid against explicit loops over pixels."""

from dataclasses import replace

import pytest
import torch

from smi_fast.grid import PatchGrid
from smi_fast.packed import pack_keep

GRID = PatchGrid.of((6, 8), (2, 2))  # 3 rows of 4 patches
KEEPS = {"uniform": torch.tensor([[5, 0, 11], [3, 4, 2]]), "ragged": [torch.tensor([7]), torch.tensor([1, 10, 6, 0])]}


@pytest.fixture
def images(seed) -> torch.Tensor:
    return torch.randn(2, 3, 6, 8)


def packed(name: str):
    return pack_keep(KEEPS[name], 2, GRID.num_patches, torch.device("cpu"))


def cut_out(images, keep) -> torch.Tensor:
    """The pixels of the kept patches, one by one."""
    return torch.stack(
        [
            images[b, :, 2 * (p // 4) : 2 * (p // 4) + 2, 2 * (p % 4) : 2 * (p % 4) + 2].flatten()
            for b, row in enumerate(keep)
            for p in row.tolist()
        ]
    )


@pytest.mark.parametrize("name", KEEPS)
def test_patches_are_gathered_and_scattered_back(images, name):
    keep = packed(name)
    patches = GRID.gather(images, keep)
    assert torch.equal(patches, cut_out(images, KEEPS[name]))
    back = GRID.scatter(patches, keep, torch.zeros_like(images))
    assert torch.equal(back, images * GRID.mask(keep))


@pytest.mark.parametrize("name", KEEPS)
def test_the_mask_holds_the_pixels_of_the_kept_patches(name):
    mask = GRID.mask(packed(name))
    for b, row in enumerate(KEEPS[name]):
        for y in range(6):
            for x in range(8):
                assert mask[b, 0, y, x] == ((y // 2) * 4 + x // 2 in row)


def test_tiles_are_the_same_memory(images):
    tiles = GRID.tiles(images)
    assert tiles.shape == (2, 3, 4, 3, 2, 2)
    assert tiles.data_ptr() == images.data_ptr()
    assert torch.equal(tiles[1, 2, 3], images[1, :, 4:6, 6:8])


def test_whole_images_are_cut_anew(images):
    cells = torch.stack([torch.randperm(12), torch.randperm(12)])
    patches = replace(pack_keep(cells, 2, 12, torch.device("cpu")), values=cut_out(images, cells))
    for size in ((3, 4), (6, 8), (1, 1)):
        grid = PatchGrid.of((6, 8), size)
        found = GRID.recut(patches, grid)
        assert torch.equal(grid.scatter(found.values, found, torch.zeros_like(images)), images)
    assert GRID.recut(patches, GRID) is patches
    for keep in KEEPS.values():
        sparse = replace(pack_keep(keep, 2, 12, torch.device("cpu")), values=cut_out(images, keep))
        with pytest.raises(ValueError, match=r"only whole images of 6x8 pixels .* into 2x2 patches of 3x4"):
            GRID.recut(sparse, PatchGrid.of((6, 8), (3, 4)))


def test_mirrored_positions_are_those_of_a_mirrored_image(images):
    positions = torch.arange(12)
    mirrored, tiles = GRID.tiles(images.flip(3)).flatten(1, 2), GRID.tiles(images).flatten(1, 2)
    assert torch.equal(mirrored[:, GRID.mirrored(positions)].flip(-1), tiles)


@pytest.mark.parametrize(("image_size", "patch_size"), [((6, 9), (2, 2)), ((5, 8), (2, 2)), ((6, 8), (0, 2))])
def test_patches_that_do_not_divide_are_refused(image_size, patch_size):
    sizes = "{}x{}.*{}x{}".format(*image_size, *patch_size)
    with pytest.raises(ValueError, match=sizes):
        PatchGrid.of(image_size, patch_size)
