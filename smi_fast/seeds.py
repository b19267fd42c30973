"""Seeds: everything random in a batch follows from the seed of the run and the number of the batch."""

from __future__ import annotations

import numpy as np
import torch

WORDS, WORD = 624, 8  # the words in a Mersenne Twister's state, and the bytes in which torch stores each
STATE = slice(24, 24 + WORDS * WORD)  # their place in the state of a CPU generator, after its seed and two counters


def check_seed(seed: int) -> int:
    """Check that a seed is an integer of 64 bits, and return it.

    Raises:
        TypeError: the seed is not an integer.
        ValueError: the seed is negative or has more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 to 2^64 - 1, got {seed}")
    return int(seed)


def batch_seed(seed: int, number: int, *further: int) -> int:
    """Return the seed (64 bits) of batch `number` in a run with `seed`, or of a part of it with `further` numbers.

    It is a hash of all of them (numpy's SeedSequence). With `seed + number` instead, runs with neighbouring seeds would
    share batches.

    Raises:
        TypeError, ValueError: see `check_seed`.
    """
    sequence = np.random.SeedSequence(check_seed(seed), spawn_key=(number, *further))
    return int(sequence.generate_state(1, np.uint64)[0])


def seeded_generator(seed: int) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on all 64 bits of the seed.

    For a seed of up to 32 bits it is `torch.Generator().manual_seed(seed)`. torch ignores any further bits, so for a
    longer seed the whole state of its Mersenne Twister is filled here.

    Raises:
        TypeError, ValueError: see `check_seed`.
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    if seed >= 2**32:
        state = generator.get_state()
        words = np.random.SeedSequence(seed).generate_state(WORDS).astype(np.uint64)
        state[STATE] = torch.from_numpy(words.view(np.uint8))
        generator.set_state(state)
    return generator
