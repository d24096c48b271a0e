"""The frozen weights that a checkpoint leaves out: where they come from, and whether they are the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cvae_lightning.backbones.baseline_cache import weights_fingerprint
from cvae_lightning.backbones.causal_lm import load_causal_lm

FORMAT = 2
"""Version of the checkpoints: 1, without a number, holds all weights; 2 may leave frozen ones out."""

FORMAT_KEY = "cvae_lightning_format"
WEIGHTS, NAME, FOLDER, MARKERS = "base_weights", "base_name", "base_folder", "base_new_markers"
ADVICE = "give model.entangled (in Python, entangled=) as the folder or hub name of the model that it was trained from"


def check_format(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise if a checkpoint is of a later version.

    Raises:
        ValueError: naming both versions.
    """
    found = checkpoint.get(FORMAT_KEY, 1)
    if not isinstance(found, int) or found > FORMAT:
        raise ValueError(f"{source} has the checkpoint format {found!r}; this version reads formats up to {FORMAT}")


def describe_base(name: str, lm: Any) -> dict[str, str]:
    """Return where a model's weights were loaded from, and their hash."""
    where = {NAME: name, WEIGHTS: weights_fingerprint(lm)}
    return where | ({FOLDER: str(Path(name).resolve())} if Path(name).is_dir() else {})


def load_base(description: Mapping[str, str]) -> Any:
    """Return the model that a checkpoint's weights were trained on: from the name or the folder it had then.

    Raises:
        ValueError: if it is not there, or its weights have changed.
    """
    name = description[NAME]
    folder = next((place for place in (name, description.get(FOLDER)) if place and Path(place).is_dir()), name)
    try:
        lm = load_causal_lm(folder)
    except ValueError as error:
        raise ValueError(
            f"a checkpoint holds what was trained, without the frozen weights of {name!r}; {error}: {ADVICE}"
        ) from error
    check_base(weights_fingerprint(lm), description.get(WEIGHTS), folder)
    return lm


def check_base(found: str | None, expected: str | None, name: str) -> None:
    """Raise if frozen weights are not those that a checkpoint leaves out.

    Raises:
        ValueError: naming both hashes.
    """
    if found != expected:
        raise ValueError(
            f"a checkpoint was trained on frozen weights with the hash {expected}, those of {name!r} have {found}: "
            f"{ADVICE}"
        )
