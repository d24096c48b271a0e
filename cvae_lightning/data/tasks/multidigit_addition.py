"""Add two numbers of several digits; strategies differ in the partial sums they go through."""

from __future__ import annotations

import random
import re
from itertools import accumulate
from typing import ClassVar

from cvae_lightning.data.tasks.base import Task, check_range, match


class MultidigitAddition(Task):
    """Add: ``457+386`` becomes ``13;14;8=843`` column by column.

    Strategies: ``columns`` (column sums with carry, ones first), ``ones_up`` (add the second number's ones, then
    tens, ...: ``463;543;843``), ``leading_down`` (add its leading digit first: ``757;837;843``), ``place_values``
    (running sum of the sums of equal places, leading place first: ``700;830;843``) and ``compensation`` (round the
    second number up in its leading digit, then take off the excess: ``857-14``).

    Args:
        digits: digits of both numbers, 2 to 5.

    Raises:
        ValueError: if ``digits`` is out of range.

    Example:
        >>> MultidigitAddition().solve("457+386", "compensation")
        '857-14=843'
    """

    name: ClassVar[str] = "multidigit_addition"
    strategies: tuple[str, ...] = ("columns", "ones_up", "leading_down", "place_values", "compensation")
    alphabet: ClassVar[str] = "0123456789+-;="

    def __init__(self, digits: int = 3) -> None:
        self.digits = check_range("digits", digits, 2, 5)
        self._pattern = re.compile(f"([1-9][0-9]{{{digits - 1}}})\\+([1-9][0-9]{{{digits - 1}}})")

    def sample_input(self, rng: random.Random) -> str:
        """Return two random numbers without leading zeros."""
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        return f"{rng.randint(low, high)}+{rng.randint(low, high)}"

    def parse(self, x: str) -> tuple[int, int]:
        """Return the two numbers."""
        a, b = match(self._pattern, x, self.name)
        return int(a), int(b)

    def steps(self, problem: tuple[int, int], strategy: str) -> str:
        """Return the partial sums."""
        a, b = problem
        powers = [10**i for i in range(self.digits)]
        if strategy == "compensation":
            excess = -b % powers[-1]
            return f"{a + b + excess}-{excess}"
        if strategy == "columns":
            carry, sums = 0, []
            for power in powers:
                sums.append(a // power % 10 + b // power % 10 + carry)
                carry = sums[-1] // 10
        elif strategy == "place_values":
            sums = list(accumulate((a // p % 10 + b // p % 10) * p for p in reversed(powers)))
        else:
            order = powers if strategy == "ones_up" else reversed(powers)
            sums = list(accumulate((b // p % 10 * p for p in order), initial=a))[1:]
        return ";".join(map(str, sums))

    def result(self, problem: tuple[int, int]) -> str:
        """Return the sum."""
        return str(sum(problem))
