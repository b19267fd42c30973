"""What the tests of inverted datasets share: random sparse images, and what they should be."""

import numpy as np
import torch
from hypothesis import strategies as st

from smi_fast.data.sparse import InvertedDataset


@st.composite
def sparse_images(draw):
    """(images, keep as a list of shuffled index tensors, targets, patch_size) of awkward and of square shapes."""
    n, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3]))
    rows, columns, ph, pw = (draw(st.integers(1, 4)) for _ in range(4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images = torch.rand(n, channels, rows * ph, columns * pw, generator=generator)
    counts = draw(st.lists(st.integers(1, rows * columns), min_size=n, max_size=n))
    keep = [torch.randperm(rows * columns, generator=generator)[:count] for count in counts]
    return images, keep, torch.randint(0, 1000, (n,), generator=generator), (ph, pw)


def masked(images, keep, patch_size):
    """The images with all but the kept patches black, pixel by pixel."""
    images, (ph, pw) = images.numpy(), patch_size
    columns = images.shape[3] // pw
    result = np.zeros_like(images)
    for i, row in enumerate(keep):
        for index in row.tolist():
            y, x = index // columns * ph, index % columns * pw
            result[i, :, y : y + ph, x : x + pw] = images[i, :, y : y + ph, x : x + pw]
    return torch.from_numpy(result)


def make(seed, n=3, side=8, patch=2, count=5, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.stack([torch.randperm((side // patch) ** 2, generator=generator)[:count] for _ in range(n)])
    images = torch.rand(n, 3, side, side, generator=generator)
    return InvertedDataset.from_images(images, keep, torch.arange(n), (patch, patch), **kwargs)


def ragged(seed, n):
    """Images of 1 to 16 patches of classes 0 to n - 1."""
    generator = torch.Generator().manual_seed(seed)
    keep = [torch.randperm(16, generator=generator)[: int(k)] for k in torch.randint(1, 17, (n,), generator=generator)]
    return InvertedDataset.from_images(torch.rand(n, 3, 8, 8, generator=generator), keep, torch.arange(n), (2, 2))


def assert_identical(a, b):
    for name in ("patches", "positions", "cu_seqlens", "targets"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.numpy().tobytes() == right.numpy().tobytes(), name
    assert (a.image_size, a.patch_size, a.metadata) == (b.image_size, b.patch_size, b.metadata)
