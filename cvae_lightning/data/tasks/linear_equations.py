"""Solve a*v + b = c for a small whole v; strategies differ in how they find it."""

from __future__ import annotations

import random
import re
from typing import ClassVar

from cvae_lightning.data.tasks.base import Task, check_range, match

Equation = tuple[int, int, int]


class LinearEquations(Task):
    """Solve for v: ``3v+4=19`` becomes ``3v=15;v=5``.

    Strategies: ``subtract_first``, ``divide_first`` (``v+4/3=19/3;v=15/3;v=5``), ``collect`` (everything to one side,
    then divide: ``0=15-3v;0=5-v;v=5``), ``trial`` (1, 2, ... put in: ``1:7;2:10;3:13;4:16;5:19;v=5``) and
    ``bisection`` (halve the range of candidates: ``4:16;6:22;5:19;v=5``).

    Args:
        max_solution: largest v, 3 to 9; the smallest is 1. The longest trace takes about 6 characters per candidate.
        max_constant: largest b, 5 to 99; the smallest is 1. The coefficient a is 2 to 9.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> LinearEquations().solve("3v+4=19", "collect")
        '0=15-3v;0=5-v;v=5'
    """

    name: ClassVar[str] = "linear_equations"
    strategies: tuple[str, ...] = ("subtract_first", "divide_first", "collect", "trial", "bisection")
    alphabet: ClassVar[str] = "0123456789v+-/:;="

    _PATTERN: ClassVar[re.Pattern[str]] = re.compile("([2-9])v\\+([1-9][0-9]?)=([1-9][0-9]{0,2})")

    def __init__(self, max_solution: int = 7, max_constant: int = 36) -> None:
        self.max_solution = check_range("max_solution", max_solution, 3, 9)
        self.max_constant = check_range("max_constant", max_constant, 5, 99)

    def sample_input(self, rng: random.Random) -> str:
        """Return an equation with a whole solution."""
        a, b, v = rng.randint(2, 9), rng.randint(1, self.max_constant), rng.randint(1, self.max_solution)
        return f"{a}v+{b}={a * v + b}"

    def parse(self, x: str) -> Equation:
        """Return (a, b, c)."""
        a, b, c = map(int, match(self._PATTERN, x, self.name))
        v, rest = divmod(c - b, a)
        if rest or not 1 <= v <= self.max_solution or b > self.max_constant:
            raise ValueError(
                f"{x!r} is not an input of {self.name}: v must be a whole number, 1 to {self.max_solution}"
            )
        return a, b, c

    def steps(self, problem: Equation, strategy: str) -> str:
        """Return the equivalent equations, or the candidates with the values they give; ends in ``;v``."""
        a, b, c = problem
        v = (c - b) // a
        if strategy == "subtract_first":
            lines = [f"{a}v={c - b}"]
        elif strategy == "divide_first":
            lines = [f"v+{b}/{a}={c}/{a}", f"v={c - b}/{a}"]
        elif strategy == "collect":
            lines = [f"0={c - b}-{a}v", f"0={v}-v"]
        else:
            candidates = range(1, v + 1) if strategy == "trial" else self._halvings(v)
            lines = [f"{candidate}:{a * candidate + b}" for candidate in candidates]
        return ";".join([*lines, "v"])

    def _halvings(self, v: int) -> list[int]:
        low, high, tried = 1, self.max_solution, [0]
        while tried[-1] != v:
            middle = (low + high) // 2
            tried.append(middle)
            low, high = (middle + 1, high) if middle < v else (low, middle - 1)
        return tried[1:]

    def result(self, problem: Equation) -> str:
        """Return v."""
        a, b, c = problem
        return str((c - b) // a)
