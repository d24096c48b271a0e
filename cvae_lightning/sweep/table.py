"""The Markdown table of a sweep: its trials, the best one first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from cvae_lightning.sweep.search import Search


def markdown(search: Search, trials: Sequence[FrozenTrial], command: str) -> str:
    """Return the page.

    Args:
        search: the sweep.
        trials: those that have all their options, in the order in which they were asked for.
        command: what the user typed.
    """
    settings = search.settings
    counts = Counter(trial.state.name.lower() for trial in trials)
    said = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none yet"
    lines = [f"`{command}`", "", f"Trials: {said}. Objective: {settings.objective}, {settings.direction}."]
    if settings.caution:
        lines += ["", f"Note: {settings.caution}."]
    lines += [
        "",
        "The whole config of a trial: `TASK/FOLDER/seed1/fit.yaml` beside this page; all its figures: `table.md`.",
    ]
    names = list(settings.space)
    lines += ["", f"| {' | '.join(['trial', 'objective', *names, 'folder'])} |"]
    lines.append("|" + "---:|" * (2 + len(names)) + "---|")
    sign = 1 if settings.direction == "minimize" else -1
    finished = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
    best = sorted(finished, key=lambda trial: sign * float(trial.value or 0.0))
    for trial in [*best, *(trial for trial in trials if trial not in best)]:
        options = search.options(trial.params)
        figure = f"{trial.value:.6g}" if trial in best else trial.state.name.lower()
        cells = [str(trial.number), figure, *(_text(options[name]) for name in names), search.name(trial.params)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _text(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|")
