"""Progress bars that show the time left and vanish when they are done, and how long a run is."""

import math
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def steps_of_run(trainer: Any) -> float:
    """Return the optimizer steps of a Trainer's run from its first one; inf where nobody knows, as with streams."""
    total: float = trainer.estimated_stepping_batches
    return total if total > 0 else math.inf  # -1 is Lightning's for a loader of no length


def progress(items: Iterable[Any], title: str, bar: bool = True, **options: Any) -> Iterable[Any]:
    """Return ``items`` under a progress bar on a terminal; none if ``bar`` is false.

    Args:
        items: what is gone through.
        title: what is done.
        bar: whether bars are wanted (``trainer.enable_progress_bar``).
        options: of tqdm.
    """
    return tqdm(items, title, leave=False, disable=None if bar else True, **options)
