"""The artifact folder of an entangled model: Hugging Face model and tokenizer beside ``baseline.json``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cvae_lightning.atomic_write import write_json

BASELINE_FILE = "baseline.json"


@dataclass(frozen=True)
class Baseline:
    """What the entangled model costs, and on what that was measured.

    Args:
        c_base: mean NLL per supervised token on the validation split, in nats.
        num_tokens: number of those tokens.
        data: fingerprint of the validation split.
        template: fingerprint of tokenizer and template.
        seconds: wall time of the training, in seconds; 0 if the model was only evaluated.
    """

    c_base: float
    num_tokens: int
    data: str
    template: str
    seconds: float = 0.0

    def save(self, folder: str | Path) -> None:
        """Write ``baseline.json`` atomically."""
        write_json(Path(folder) / BASELINE_FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | Path) -> Baseline | None:
        """Read ``baseline.json``; None where the folder has none (a plain Hugging Face model).

        Raises:
            ValueError: if the file is broken or its ``c_base`` is missing or not positive.
        """
        path = Path(folder) / BASELINE_FILE
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if "c_base" not in content:
                raise ValueError("it has no key 'c_base'; run `cvae-lightning validate` on the entangled model again")
            baseline = cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        check_c_base(baseline.c_base, str(path))
        return baseline


def check_c_base(value: Any, where: str) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: if it is not a positive finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where}: c_base must be a positive number of nats per token, got {value!r}")
    return float(value)


def save_artifact(folder: str | Path, lm: Any, tokenizer: Any, baseline: Baseline) -> None:
    """Write model, tokenizer and, last, the baseline, so that a torn artifact is never taken for whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BASELINE_FILE).unlink(missing_ok=True)
    lm.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    baseline.save(folder)
