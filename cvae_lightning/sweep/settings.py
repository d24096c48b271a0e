"""The config file of a sweep, checked: that of a benchmark with one recipe, and what is searched for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cvae_lightning.benchmark.history import CURVES
from cvae_lightning.benchmark.settings import Settings, check_keys, mapping, parse_settings, positive
from cvae_lightning.config_merge import read_config

OWN = ("space", "objective", "direction", "trials", "prune")
EVIDENCE = "val/marginal_nll"
WITHOUT_LABELS = {"marginal_nll", "baseline_nll", "rho_recon", "nll_ratio", "usage_perplexity", "prior_kl"}
"""Names of figures that need neither labels nor a verifier."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; whole ones if both ends are.

    Args:
        low: smallest value.
        high: largest value.
        log: whether they are searched on a logarithmic scale.
        step: distance of two values; None = any value.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether its values are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Choices:
    """One of several values of any kind, each as JSON: null and the entry of a class are values too.

    Args:
        texts: the values.
    """

    texts: tuple[str, ...]


@dataclass(frozen=True)
class SweepSettings:
    """A sweep.

    Args:
        benchmark: tasks, seeds and the one recipe; every trial runs all of its cells.
        space: what is searched for, by dotted option.
        objective: ``KEY`` or ``KEY / KEY``: validation curves (``val/...``, at the end of the training) or keys of
            ``summary.json`` (test split); the mean over the cells of a trial counts.
        direction: whether the objective is to be small or large.
        trials: number of trials that are to finish.
        prune: whether to end trials whose objective is worse than the median of the others at the same step.
    """

    benchmark: Settings
    space: Mapping[str, Range | Choices]
    objective: str = EVIDENCE
    direction: Literal["minimize", "maximize"] = "minimize"
    trials: int = 20
    prune: bool = False

    @property
    def keys(self) -> list[str]:
        """The one or two parts of the objective."""
        return self.objective.split(" / ")

    @property
    def caution(self) -> str | None:
        """What choosing by this objective means, if it is more than model selection by the validation evidence."""
        said = []
        if any(not key.startswith("val/") for key in self.keys):
            said.append("the test split, on which the best trial's figures are no longer an honest estimate")
        if any(key.removeprefix("val/") not in WITHOUT_LABELS for key in self.keys):
            said.append("labels or a verifier, which no training sees")
        return f"{self.objective} chooses by {' and by '.join(said)}" if said else None


def load_sweep(path: Path) -> SweepSettings:
    """Read and check the config file of a sweep.

    Raises:
        ValueError: naming the file and the key that is unknown, missing or of another kind than expected.
    """
    content = read_config(path)
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(content: dict[str, Any]) -> SweepSettings:
    own = {key: content.pop(key) for key in OWN if key in content}
    benchmark = parse_settings({"seeds": [1]} | content)
    if len(benchmark.recipes) != 1:
        raise ValueError(f"recipes: expected one recipe, got {', '.join(benchmark.recipes)}")
    check_keys(own, "", OWN, required=("space",))
    space = {str(name): _domain(entry, f"space.{name}") for name, entry in mapping(own["space"], "space").items()}
    objective, direction = own.get("objective", EVIDENCE), own.get("direction", "minimize")
    if not isinstance(objective, str) or not 1 <= len(objective.split(" / ")) <= 2:
        raise ValueError(f"objective: expected KEY or 'KEY / KEY', got {objective!r:.60}")
    for key in objective.split(" / "):
        if "/" in key and key not in CURVES:
            raise ValueError(f"objective: {key!r} is none of {', '.join(CURVES)}, and no key of summary.json")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"direction: expected minimize or maximize, got {direction!r:.60}")
    prune = own.get("prune", False)
    if not isinstance(prune, bool):
        raise ValueError(f"prune: expected true or false, got {prune!r:.60}")
    settings = SweepSettings(benchmark, space, objective, direction, positive(own.get("trials", 20), "trials"), prune)
    if prune and any(not key.startswith("val/") for key in settings.keys):
        raise ValueError(f"prune: expected an objective of validation curves (val/...), got {objective}")
    return settings


def _domain(entry: Any, key: str) -> Range | Choices:
    entry = mapping(entry, key)
    check_keys(entry, key, ("choices", "low", "high", "log", "step"))
    if "choices" in entry:
        if len(entry) > 1 or not isinstance(entry["choices"], list) or not entry["choices"]:
            raise ValueError(f"{key}: expected choices as a list and nothing else, got {entry!r:.80}")
        try:
            texts = tuple(json.dumps(choice) for choice in entry["choices"])
        except TypeError as error:
            raise ValueError(f"{key}.choices: expected what JSON can hold: {error}") from error
        if len({*texts}) < len(texts):
            raise ValueError(f"{key}.choices: expected different values, got {entry['choices']!r:.80}")
        return Choices(texts)
    low, high, step, log = entry.get("low"), entry.get("high"), entry.get("step"), entry.get("log", False)
    numbers = [low, high] + ([] if step is None else [step])
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e15 for n in numbers):
        raise ValueError(f"{key}: expected choices, or low and high as numbers, got {entry!r:.80}")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise ValueError(
            f"{key}: expected log as true or false, and with log a low above 0 and no step; got {entry!r:.80}"
        )
    if low >= high or (step is not None and not 0 < step <= high - low <= 1e6 * step):
        raise ValueError(f"{key}: expected low < high, and at least one step and at most a million, got {entry!r:.80}")
    domain = Range(low, high, log, step)
    if domain.whole and step is not None and not isinstance(step, int):
        raise ValueError(f"{key}: expected a whole step between whole ends, got {step!r}")
    return domain
