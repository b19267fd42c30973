"""Seeds: runs have no batch in common, and all bits of a seed count."""

import numpy as np
import pytest
import torch

from smi_fast import Inverter, StoppingSchedule
from smi_fast.models import cifar10_vit
from smi_fast.seeds import batch_seed, check_seed, seeded_generator


def test_batches_of_different_runs_have_different_seeds():
    seeds = {
        batch_seed(seed, number) for seed in [*range(190), *(2**k for k in range(54, 64))] for number in range(200)
    }
    assert len(seeds) == 200 * 200


def test_high_bits_of_a_seed_count(seed):
    short, long, longer = (torch.rand(1000, generator=seeded_generator(s)) for s in (seed, seed + 2**32, seed + 2**63))
    assert torch.equal(short, torch.rand(1000, generator=torch.Generator().manual_seed(seed)))
    assert not torch.isclose(short, long).float().mean() > 0.01
    assert not torch.isclose(long, longer).float().mean() > 0.01


def test_a_long_seed_fills_the_whole_mersenne_twister(seed):
    """Compared with numpy's MT19937 of the same state; torch takes 24 bits of each word."""
    twister = np.random.MT19937()
    words = np.random.SeedSequence(seed + 2**40).generate_state(624)
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = twister.random_raw(2000) % 2**24 / 2**24
    found = torch.rand(2000, generator=seeded_generator(seed + 2**40))
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))


def test_an_inversion_depends_on_all_bits_of_its_seed(seed):
    model = cifar10_vit(pretrained=False, depth=1)
    options = dict(stopping=StoppingSchedule.dense(), iterations=1, progress=False)
    low, high = (Inverter(model, **options).run([0], seed=s).images for s in (seed, seed + 2**32))
    assert not torch.equal(low, high)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_what_is_no_seed_of_64_bits_is_refused(seed, error):
    with pytest.raises(error, match=f"seed must .* got {seed}"):
        check_seed(seed)
