"""What a run has written for TensorBoard, as plain numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

CURVES = (
    "val/alignment/one_to_one",
    "val/controlled/alignment_one_to_one",
    "val/probe/posterior_accuracy",
    "val/rho_recon",
    "val/marginal_nll",
    "val/baseline_nll",
)
"""Keys whose course over the training is kept."""
FRACTION = "test/loss_contrib/fraction_abs/"


def read_history(folder: Path) -> tuple[dict[str, list[list[float]]], dict[str, float]]:
    """Return the validation curves of a run, and the share of each loss term in its test.

    Args:
        folder: the folder of the event files; those of a run that was broken off and went on are read as one.

    Returns:
        ``{key: [[step, value], ...]}`` with rising steps, and ``{loss name: share}``.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    keys = events.Tags()["scalars"]
    curves = {}
    for key in (key for key in CURVES if key in keys):
        points = {event.step: event.value for event in events.Scalars(key) if math.isfinite(event.value)}
        curves[key] = [[step, round(points[step], 6)] for step in sorted(points)]
    last = {key: events.Scalars(key)[-1].value for key in keys if key.startswith(FRACTION)}
    shares = {key.removeprefix(FRACTION): round(value, 6) for key, value in last.items() if math.isfinite(value)}
    return curves, shares
