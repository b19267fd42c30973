"""Seeds: what is random in a batch follows from the run's seed and the batch's number, and from nothing else."""

from __future__ import annotations

import numpy as np
import torch

WORDS, WORD = 624, 8  # the words of a Mersenne Twister's state, and the bytes that torch takes for each
STATE = slice(24, 24 + WORDS * WORD)  # where they are in a CPU generator's state, after its seed and two counters


def check_seed(seed: int) -> int:
    """The seed, if it is an integer of 64 bits.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is negative or has more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must lie in 0 to 2^64 - 1, got {seed}")
    return int(seed)


def batch_seed(seed: int, number: int) -> int:
    """The seed (64 bits) of batch `number` of a run with `seed`.

    It is hashed out of both (numpy's SeedSequence), so that batches of runs with neighbouring seeds have nothing in
    common, as those of `seed + number` would.

    Raises:
        TypeError, ValueError: as `check_seed`.
    """
    sequence = np.random.SeedSequence(check_seed(seed), spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0])


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU that depends on all 64 bits of the seed.

    For a seed of up to 32 bits it is `torch.Generator().manual_seed(seed)`. torch's Mersenne Twister ignores the other
    bits, so of a longer seed the whole state is filled here.

    Raises:
        TypeError, ValueError: as `check_seed`.
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    if seed >= 2**32:
        state = generator.get_state()
        words = np.random.SeedSequence(seed).generate_state(WORDS).astype(np.uint64)
        state[STATE] = torch.from_numpy(words.view(np.uint8))
        generator.set_state(state)
    return generator
