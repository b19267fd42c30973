"""The processes that train together: their shares of a batch make up the whole of it."""

import pytest
import torch

from smi_fast.distillation.group import Group


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_mean_of_the_weighted_shares_is_the_mean_of_the_batch(seed, count, size):
    """Also where shares differ in size, or where there are more processes than images."""
    losses, index = torch.rand(count, dtype=torch.float64), torch.randperm(count)
    of_processes, seen = [], []
    for rank in range(size):
        group = Group(None, torch.device("cpu"))
        group.rank, group.size = rank, size
        (mine, same), share = group.share((index, index))
        assert torch.equal(mine, same)
        assert len(mine) > 0
        of_processes.append(share * losses[mine].mean())
        seen += mine.tolist() if share else []
    torch.testing.assert_close(sum(of_processes) / size, losses.mean())
    assert sorted(seen) == list(range(count))
