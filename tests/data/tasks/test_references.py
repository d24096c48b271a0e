"""Every trace against a second definition of its strategy, written another way."""

import random
import re
from fractions import Fraction
from itertools import chain

import pytest

from cvae_lightning.data.tasks import (
    BaseConversion,
    GridPathfinding,
    IntegerMultiplication,
    LinearEquations,
    MultidigitAddition,
    SortingAlgorithms,
)

BY_HAND = [
    (
        SortingAlgorithms(
            strategies=["bubble", "insertion", "selection", "merge", "reverse_selection", "merge_levels"]
        ),
        "41325",
        {
            "bubble": "13245;12345;12345;12345=12345",
            "insertion": "14325;13425;12345;12345=12345",
            "selection": "14325;12345;12345;12345=12345",
            "merge": "41325;14325;13425;12345=12345",
            "reverse_selection": "41325;21345;21345;12345=12345",
            "merge_levels": "14235;12345;12345=12345",
        },
    ),
    (
        GridPathfinding(),
        "11>33#21",
        {
            "rows_first": "12,22,32,33=4",
            "columns_first": "12,13,23,33=4",
            "staircase": "12,22,23,33=4",
            "from_goal": "23,13,12,11=4",
        },
    ),
    (
        MultidigitAddition(),
        "457+386",
        {
            "columns": "13;14;8=843",
            "ones_up": "463;543;843=843",
            "leading_down": "757;837;843=843",
            "place_values": "700;830;843=843",
            "compensation": "857-14=843",
        },
    ),
    (
        LinearEquations(),
        "3v+4=19",
        {
            "subtract_first": "3v=15;v=5",
            "divide_first": "v+4/3=19/3;v=15/3;v=5",
            "collect": "0=15-3v;0=5-v;v=5",
            "trial": "1:7;2:10;3:13;4:16;5:19;v=5",
            "bisection": "4:16;6:22;5:19;v=5",
        },
    ),
    (
        BaseConversion(),
        "31302",
        {
            "horner": "3;16;83;415;2077=2077",
            "leading_down": "1875;2000;2075;2075;2077=2077",
            "ones_up": "2;2;77;202;2077=2077",
            "pairs": "3,8,2;83;2077=2077",
        },
    ),
    (
        IntegerMultiplication(),
        "347*6",
        {
            "columns": "42;28;20=2082",
            "leading_down": "1800;2040;2082=2082",
            "ones_up": "42;282;2082=2082",
            "doubling": "347;1041;2082=2082",
            "compensation": "2100-18=2082",
        },
    ),
]


@pytest.mark.parametrize(("task", "x", "expected"), BY_HAND, ids=lambda value: getattr(value, "name", ""))
def test_traces_worked_out_by_hand(task, x, expected):
    assert dict(zip(task.strategies, task.traces(x), strict=True)) == expected


def sorting(x, strategy):
    v, n = [int(c) for c in x], len(x)
    states = []
    if strategy == "bubble":
        for done in range(n - 1):
            held, rest = v[0], []
            for item in v[1 : n - done]:
                rest.append(min(held, item))
                held = max(held, item)
            v = [*rest, held, *v[n - done :]]
            states.append(v)
    elif strategy == "insertion":
        states = [sorted(v[:i]) + v[i:] for i in range(2, n + 1)]
    elif strategy in ("selection", "reverse_selection"):
        for i in range(n - 1) if strategy == "selection" else range(n - 1, 0, -1):
            v = list(v)
            part = v[i:] if strategy == "selection" else v[: i + 1]
            j = i + part.index(min(part)) if strategy == "selection" else part.index(max(part))
            v[i], v[j] = v[j], v[i]
            states.append(v)
    elif strategy == "merge_levels":
        runs = [[item] for item in v]
        while len(runs) > 1:
            runs = [sorted(chain(*runs[i : i + 2])) for i in range(0, len(runs), 2)]
            states.append([*chain(*runs)])
    else:

        def merge(left, part, right):  # the list is left + part + right
            if len(part) < 2:
                return part
            cut = -(-len(part) // 2)
            tail = merge(left + part[:cut], part[cut:], right)
            head = merge(left, part[:cut], tail + right)
            states.append(left + sorted(head + tail) + right)
            return sorted(head + tail)

        merge([], v, [])
    return ";".join("".join(map(str, state)) for state in states), "".join(sorted(x))


def addition(x, strategy):
    a, b = (int(part) for part in x.split("+"))
    d = len(str(b))
    if strategy == "compensation":
        rounded = -(-b // 10 ** (d - 1)) * 10 ** (d - 1)
        return f"{a + rounded}-{rounded - b}", str(a + b)
    if strategy == "columns":
        carried, terms = 0, []
        for i, j in zip(reversed(str(a)), reversed(str(b)), strict=True):
            terms.append(int(i) + int(j) + (carried > 9))
            carried = terms[-1]
    else:
        lower = [10**i for i in range(1, d + 1)]
        terms = {
            "ones_up": [a + b % p for p in lower],
            "leading_down": [a + b - b % (p // 10) for p in reversed(lower)],
            "place_values": [a + b - a % (p // 10) - b % (p // 10) for p in reversed(lower)],
        }[strategy]
    return ";".join(map(str, terms)), str(a + b)


def conversion(x, strategy, base=5):
    n = len(x)
    if strategy == "pairs":
        cuts = [i for i in range(n + 1) if (n - i) % 2 == 0 and i > 0]
        pairs = [x[max(0, i - 2) : i] for i in cuts]
        runs = [str(int(x[:i], base)) for i in cuts[1:]]
        return ";".join([",".join(str(int(p, base)) for p in pairs), *runs]), str(int(x, base))
    numerals = {
        "horner": [x[:i] for i in range(1, n + 1)],
        "leading_down": [x[:i].ljust(n, "0") for i in range(1, n + 1)],
        "ones_up": [x[-i:] for i in range(1, n + 1)],
    }[strategy]
    return ";".join(str(int(numeral, base)) for numeral in numerals), str(int(x, base))


def multiplication(x, strategy):
    a, m = (int(part) for part in x.split("*"))
    n = len(str(a))
    if strategy == "compensation":
        tens = -(-a // 10) * 10
        return f"{tens * m}-{(tens - a) * m}", str(a * m)
    if strategy == "columns":
        terms = [int(str(a)[-i]) * m + (a % 10 ** (i - 1)) * m // 10 ** (i - 1) for i in range(1, n + 1)]
    else:
        terms = {
            "ones_up": [a % 10**i * m for i in range(1, n + 1)],
            "leading_down": [(a - a % 10 ** (n - i)) * m for i in range(1, n + 1)],
            "doubling": [a * int(f"{m:b}"[:i], 2) for i in range(1, len(f"{m:b}") + 1)],
        }[strategy]
    return ";".join(map(str, terms)), str(a * m)


def grid(x, strategy, size=5):
    cells = [(int(r), int(c)) for r, c in re.findall("([0-9])([0-9])", x)]
    start, goal, walls = cells[0], cells[1], cells[2:]
    if strategy == "from_goal":
        start, goal = goal, start
    moves = [(-1, 0), (1, 0), (0, -1), (0, 1)]

    def walks(cell, left):  # all walks of `left` moves to the goal, as lists of moves
        if left == 0:
            return [[]] if cell == goal else []
        found = []
        for move in moves:
            near = (cell[0] + move[0], cell[1] + move[1])
            inside = all(1 <= i <= size for i in near) and near not in walls
            if inside and abs(near[0] - goal[0]) + abs(near[1] - goal[1]) < left:
                found += [[move, *rest] for rest in walks(near, left - 1)]
        return found

    length = abs(start[0] - goal[0]) + abs(start[1] - goal[1])
    while not (paths := walks(start, length)):
        length += 2

    def taste(path):
        key, vertical = [], strategy != "columns_first"
        for move in path:
            key.append(((move[0] != 0) != vertical, moves.index(move)))
            if strategy == "staircase":
                vertical = move[0] == 0
        return key

    cell, visited = start, []
    for move in min(paths, key=taste):
        cell = (cell[0] + move[0], cell[1] + move[1])
        visited.append(f"{cell[0]}{cell[1]}")
    return ",".join(visited), str(length)


@pytest.mark.parametrize(
    ("task", "reference", "count"),
    [
        (SortingAlgorithms(5, list(BY_HAND[0][2])), sorting, 300),
        (SortingAlgorithms(4, list(BY_HAND[0][2])), sorting, 100),
        (SortingAlgorithms(7, list(BY_HAND[0][2])), sorting, 100),
        (GridPathfinding(), grid, 150),
        (GridPathfinding(size=5, walls=4), grid, 100),
        (GridPathfinding(size=5, walls=0), grid, 50),
        (MultidigitAddition(), addition, 300),
        (MultidigitAddition(5), addition, 100),
        (BaseConversion(), conversion, 300),
        (BaseConversion(digits=6), conversion, 100),
        (IntegerMultiplication(), multiplication, 300),
        (IntegerMultiplication(2), multiplication, 100),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_traces_follow_a_second_definition(task, reference, count):
    rng = random.Random(5)
    for _ in range(count):
        x = task.sample_input(rng)
        for strategy in task.strategies:
            assert task.solve(x, strategy) == "=".join(reference(x, strategy)), (x, strategy)


def _value(side, v):
    side = re.sub(r"(\d)v", r"\1*v", side)
    total = Fraction(0)
    for sign, factor, numerator, denominator in re.findall(r"([+-]?)(?:(\d+)\*)?(v|\d+)(?:/(\d+))?", side):
        term = Fraction(v if numerator == "v" else int(numerator), int(denominator or 1)) * int(factor or 1)
        total += -term if sign == "-" else term
    return total


def test_lines_of_an_equation_hold_for_its_solution_and_candidates_are_tried_in_order():
    task, rng = LinearEquations(), random.Random(3)
    for _ in range(200):
        x = task.sample_input(rng)
        left, right = x.split("=")
        v = next(v for v in range(1, 8) if _value(left, v) == _value(right, v))
        for strategy in ("subtract_first", "divide_first", "collect"):
            for line in task.solve(x, strategy).split(";"):
                a, b = line.split("=")
                assert _value(a, v) == _value(b, v), (x, line)
                assert _value(a, v + 1) != _value(b, v + 1), (x, line)
        for strategy in ("trial", "bisection"):
            *tried, last = task.solve(x, strategy).split(";")
            assert last == f"v={v}"
            candidates = [int(line.split(":")[0]) for line in tried]
            assert [int(line.split(":")[1]) for line in tried] == [_value(left, c) for c in candidates]
            tree = {1: [4, 2, 1], 2: [4, 2], 3: [4, 2, 3], 4: [4], 5: [4, 6, 5], 6: [4, 6], 7: [4, 6, 7]}
            assert candidates == (tree[v] if strategy == "bisection" else [*range(1, v + 1)])
