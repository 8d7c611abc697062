"""Whose turn it is: the sides alternate, and each round begins with another one, so that what drifts on the machine meets all alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def turns(sides: Sequence[str], rounds: int) -> Iterator[str]:
    """Every side once a round, for ``rounds`` rounds."""
    for first in range(rounds):
        for place in range(len(sides)):
            yield sides[(first + place) % len(sides)]
