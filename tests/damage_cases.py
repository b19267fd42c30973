"""What the tests of damaged files share: flipped bits, cuts, and what a refusal looks like."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def flips(data: bytes, seed: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Copies of `data` with one flipped bit in each, and the place of that byte."""
    source = random.Random(seed)
    for place in source.sample(range(len(data)), min(count, len(data))):
        damaged = bytearray(data)
        damaged[place] ^= 1 << source.randrange(8)
        yield place, bytes(damaged)


def cuts(data: bytes, seed: int, count: int) -> list[bytes]:
    """Beginnings of `data`, among them none of it and all but the last byte."""
    lengths = {0, 1, 4, 8, len(data) - 1, *random.Random(seed).sample(range(len(data)), min(count, len(data)))}
    return [data[:length] for length in sorted(lengths) if length < len(data)]


def read_or_refused(read: Callable[[Path], Any], path: Path) -> Any:
    """What `read` gives, or None if it refuses the file by one sentence that names it. Any other error is one."""
    try:
        return read(path)
    except (ValueError, OSError) as error:
        refusal = str(error)
    assert str(path) in refusal
    assert "\n" not in refusal
    return None
