"""Progress bars that show the time left and vanish when they are done."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress(items: Iterable[Any], title: str, bar: bool = True, **options: Any) -> Iterable[Any]:
    """Return ``items`` under a progress bar on a terminal; none if ``bar`` is false.

    Args:
        items: what is gone through.
        title: what is done.
        bar: whether bars are wanted (``trainer.enable_progress_bar``).
        options: of tqdm.
    """
    return tqdm(items, title, leave=False, disable=None if bar else True, **options)
