"""The outputs of a benchmark: results.jsonl, table.md and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvae_lightning.atomic_write import write_text
from cvae_lightning.benchmark import records
from cvae_lightning.benchmark.plan import Cell
from cvae_lightning.benchmark.settings import Settings
from cvae_lightning.benchmark.table import markdown


def collect(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the results on disk, in the order of the cells; ``changed`` marks those of another configuration."""
    rows = []
    for cell in cells:
        result = records.read_result(cell)
        if result is not None:
            rows.append(result | {"group": cell.group, "changed": result["hash"] != cell.hash})
    return rows


def write_tables(settings: Settings, cells: Sequence[Cell], command: str) -> Path:
    """Write results.jsonl and table.md, and return the path of the latter."""
    root, rows = cells[0].root, collect(cells)
    lines = (json.dumps({k: v for k, v in row.items() if k != "changed"}) for row in rows)
    write_text(root / "results.jsonl", "".join(f"{line}\n" for line in lines))
    table = root / "table.md"
    write_text(table, markdown(rows, len(cells), settings.columns, command))
    return table


def write_figures(cells: Sequence[Cell]) -> list[Path]:
    """Draw the figures of what is finished, and return their paths."""
    from cvae_lightning.benchmark.pictures import draw_all

    done = [row for row in collect(cells) if row["status"] == "done" and row["seed"] is not None]
    return draw_all(done, cells[0].root) if done else []
