"""Inputs for the sample outputs of a model card, from the data that the run was configured with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from cvae_lightning.callbacks.examples import different_inputs
from cvae_lightning.config_merge import read_config
from cvae_lightning.template import PromptTemplate
from cvae_lightning.trust import find_class, rebuild


def beside(checkpoint: Path, name: str) -> Path | None:
    """Return the file of this name in the checkpoint's folder or the one above it, the run's; None without one."""
    folder = checkpoint.absolute().parent
    return next((path for path in (folder / name, folder.parent / name) if path.is_file()), None)


def sample_inputs(config: Path, count: int, template: PromptTemplate) -> list[str]:
    """Return the first different inputs of the test split, or of the validation split where there is none.

    What is longer than the ``max_length`` of the model's ``template`` is left out, as it was in training. The config
    lies beside a checkpoint and may be a stranger's, so only classes of this package, or of modules that are imported
    already, are built.

    Raises:
        ValueError: if the config names no data, or other classes, or the data cannot be read.
    """
    given: Any = read_config(config).get("data")
    if not isinstance(given, dict) or "class_path" not in given:
        raise ValueError(f"{config}: expected data with a class_path, got {given!r:.60}")
    cls = find_class(given["class_path"], LightningDataModule, str(config))
    try:
        data = cls(**rebuild(given.get("init_args") or {}, str(config)))
        split = "test" if data.has_split("test") else "val"
        if hasattr(data, "kept_records"):
            data.template = template
        return [record.x for record in different_inputs(data, split, count)]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{config}: {given['class_path']} cannot be built: {error}") from error
