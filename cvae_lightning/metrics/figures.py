"""The three kinds of figures that metrics draw; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes: TypeAlias = Any
    Figure: TypeAlias = Any

MAX_NOTED_CELLS = 144
"""Beyond this many cells the numbers in a heatmap would not be readable and are left out."""


def heatmap(
    values: Tensor,
    *,
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    title: str,
    axes: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw a latent x strategy matrix of shares in [0, 1] with its values as text."""
    rows, columns = values.shape
    figure, axes = _axes(axes, width=2.6 + 1.0 * columns, height=1.8 + 0.6 * rows)
    image = axes.imshow(values.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    names = column_names or [f"s{s}" for s in range(columns)]
    slanted = max(map(len, names)) > 8
    axes.set_xticks(range(columns), names, rotation=30 * slanted, ha="right" if slanted else "center")
    axes.set_yticks(range(rows), row_names or [f"z{k}" for k in range(rows)])
    axes.set(xlabel="strategy", ylabel="latent", title=title)
    if rows * columns <= MAX_NOTED_CELLS:
        for row in range(rows):
            for column in range(columns):
                value = float(values[row, column])
                note = notes[row][column] if notes else f"{value:.2f}"
                colour = "white" if value > 0.55 else "black"
                axes.text(column, row, note, ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axes, label="share")
    return figure, axes


def bars(
    values: Mapping[str, Tensor | float],
    *,
    title: str,
    label: str,
    limit: float | None = None,
    axes: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw one horizontal bar per name, the value beside it."""
    heights = [float(value) for value in values.values()]
    figure, axes = _axes(axes, width=7.0, height=1.4 + 0.45 * len(heights))
    drawn = axes.barh(range(len(heights)), heights, color="tab:blue")
    axes.bar_label(drawn, [f"{height:.3g}" for height in heights], padding=3)
    axes.set_yticks(range(len(heights)), list(values))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    if limit is not None:
        axes.set_xlim(0.0, limit * 1.1)
    axes.set(xlabel=label, title=title)
    return figure, axes


def grouped_bars(
    series: Mapping[str, Tensor],
    *,
    names: Sequence[str],
    title: str,
    label: str,
    line: float,
    axes: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Draw several series of bars side by side, one group per name, with a dashed reference line."""
    figure, axes = _axes(axes, width=3.0 + 0.55 * len(names), height=3.6)
    width = 0.8 / len(series)
    for position, (series_name, values) in enumerate(series.items()):
        places = [place + (position - (len(series) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, values.flatten().tolist(), width=width, label=series_name)
    axes.axhline(line, color="black", linestyle="--", linewidth=1, label="uniform")
    axes.set_xticks(range(len(names)), list(names))
    axes.set(ylabel=label, title=title)
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series) + 1)
    return figure, axes


def _axes(axes: Axes | None, *, width: float, height: float) -> tuple[Figure, Axes]:
    if axes is not None:
        return cast("Figure", axes.figure), axes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot: nothing to close
    return figure, figure.subplots()
