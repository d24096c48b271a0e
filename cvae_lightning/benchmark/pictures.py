"""Figures of a benchmark: ``Figure`` objects without pyplot, 600 to 1200 pixels wide at 100 dpi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cvae_lightning.benchmark.table import COLUMNS, POSTERIOR, value

CONTROLLED, ACCURACY = "controlled / ceiling", "accuracy, forced"
CURVE = "val/alignment/one_to_one"
MARKERS = "osD^vP*X<>hp"
Row = Mapping[str, Any]


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the results allow, as PNG files in the folder, and return their paths."""
    drawn = {
        "alignment_accuracy": alignment_accuracy(rows),
        "learning_curves": learning_curves(rows),
        "heatmap": heatmaps(rows),
    }
    paths = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        figure.savefig(path, dpi=100)
        paths.append(path)
    return paths


def alignment_accuracy(rows: Sequence[Row]) -> Figure | None:
    """Draw forced accuracy over posterior alignment: a point per cell, and the median of each recipe large.

    Colours tell groups apart and shapes the recipes of a group; where there is one group, colours tell recipes apart.
    """
    points = [(row, _number(row, POSTERIOR), _number(row, ACCURACY)) for row in rows]
    known = [(row, x, y) for row, x, y in points if x is not None and y is not None]
    if not known:
        return None
    styles = _styles(rows)
    fig = Figure(figsize=(9.0, max(4.6, 0.9 + 0.21 * len(styles))), layout="constrained")
    ax = fig.add_subplot()
    for row, x, y in known:
        color, marker = styles[row["recipe"]]
        ax.plot(x, y, marker, color=color, markersize=4, alpha=0.45, markeredgewidth=0)
    for recipe, (color, marker) in styles.items():
        mine = np.array([(x, y) for row, x, y in known if row["recipe"] == recipe])
        if len(mine):
            x, y = np.median(mine, axis=0)
            ax.plot(x, y, marker, color=color, markersize=10, markeredgecolor="black", markeredgewidth=1.0)
    ax.axvline(1.0, color="0.6", linestyle=":", linewidth=1)
    ax.set_xlabel("posterior alignment / ceiling")
    ax.set_ylabel("final-answer accuracy, every latent forced")
    ax.set_title("a cell per point, the median of a recipe large", fontsize=11)
    ax.margins(0.06)
    ax.grid(alpha=0.25)
    _add_legend(fig, rows, styles)
    return fig


def learning_curves(rows: Sequence[Row]) -> Figure | None:
    """Draw validation alignment over the training: a panel per task and group, a colour per recipe, a line per seed."""
    curves = [row for row in rows if (row.get("history") or {}).get(CURVE)]
    panels = list(dict.fromkeys((row["group"], row["task"]) for row in curves))
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    fig = Figure(figsize=(1.2 + 3.6 * columns, 0.8 + 2.9 * lines), layout="constrained")
    axes = fig.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    one_group = len({group for group, _ in panels}) == 1
    for ax, (group, task) in zip(axes, panels, strict=False):
        mine = [row for row in curves if (row["group"], row["task"]) == (group, task)]
        recipes = list(dict.fromkeys(row["recipe"] for row in (curves if one_group else mine)))
        colors = dict(zip(recipes, _colors(len(recipes)), strict=True))
        for row in mine:
            steps, values = np.array(row["history"][CURVE]).T
            ax.plot(steps + 1, values, color=colors[row["recipe"]], linewidth=1, marker=".", markersize=3)
        ceilings = [c for row in mine if (c := row["metrics"].get("alignment_ceiling")) is not None]
        if ceilings:
            ax.axhline(float(np.median(ceilings)), color="0.4", linestyle="--", linewidth=1)
        title = task if one_group or not group else f"{group}: {task}" if len({t for _, t in panels}) > 1 else group
        ax.set_title(title, fontsize=10, parse_math=False)
        ax.set_ylim(0, 1.03)
        ax.set_xlim(left=0)
        ax.grid(alpha=0.25)
        ax.tick_params(labelsize=8)
        if not one_group:
            ax.legend(handles=_lines(colors), fontsize=6.5, loc="best", framealpha=0.6)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles = [*(_lines(colors) if one_group else []), Line2D([], [], color="0.4", linestyle="--", label="ceiling")]
    fig.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=min(4, len(handles)))
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("optimizer step", fontsize=9)
    fig.supylabel("posterior alignment, validation split", fontsize=9)
    return fig


def heatmaps(rows: Sequence[Row]) -> Figure | None:
    """Draw the median alignment of every recipe on every task, of the posterior and of forced generation."""
    tasks, recipes = (list(dict.fromkeys(row[part] for row in rows)) for part in ("task", "recipe"))
    tables = {
        heading: np.array([[_median(rows, r, t, heading) for t in tasks] for r in recipes])
        for heading in (POSTERIOR, CONTROLLED)
    }
    tables = {heading: table for heading, table in tables.items() if np.isfinite(table).any()}
    if not tables:
        return None
    width = 1.5 + 0.075 * max(map(len, recipes)) + len(tables) * max(2.0, 0.8 * len(tasks))
    height = 1.0 + 0.3 * len(recipes) + 0.06 * max(map(len, tasks))
    fig = Figure(figsize=(max(6.0, width), max(2.4, height)), layout="constrained")
    axes = fig.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    groups = [next(row["group"] for row in rows if row["recipe"] == recipe) for recipe in recipes]
    image: Any = None
    for ax, (heading, table) in zip(axes, tables.items(), strict=True):
        image = ax.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), number in np.ndenumerate(table):
            text = f"{number:.3f}" if np.isfinite(number) else "–"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if number > 0.55 else "black")
        for i in range(1, len(recipes)):
            if groups[i] != groups[i - 1]:
                ax.axhline(i - 0.5, color="black", linewidth=1)
        ax.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
        ax.set_yticks(range(len(recipes)), recipes, fontsize=8)
        ax.set_title(heading, fontsize=10)
    fig.colorbar(image, ax=axes, label="median over seeds", shrink=min(1.0, 4.0 / height))
    return fig


def _number(row: Row, heading: str) -> float | None:
    return value(row, heading, COLUMNS[heading])


def _median(rows: Sequence[Row], recipe: str, task: str, heading: str) -> float:
    numbers = [_number(row, heading) for row in rows if row["recipe"] == recipe and row["task"] == task]
    known = [number for number in numbers if number is not None]
    return float(np.median(known)) if known else float("nan")


def _styles(rows: Sequence[Row]) -> dict[str, tuple[Any, str]]:
    """Return colour and marker of every recipe."""
    recipes = {row["recipe"]: row["group"] for row in rows}
    groups = list(dict.fromkeys(recipes.values()))
    if len(groups) == 1:
        return dict(zip(recipes, ((color, "o") for color in _colors(len(recipes))), strict=True))
    colors = dict(zip(groups, _colors(len(groups)), strict=True))
    place: dict[str, int] = {}
    styles = {}
    for recipe, group in recipes.items():
        place[group] = place.get(group, -1) + 1
        styles[recipe] = (colors[group], MARKERS[place[group] % len(MARKERS)])
    return styles


def _add_legend(fig: Figure, rows: Sequence[Row], styles: Mapping[str, tuple[Any, str]]) -> None:
    """List the recipes beside the picture, each group under its heading."""
    groups = {row["recipe"]: row["group"] for row in rows}
    with_headings = len({*groups.values()}) > 1
    handles: list[Line2D] = []
    headings: set[int] = set()
    before = None
    for recipe, (color, marker) in styles.items():
        if with_headings and groups[recipe] != before:
            headings.add(len(handles))
            handles.append(Line2D([], [], linestyle="", label=groups[recipe] or " "))
        before = groups[recipe]
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", label=recipe))
    legend = fig.legend(handles=handles, fontsize=8, loc="outside right upper")
    for i, text in enumerate(legend.get_texts()):
        text.set_parse_math(False)  # the names are the user's
        text.set_fontweight("bold" if i in headings else "normal")


def _lines(colors: Mapping[str, Any]) -> list[Line2D]:
    return [Line2D([], [], color=color, label=recipe) for recipe, color in colors.items()]


def _colors(count: int) -> list[Any]:
    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](i) for i in np.linspace(0.05, 0.95, count)]
