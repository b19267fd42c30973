"""The names of the places in a model whose tokens can be asked for."""

from __future__ import annotations

from collections.abc import Sequence

PARTS = {"block": "", "attn": ".attn", "heads": ".attn.heads", "keys": ".attn.keys", "mlp": ".mlp"}


def feature_name(number: int, part: str) -> str:
    """Return the full name of a part of block `number`, such as "blocks.3.attn.keys"."""
    return f"blocks.{number}{PARTS[part]}"


def parts_of_blocks(features: Sequence[str], depth: int) -> list[frozenset[str]]:
    """Return which of the PARTS of each of `depth` blocks have been asked for.

    Args:
        features: full names, such as "blocks.3.attn.keys", or the names of parts, which stand for all blocks.

    Raises:
        TypeError: `features` is a text.
        ValueError: there is no such name.
    """
    if isinstance(features, str) or not isinstance(features, Sequence):
        raise TypeError(f"features must be a sequence of names, got {features!r}")
    if not features:  # called in every forward pass
        return [frozenset()] * depth
    known = {feature_name(number, part): (number, part) for number in range(depth) for part in PARTS}
    for name in features:
        if name not in known and name not in PARTS:
            raise ValueError(
                f"there is no feature {name!r}: the model has {', '.join(f'blocks.N{end}' for end in PARTS.values())} "
                f"for N from 0 to {depth - 1}, and {', '.join(PARTS)} for all blocks"
            )
    asked = {known[name] for name in features if name in known}
    asked |= {(number, name) for name in features if name in PARTS for number in range(depth)}
    return [frozenset(part for part in PARTS if (number, part) in asked) for number in range(depth)]
