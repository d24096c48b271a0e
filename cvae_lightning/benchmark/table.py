"""The Markdown table: a row per task and recipe, every number a median over seeds with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cvae_lightning.benchmark.plan import ENTANGLED_GROUP
from cvae_lightning.benchmark.progress import clock

RESAMPLES = 10_000
POSTERIOR = "posterior / ceiling"
COLUMNS = {
    POSTERIOR: "alignment_one_to_one / alignment_ceiling",
    "controlled / ceiling": "controlled_alignment_one_to_one / controlled_alignment_ceiling",
    "accuracy, forced": "final_answer_accuracy",
    "accuracy, sampled": "sampled_final_answer_accuracy",
    "NLL / entangled": "nll_ratio",
    "IW NLL / entangled": "nll_ratio",
    "rho_recon": "rho_recon",
    "AMI": "alignment_ami",
    "linear probe / ceiling": "linear_probe_accuracy / alignment_ceiling",
    "usage perplexity": "usage_perplexity",
}
"""Keys of summary.json by heading; two keys are a ratio."""
DISCRETE_ONLY, CONTINUOUS_ONLY = "NLL / entangled", "IW NLL / entangled"
ENTANGLED_COLUMNS = {
    "accuracy, greedy": "greedy_final_answer_accuracy",
    "accuracy, sampled": "sampled_final_answer_accuracy",
    "NLL (nats per token)": "baseline_nll",
}
Row = Mapping[str, Any]


def value(row: Row, heading: str, key: str) -> float | None:
    """Return the number of one cell for a column, or None if it has none."""
    metrics = row.get("metrics") or {}
    discrete = bool(metrics.get("num_latents"))
    if (heading == CONTINUOUS_ONLY and discrete) or (heading == DISCRETE_ONLY and not discrete):
        return None
    parts = [part for name in key.split(" / ") if isinstance(part := metrics.get(name.strip()), int | float)]
    if len(parts) < len(key.split(" / ")):
        return None
    if len(parts) == 1:
        return float(parts[0])
    return float(parts[0]) / float(parts[1]) if parts[1] else None


def median_interval(
    values: Sequence[float], resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the median, and the ends of its percentile bootstrap interval (Efron 1979), with a fixed seed.

    Example:
        >>> median_interval([0.9, 0.9, 0.9])
        (0.9, 0.9, 0.9)
    """
    array = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    low, high = np.quantile(np.median(array[drawn], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(array)), float(low), float(high)


def cell_text(values: Sequence[float]) -> str:
    """Return ``median [low, high]``; one value stands alone, and none is a dash."""
    if not values:
        return "–"
    middle, low, high = median_interval(values)
    return f"{middle:.3f}" if len(values) == 1 else f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def markdown(rows: Sequence[Row], total: int, columns: Mapping[str, str], command: str) -> str:
    """Return the page: what made it, one table per group, what failed.

    Args:
        rows: results of the cells.
        total: number of cells of the benchmark.
        columns: further columns by heading.
        command: what the user typed.
    """
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] == "failed"]
    lines = [f"`{command}`", "", *_summary(done, failed, total), ""]
    groups = dict.fromkeys(row["group"] for row in rows if row["group"] != ENTANGLED_GROUP)
    for group in groups:
        members = [row for row in rows if row["group"] == group]
        lines += [*([f"## {group}", ""] if group else []), *_table(members, {**COLUMNS, **columns}), ""]
    models = [row for row in rows if row["group"] == ENTANGLED_GROUP]
    if models:
        lines += [f"## {ENTANGLED_GROUP}", "", *_table(models, ENTANGLED_COLUMNS), ""]
    shares = _shares(done)
    if shares:
        lines += ["## Shares of the terms in the objective", "", *shares, ""]
    if failed:
        lines += ["## Failed cells", ""]
        lines += [f"- {_name(row)}: {' '.join(row['error'].split())[:400]}" for row in failed] + [""]
    found = [row["metrics"] or {} for row in done if row["seed"] is not None]
    absent = [
        f"{heading} ({key})"
        for heading, key in columns.items()
        if found and any(all(name.strip() not in metrics for metrics in found) for name in key.split(" / "))
    ]
    if absent:
        lines += [f"No summary.json holds what these columns are to show: {', '.join(absent)}.", ""]
    changed = [_name(row) for row in rows if row.get("changed")]
    if changed:
        lines += [f"Run with another configuration than the config file now says: {', '.join(changed)}.", ""]
    return "\n".join(lines)


def _summary(done: Sequence[Row], failed: Sequence[Row], total: int) -> list[str]:
    seconds = sum(row["fit_seconds"] + row["test_seconds"] for row in done)
    texts = [f"{len(done)} of {total} cells finished" + (f", {len(failed)} failed" if failed else "")]
    if done:
        texts[0] += f", {clock(seconds)} of wall time in their trainings and tests, one after the other"
        seen = [(row["versions"], row["commit"], row["cpus"], row["threads"]) for row in done]
        versions = sorted({", ".join(f"{name} {number}" for name, number in v.items()) for v, *_ in seen})
        commits = sorted({commit or "unknown" for _, commit, *_ in seen})
        machines = sorted({f"{threads} of {cpus} CPU cores" for *_, cpus, threads in seen})
        texts += [f"each cell on {' or '.join(machines)}", f"{'; '.join(versions)}; commit {', '.join(commits)}"]
    note = "Numbers: median over seeds [95 % bootstrap interval of the median, 10,000 resamples]; test split."
    return [". ".join(texts) + ".", "", note]


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """Return a table; columns without any number are left out."""
    used = {h: k for h, k in columns.items() if any(value(row, h, k) is not None for row in rows)}
    kinds = list(dict.fromkeys((row["recipe"], row["task"]) for row in rows))
    recipes = dict.fromkeys(recipe for recipe, _ in kinds)
    worst = ["worst seed"] if POSTERIOR in used else []
    heads = [
        "recipe",
        "task",
        *[h for heading in used for h in ([heading, *worst] if heading == POSTERIOR else [heading])],
    ]
    heads += ["minutes", "n"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for recipe in recipes:
        tasks = [task for r, task in kinds if r == recipe]
        for task in tasks:
            lines.append(_line([r for r in rows if (r["recipe"], r["task"]) == (recipe, task)], recipe, task, used))
        if len(tasks) > 1:
            lines.append(_line([r for r in rows if r["recipe"] == recipe], recipe, "**all**", used))
    return lines


def _line(rows: Sequence[Row], recipe: str, task: str, columns: Mapping[str, str]) -> str:
    done = [row for row in rows if row["status"] == "done"]
    cells = [recipe, task]
    for heading, key in columns.items():
        values = _values(done, heading, key)
        cells.append(cell_text(values))
        if heading == POSTERIOR:
            cells.append(f"{min(values):.3f}" if values else "–")
    minutes = [(row["fit_seconds"] + row["test_seconds"]) / 60 for row in done]
    failed = len(rows) - len(done)
    cells += [
        f"{np.median(minutes):.1f}" if minutes else "–",
        f"{len(done)}" + (f" ({failed} failed)" if failed else ""),
    ]
    return f"| {' | '.join(cells)} |"


def _shares(done: Sequence[Row]) -> list[str]:
    """Return a table of what drives each recipe's objective: |weight_i L_i| over their sum, on the test split."""
    recipes = dict.fromkeys(row["recipe"] for row in done if row.get("loss_fractions"))
    lines = []
    for recipe in recipes:
        cells = [row["loss_fractions"] for row in done if row["recipe"] == recipe]
        names = dict.fromkeys(name for shares in cells for name in shares)
        middle = {name: float(np.median([shares.get(name, 0.0) for shares in cells])) for name in names}
        largest = sorted(middle.items(), key=lambda item: -item[1])
        text = ", ".join(f"{name.removesuffix('_loss')} {share:.2f}" for name, share in largest if share >= 0.005)
        lines.append(f"| {recipe} | {text} |")
    return ["| recipe | median share |", "|---|---|", *lines] if lines else []


def _values(rows: Iterable[Row], heading: str, key: str) -> list[float]:
    found = (value(row, heading, key) for row in rows)
    return [number for number in found if number is not None]


def _name(row: Row) -> str:
    return f"{row['task']}/{row['recipe']}" + ("" if row["seed"] is None else f"/seed{row['seed']}")
