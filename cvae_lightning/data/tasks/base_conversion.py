"""Read a numeral of another base as a decimal number; strategies differ in the order of place values."""

from __future__ import annotations

import random
import re
from itertools import accumulate
from typing import ClassVar

from cvae_lightning.data.tasks.base import Task, check_range, match


class BaseConversion(Task):
    """Convert to decimal: ``31302`` in base 5 becomes ``3;16;83;415;2077=2077`` by Horner's rule.

    Strategies: ``horner`` (multiply by the base and add the next digit, from the left), ``leading_down`` (running sum
    of place values, leading place first: ``1875;2000;2075;2075;2077``), ``ones_up`` (the same from the ones:
    ``2;2;77;202;2077``) and ``pairs`` (through the squared base: the value of each pair of digits from the right,
    then Horner's rule over the pairs: ``3,8,2;83;2077``).

    Args:
        base: base of the input, 2 to 9.
        digits: digits of the input, 3 to 8, without leading zeros; base ** digits is at most 100000.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> BaseConversion(base=5, digits=3).solve("132", "ones_up")
        '2;17;42=42'
    """

    name: ClassVar[str] = "base_conversion"
    strategies: tuple[str, ...] = ("horner", "leading_down", "ones_up", "pairs")
    alphabet: ClassVar[str] = "0123456789,;="

    def __init__(self, base: int = 5, digits: int = 5) -> None:
        self.base = check_range("base", base, 2, 9)
        self.digits = check_range("digits", digits, 3, 8)
        if base**digits > 100_000:
            raise ValueError(f"base ** digits must be at most 100000, got {base} ** {digits} = {base**digits}")
        self._pattern = re.compile(f"([1-{base - 1}][0-{base - 1}]{{{digits - 1}}})")

    def sample_input(self, rng: random.Random) -> str:
        """Return a random numeral without a leading zero."""
        first = rng.randint(1, self.base - 1)
        return str(first) + "".join(str(rng.randrange(self.base)) for _ in range(self.digits - 1))

    def parse(self, x: str) -> list[int]:
        """Return the digits, leading digit first."""
        (digits,) = match(self._pattern, x, self.name)
        return [int(c) for c in digits]

    def steps(self, problem: list[int], strategy: str) -> str:
        """Return the running values."""
        if strategy == "horner":
            return ";".join(map(str, self._horner(problem, self.base)))
        if strategy == "pairs":
            padded = [0] * (len(problem) % 2) + problem
            pairs = [self.base * padded[i] + padded[i + 1] for i in range(0, len(padded), 2)]
            return ";".join([",".join(map(str, pairs)), *map(str, self._horner(pairs, self.base**2)[1:])])
        values = [digit * self.base**i for i, digit in enumerate(reversed(problem))]
        return ";".join(map(str, accumulate(values if strategy == "ones_up" else reversed(values))))

    @staticmethod
    def _horner(digits: list[int], base: int) -> list[int]:
        return list(accumulate(digits, lambda value, digit: value * base + digit))

    def result(self, problem: list[int]) -> str:
        """Return the decimal number."""
        return str(int("".join(map(str, problem)), self.base))
