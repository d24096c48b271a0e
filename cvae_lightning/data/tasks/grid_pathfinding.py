"""Walk the shortest way through a small grid with walls; strategies differ in which shortest path they take."""

from __future__ import annotations

import random
import re
from collections import deque
from functools import lru_cache
from typing import ClassVar

from cvae_lightning.data.tasks.base import Task, check_range, match

Cell = tuple[int, int]
Grid = tuple[Cell, Cell, tuple[Cell, ...]]


def _neighbours(cell: Cell, walls: tuple[Cell, ...], size: int) -> list[Cell]:
    """Return the free cells next to ``cell``, the two vertical ones first."""
    row, column = cell
    around = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return [(r, c) for r, c in around if 1 <= r <= size and 1 <= c <= size and (r, c) not in walls]


@lru_cache(maxsize=4096)
def _distances(target: Cell, walls: tuple[Cell, ...], size: int) -> dict[Cell, int]:
    """Return the number of steps from every reachable cell to ``target``, by breadth-first search."""
    steps, queue = {target: 0}, deque([target])
    while queue:
        cell = queue.popleft()
        for near in _neighbours(cell, walls, size):
            if near not in steps:
                steps[near] = steps[cell] + 1
                queue.append(near)
    return steps


class GridPathfinding(Task):
    """Find a shortest path: ``11>33#12`` (start > goal # wall, each row then column) becomes ``21,31,32,33=4``.

    The trace lists the cells visited and ends in the length of the shortest path. Strategies: ``rows_first`` (vertical
    moves while they shorten the way), ``columns_first``, ``staircase`` (alternate, vertical first) and ``from_goal``
    (backward search: rows first, listed from the goal back to the start). Walls make each of them take the other axis.

    Args:
        size: side of the square grid in cells, 4 to 8.
        walls: number of wall cells, 0 to 4.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> GridPathfinding().solve("11>33#22", "staircase")
        '21,31,32,33=4'
    """

    name: ClassVar[str] = "grid_pathfinding"
    strategies: tuple[str, ...] = ("rows_first", "columns_first", "staircase", "from_goal")
    alphabet: ClassVar[str] = "0123456789>#,="

    def __init__(self, size: int = 5, walls: int = 1) -> None:
        self.size = check_range("size", size, 4, 8)
        self.walls = check_range("walls", walls, 0, 4)
        cell = f"[1-{size}]{{2}}"
        self._pattern = re.compile(f"({cell})>({cell})" + (f"#((?:{cell}){{{walls}}})" if walls else "()"))

    def sample_input(self, rng: random.Random) -> str:
        """Return a start, a goal at least two rows and two columns away, and walls that leave a way."""
        while True:
            start, goal = ((rng.randint(1, self.size), rng.randint(1, self.size)) for _ in range(2))
            if abs(start[0] - goal[0]) < 2 or abs(start[1] - goal[1]) < 2:
                continue
            free = [(r, c) for r in range(1, self.size + 1) for c in range(1, self.size + 1)]
            walls = tuple(sorted(rng.sample([cell for cell in free if cell not in (start, goal)], self.walls)))
            if start in _distances(goal, walls, self.size):
                listed = "".join(f"{r}{c}" for r, c in walls)
                return f"{start[0]}{start[1]}>{goal[0]}{goal[1]}" + (f"#{listed}" if walls else "")

    def parse(self, x: str) -> Grid:
        """Return (start, goal, walls)."""
        start, goal, *walls = (
            (int(text[i]), int(text[i + 1]))
            for text in match(self._pattern, x, self.name)
            for i in range(0, len(text), 2)
        )
        differ = len({start, goal, *walls}) == 2 + len(walls)
        if not differ or start not in _distances(goal, tuple(walls), self.size):
            raise ValueError(f"{x!r} is not an input of {self.name}: cells must differ and leave a way to the goal")
        return start, goal, tuple(walls)

    def steps(self, problem: Grid, strategy: str) -> str:
        """Return the cells of the path, joined by ``,``."""
        start, goal, walls = problem
        if strategy == "from_goal":
            start, goal = goal, start
        left = _distances(goal, walls, self.size)
        path, vertical = [start], strategy != "columns_first"
        while path[-1] != goal:
            here = path[-1]
            nearer = [cell for cell in _neighbours(here, walls, self.size) if left[cell] == left[here] - 1]
            path.append(next((cell for cell in nearer if (cell[1] == here[1]) == vertical), nearer[0]))
            if strategy == "staircase":
                vertical = path[-1][1] != here[1]
        return ",".join(f"{r}{c}" for r, c in path[1:])

    def result(self, problem: Grid) -> str:
        """Return the length of the shortest path in moves."""
        start, goal, walls = problem
        return str(_distances(goal, walls, self.size)[start])
