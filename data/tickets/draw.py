"""Random choices that depend on nothing but the stream of `random.Random.random()`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices made from `random()` alone, the one method whose stream Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        """An integer in [0, limit)."""
        return int(self._random() * limit)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in random order."""
        result = list(options)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def fill(self, pattern: str) -> str:
        """The pattern with every ? replaced by a digit and every @ by a capital letter."""
        made = {
            "?": lambda: str(self.below(10)),
            # No I, O, Q, U, Y: order systems leave out letters that read like others.
            "@": lambda: self.pick("ABCDEFGHJKLMNPRSTVWXZ"),
        }
        return "".join(made[char]() if char in made else char for char in pattern)
