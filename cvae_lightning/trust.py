"""Which classes a checkpoint may name: loading one must not import code that the user did not ask for."""

from __future__ import annotations

import sys
from typing import Any

TRUSTED_PACKAGES = ("cvae_lightning", "lightning", "torch")


def check_class_paths(hyper_parameters: Any, source: str) -> None:
    """Raise if the hyperparameters of a checkpoint name a class from a module that is not imported yet.

    ``weights_only=True`` keeps pickled code out of a checkpoint, but jsonargparse imports every ``class_path`` that
    its hyperparameters name, and importing runs code. Classes of this package, torch and lightning are allowed, and
    so is whatever the program, or its config, has imported already.

    Args:
        hyper_parameters: nested dicts and lists, as stored in a checkpoint.
        source: name of the checkpoint, for the message.

    Raises:
        ValueError: naming the class and how to allow it.

    Example:
        >>> check_class_paths({"_class_path": "torch.nn.Linear", "losses": {}}, "a.ckpt")
        >>> check_class_paths({"losses": {"kl": {"class_path": "elsewhere.KL"}}}, "a.ckpt")
        Traceback (most recent call last):
        ValueError: a.ckpt names elsewhere.KL, whose module is not imported: if you trust it, `import elsewhere` first
    """
    if isinstance(hyper_parameters, list | tuple):
        for item in hyper_parameters:
            check_class_paths(item, source)
    if not isinstance(hyper_parameters, dict):
        return
    for key, value in hyper_parameters.items():
        if key not in ("class_path", "_class_path") or not isinstance(value, str) or "." not in value:
            check_class_paths(value, source)
            continue
        module = value.rpartition(".")[0]
        if module.partition(".")[0] not in TRUSTED_PACKAGES and module not in sys.modules:
            raise ValueError(
                f"{source} names {value}, whose module is not imported: if you trust it, `import {module}` first"
            )
