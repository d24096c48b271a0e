"""Multiply a number by a digit; strategies differ in the partial products they go through."""

from __future__ import annotations

import random
import re
from itertools import accumulate
from typing import ClassVar

from cvae_lightning.data.tasks.base import Task, check_range, match


class IntegerMultiplication(Task):
    """Multiply by one digit: ``347*6`` becomes ``42;28;20=2082`` column by column.

    Strategies: ``columns`` (digit products with carry, ones first), ``leading_down`` (running sum of partial products,
    leading digit first: ``1800;2040;2082``), ``ones_up`` (the same from the ones: ``42;282;2082``), ``doubling``
    (double and add along the bits of the multiplier: ``347;1041;2082``) and ``compensation`` (round up to the next
    ten, then take off the excess: ``2100-18``).

    Args:
        digits: digits of the first factor, 2 to 5; the second is 2 to 9.

    Raises:
        ValueError: if ``digits`` is out of range.

    Example:
        >>> IntegerMultiplication().solve("347*6", "doubling")
        '347;1041;2082=2082'
    """

    name: ClassVar[str] = "integer_multiplication"
    strategies: tuple[str, ...] = ("columns", "leading_down", "ones_up", "doubling", "compensation")
    alphabet: ClassVar[str] = "0123456789*-;="

    def __init__(self, digits: int = 3) -> None:
        self.digits = check_range("digits", digits, 2, 5)
        self._pattern = re.compile(f"([1-9][0-9]{{{digits - 1}}})\\*([2-9])")

    def sample_input(self, rng: random.Random) -> str:
        """Return a random number without a leading zero and a digit."""
        return f"{rng.randint(10 ** (self.digits - 1), 10**self.digits - 1)}*{rng.randint(2, 9)}"

    def parse(self, x: str) -> tuple[int, int]:
        """Return the two factors."""
        a, m = match(self._pattern, x, self.name)
        return int(a), int(m)

    def steps(self, problem: tuple[int, int], strategy: str) -> str:
        """Return the partial products."""
        a, m = problem
        places = [a // 10**i % 10 * 10**i for i in range(self.digits)]
        if strategy == "compensation":
            excess = -a % 10
            return f"{(a + excess) * m}-{excess * m}"
        if strategy == "columns":
            values = list(accumulate((int(d) * m for d in reversed(str(a))), lambda before, now: now + before // 10))
        elif strategy == "doubling":
            values = [a * (m >> shift) for shift in reversed(range(m.bit_length()))]
        else:
            order = places if strategy == "ones_up" else reversed(places)
            values = list(accumulate(place * m for place in order))
        return ";".join(map(str, values))

    def result(self, problem: tuple[int, int]) -> str:
        """Return the product."""
        return str(problem[0] * problem[1])
