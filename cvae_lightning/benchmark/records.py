"""What a cell leaves on disk: its result, and how far it has come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cvae_lightning.atomic_write import write_text
from cvae_lightning.benchmark.claims import is_claimed
from cvae_lightning.benchmark.compose import differences
from cvae_lightning.benchmark.plan import Cell, data_files, holds_model

MARK = "progress.json"
"""The first file of a cell: only a folder that holds it is ever emptied."""
State = Literal["done", "changed", "failed", "running", "partial", "waiting", "pending"]


@dataclass
class Progress:
    """How far a cell has come, over all its sittings.

    Args:
        hash: of the configuration that it is trained with.
        fit_seconds: time spent in training.
        test_seconds: time spent in the last test.
        sittings: number of times it was started.
        fitted: whether training has ended.
    """

    hash: str
    fit_seconds: float = 0.0
    test_seconds: float = 0.0
    sittings: int = 0
    fitted: bool = False

    @classmethod
    def read(cls, cell: Cell) -> Progress | None:
        """Return what is on disk, or None."""
        content = read_json(cell.folder / MARK)
        return None if content is None else cls(**content)

    def write(self, cell: Cell) -> None:
        """Replace what is on disk."""
        write_text(cell.folder / MARK, json.dumps(vars(self)) + "\n")


def read_result(cell: Cell) -> dict[str, Any] | None:
    """Return the result of a cell that was done or failed, whatever its configuration was."""
    return read_json(cell.folder / "result.json")


def ended(cell: Cell) -> float:
    """Return when the cell was done or failed, in seconds since the epoch; 0 where it is neither."""
    try:
        return (cell.folder / "result.json").stat().st_mtime
    except OSError:
        return 0.0


def write_result(cell: Cell, result: dict[str, Any]) -> None:
    """Write the result; from then on the cell is finished, or has failed."""
    write_text(cell.folder / "result.json", json.dumps(result, indent=1) + "\n")


def state(cell: Cell) -> State:
    """Return where a cell stands."""
    result = read_result(cell)
    if result is not None and result["status"] == "done":
        return "done" if finishes(result, cell) else "changed"
    if is_claimed(cell.folder):
        return "running"
    if result is not None:
        return "failed"
    if cell.entangled is not None and not is_done(cell.entangled):
        return "waiting"
    progress = Progress.read(cell)
    return "pending" if progress is None or progress.hash != cell.fit_hash else "partial"


def is_done(cell: Cell) -> bool:
    """Return whether the cell is finished with the configuration that it has now."""
    return finishes(read_result(cell), cell)


def finishes(result: Mapping[str, Any] | None, cell: Cell) -> bool:
    """Return whether this result is that of the cell with the configuration that it has now, and no failure."""
    return result is not None and result["status"] == "done" and result["hash"] == cell.hash


def step(cell: Cell) -> int:
    """Return the optimizer step that its training has last told."""
    try:
        return int((cell.folder / "step").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def what_changed(cell: Cell) -> list[str]:
    """Return how the configuration differs from that of the finished cell, one text per option."""
    before = read_result(cell) or {}
    texts = differences(before.get("config"), cell.config)
    tests = differences(before.get("test_config"), cell.test_config)
    texts += [f"in tests {text}" for text in tests if text not in texts]
    unseen = "its entangled model" + (" or the content of its data files" if data_files(cell.test_config) else "")
    return texts or [unseen]


def adopt(cell: Cell, result: dict[str, Any]) -> None:
    """Make a result that was measured elsewhere the cell's own; a cell without a mark gets one that names no training.

    The cell's folder then holds its result but no model: whoever needs the model trains it anew.
    """
    if Progress.read(cell) is None:
        Progress("").write(cell)
    write_result(cell, result)


def forget_tests(cells: Sequence[Cell]) -> list[Cell]:
    """Take away the results of finished cells, so that their tests, and these alone, are run again.

    Returns:
        Finished cells that keep their results, because their trained models are not here.
    """
    done = [cell for cell in cells if is_done(cell)]
    here = [cell for cell in done if is_trained(cell) and cell.checkpoint.exists()]
    for cell in here:
        (cell.folder / "result.json").unlink(missing_ok=True)
    return [cell for cell in done if cell not in here]


def is_trained(cell: Cell) -> bool:
    """Return whether what lies in the cell's folder was trained, to the end, with the configuration it has now."""
    progress = Progress.read(cell)
    return progress is not None and progress.fitted and progress.hash == cell.fit_hash


def holds_own_model(model: Cell) -> bool:
    """Return whether an entangled model is here, and no other one: cells can start from it."""
    return is_trained(model) and holds_model(model.model_folder)


def needed_models(cells: Sequence[Cell]) -> list[Cell]:
    """Return the entangled models that unfinished cells start from."""
    return list(dict.fromkeys(cell.entangled for cell in cells if cell.entangled is not None and not is_done(cell)))


def forget_absent(models: Sequence[Cell]) -> None:
    """Let finished models be trained anew that are not here: measured elsewhere, or removed since."""
    for model in models:
        if is_done(model) and not holds_own_model(model):
            Progress("").write(model)
            (model.folder / "result.json").unlink(missing_ok=True)


def clear(cell: Cell) -> None:
    """Remove all that an earlier configuration has left, but neither the claims nor the mark of a cell's folder."""
    for path in _content(cell):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_folder(cell: Cell) -> None:
    """Refuse a folder that others have filled: a cell may delete what is in its folder.

    Raises:
        ValueError: naming the folder.
    """
    # in this order: another runner may just be starting the cell, and writes progress.json first
    filled = cell.folder.is_dir() and any(not path.name.startswith(".") for path in _content(cell))
    if filled and not (cell.folder / MARK).exists():
        raise ValueError(
            f"{cell.folder} is to be the folder of the cell {cell.name}, but holds files of something else: "
            "give another folder with --results"
        )


def _content(cell: Cell) -> list[Path]:
    return [path for path in cell.folder.iterdir() if not path.name.startswith(("claim.", ".clock-", MARK))]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, None if there is none.

    Raises:
        ValueError: if it is not valid JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}; remove the file to run the cell anew") from error
    return content
