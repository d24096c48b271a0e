"""Results of other sittings and machines: lines of results.jsonl become the results of the cells they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvae_lightning.benchmark import records
from cvae_lightning.benchmark.plan import Cell

Row = dict[str, Any]


def take_over(cells: Sequence[Cell], files: Sequence[str], replace_changed: bool = False) -> list[str]:
    """Write the results of lines that fit cells into the folders of these cells, where none has one of its own.

    A line belongs to the cell with the same hash, whatever the benchmark or the recipe was called. The line of an
    entangled model whose weights are not here is no use to cells that have yet to start from it: then it is left out.

    Args:
        cells: all cells of the benchmark.
        files: files like ``results.jsonl``; of two lines with the same hash the first one counts.
        replace_changed: also into folders that hold the result of another configuration, which is lost.

    Returns:
        What was done, one text per line, to show to the user.

    Raises:
        ValueError: naming file and line, if a line is torn or no result of a benchmark.
    """
    rows: dict[str, Row] = {}
    for file in files:
        for row in read_lines(Path(file)):
            if row["status"] == "done":
                rows.setdefault(row["hash"], row)
    missing = [cell for cell in cells if not records.is_done(cell)]
    waited_for = {cell.entangled for cell in missing if cell.hash not in rows}
    known = [cell for cell in missing if cell.hash in rows]
    fitting = [cell for cell in known if replace_changed or records.state(cell) != "changed"]
    again = [cell for cell in fitting if cell in waited_for and not records.holds_own_model(cell)]
    taken = [cell for cell in fitting if cell not in again]
    for cell in taken:
        records.check_folder(cell)
    for cell in taken:
        names = {"task": cell.task, "recipe": cell.recipe, "group": cell.group, "seed": cell.seed}
        records.adopt(cell, rows[cell.hash] | names | {"config": cell.config, "test_config": cell.test_config})
    said = [f"{len(taken)} results taken over from {', '.join(files)}"]
    if again:
        said.append(f"trained again, for the cells that start from it: {_names(cell.name for cell in again)}")
    hashes = {cell.hash for cell in cells}
    stale = [row for key, row in rows.items() if key not in hashes]
    if stale:
        said.append(
            f"{len(stale)} results left out, which belong to no cell as it is configured now: "
            + _names(f"{row['task']}/{row['recipe']}/seed{row['seed']}".removesuffix("/seedNone") for row in stale)
        )
    return said


def read_lines(path: Path) -> list[Row]:
    """Return the results in a file like ``results.jsonl``, checked.

    Raises:
        ValueError: naming file and line, if a line is torn or no result of a benchmark.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: expected a whole JSON object: {error!s:.200}") from error
        try:
            _check(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: expected a line of a benchmark's results.jsonl: {error}") from error
        rows.append(row)
    return rows


def _check(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"got {row!r:.60}")
    kinds = dict(KINDS)
    if row.get("status") == "done":
        kinds |= DONE
    for key, (kind, fits) in kinds.items():
        if key not in row and key not in OPTIONAL:
            raise ValueError(f"it has no {key!r}")
        if key in row and not fits(row[key]):
            raise ValueError(f"{key}: expected {kind}, got {row[key]!r:.60}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(of(item) for item in value.values())


def _curve(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 and all(map(_number, p)) for p in value)


Kinds = Mapping[str, tuple[str, Callable[[Any], bool]]]
KINDS: Kinds = {
    "task": ("a text", _text),
    "recipe": ("a text", _text),
    "seed": ("an integer or null", lambda value: value is None or type(value) is int),
    "status": ("done or failed", lambda value: value in ("done", "failed")),
    "hash": ("a text", _text),
}
DONE: Kinds = {
    "metrics": ("a mapping", _mapping(lambda value: value is None or isinstance(value, list | str) or _number(value))),
    "history": ("curves by name, [[step, value], ...] each", _mapping(_curve)),
    "loss_fractions": ("numbers by name", _mapping(_number)),
    "fit_seconds": ("a number", _number),
    "test_seconds": ("a number", _number),
    "versions": ("texts by name", _mapping(_text)),
    "commit": ("a text or null", lambda value: value is None or _text(value)),
    "cpus": ("a number", _number),
    "threads": ("a number", _number),
}
OPTIONAL = {"history", "loss_fractions"}
"""What tables and figures can do without."""


def _names(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
