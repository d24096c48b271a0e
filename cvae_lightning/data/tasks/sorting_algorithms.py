"""Sort a list of digits; the trace shows the list after each pass of the algorithm."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from cvae_lightning.data.tasks.base import Task, check_range, match


def _bubble(v: list[int]) -> Iterator[list[int]]:
    for end in range(len(v) - 1, 0, -1):
        for j in range(end):
            if v[j] > v[j + 1]:
                v[j], v[j + 1] = v[j + 1], v[j]
        yield v


def _insertion(v: list[int]) -> Iterator[list[int]]:
    for i in range(1, len(v)):
        value, j = v[i], i
        while j > 0 and v[j - 1] > value:
            v[j] = v[j - 1]
            j -= 1
        v[j] = value
        yield v


def _selection(v: list[int]) -> Iterator[list[int]]:
    for i in range(len(v) - 1):
        smallest = min(range(i, len(v)), key=v.__getitem__)
        v[i], v[smallest] = v[smallest], v[i]
        yield v


def _reverse_selection(v: list[int]) -> Iterator[list[int]]:
    for i in range(len(v) - 1, 0, -1):
        largest = max(range(i + 1), key=v.__getitem__)
        v[i], v[largest] = v[largest], v[i]
        yield v


def _merge(v: list[int]) -> Iterator[list[int]]:
    def sort(low: int, high: int) -> Iterator[list[int]]:
        if high - low < 2:
            return
        middle = (low + high + 1) // 2
        yield from sort(middle, high)
        yield from sort(low, middle)
        v[low:high] = sorted(v[low:high])
        yield v

    yield from sort(0, len(v))


def _merge_levels(v: list[int]) -> Iterator[list[int]]:
    width = 1
    while width < len(v):
        for low in range(0, len(v), 2 * width):
            v[low : low + 2 * width] = sorted(v[low : low + 2 * width])
        yield v
        width *= 2


_PASSES = {
    "bubble": _bubble,
    "insertion": _insertion,
    "selection": _selection,
    "merge": _merge,
    "reverse_selection": _reverse_selection,
    "merge_levels": _merge_levels,
}


class SortingAlgorithms(Task):
    """Sort digits: ``41325`` becomes ``13245;12345;12345;12345=12345`` under bubble sort.

    Strategies: ``bubble`` (a pass to the right moves the largest to the end), ``insertion`` (the sorted prefix grows by
    one), ``selection`` (the smallest is swapped to the front), ``merge`` (recursive, right half first; the list after
    each merge), ``reverse_selection`` (the largest is swapped to the end) and ``merge_levels`` (bottom-up; the list
    after each level). All but the last write length - 1 states. The ceiling of alignment of the first four is 0.84 for
    length 4 and 0.94 for length 5.

    Args:
        length: number of digits in the list, 3 to 7.
        strategies: names of the strategies to use, in this order, two or more; None = the first four above.

    Raises:
        ValueError: if an argument is out of range or a strategy is unknown or repeated.

    Example:
        >>> SortingAlgorithms(length=4).solve("4132", "selection")
        '1432;1234;1234=1234'
    """

    name: ClassVar[str] = "sorting_algorithms"
    alphabet: ClassVar[str] = "0123456789;="

    def __init__(self, length: int = 5, strategies: Sequence[str] | None = None) -> None:
        self.length = check_range("length", length, 3, 7)
        names = tuple(strategies) if strategies is not None else tuple(_PASSES)[:4]
        if unknown := [name for name in names if name not in _PASSES]:
            raise ValueError(f"unknown sorting strategies {unknown}; known are {', '.join(_PASSES)}")
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"strategies must name at least two different strategies, got {list(names)}")
        self.strategies = names
        self._pattern = re.compile(f"([0-9]{{{length}}})")

    def sample_input(self, rng: random.Random) -> str:
        """Return random digits, repetitions allowed."""
        return "".join(rng.choices("0123456789", k=self.length))

    def parse(self, x: str) -> list[int]:
        """Return the digits."""
        (digits,) = match(self._pattern, x, self.name)
        return [int(c) for c in digits]

    def steps(self, problem: list[int], strategy: str) -> str:
        """Return the list after each pass, joined by ``;``."""
        return ";".join("".join(map(str, state)) for state in _PASSES[strategy](list(problem)))

    def result(self, problem: list[int]) -> str:
        """Return the sorted digits."""
        return "".join(map(str, sorted(problem)))
