"""What a checkpoint may name: rebuilding a model from it must not run code that the user did not ask for."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cvae_lightning.spec import HasSpec

OWN = "cvae_lightning"


def read_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Return the content of a checkpoint: tensors and plain data.

    Args:
        path: the file.
        map_location: as for ``torch.load``; None = the device that it was saved from, where there is such a one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, no checkpoint, or holds anything else.
    """
    where: Any = _where_it_was if map_location is None else map_location
    return read_plain(lambda: torch.load(path, map_location=where, weights_only=True), path)


def _where_it_was(storage: Any, location: str) -> Any:
    """Put a storage, which is on the CPU, where it was when it was saved, if there is such a device."""
    try:
        return torch.serialization.default_restore_location(storage, location)
    except RuntimeError:
        return storage


def read_plain(read: Callable[[], Any], path: str | Path) -> dict[str, Any]:
    """Return what ``read`` returns; an error becomes one that names ``path`` and says why it cannot be read."""
    try:
        content = read()
    except OSError:
        raise
    except Exception as error:  # a torn or forged file fails in many ways: zip, pickle, struct, unicode, ...
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class (\S+) to be unpickled", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            why = f"it holds {foreign.group(1)}; only tensors and plain data are ever loaded"
        else:
            why = "it is truncated, or not a checkpoint"
        raise ValueError(f"cannot read checkpoint {path}: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read checkpoint {path}: it holds one {type(content).__name__}, not a checkpoint")
    return content


def rebuild(value: Any, source: str) -> Any:
    """Return hyperparameters of a checkpoint with every ``{class_path, init_args}`` in them built.

    ``weights_only=True`` keeps pickled code out of a checkpoint, but its hyperparameters name classes. Those alone are
    built that :func:`find_class` accepts, and a text stays a text: jsonargparse, which Lightning would use here, takes
    some texts for the name of a class or for YAML that holds one, and imports what they name.

    Args:
        value: nested dicts and lists, as stored in a checkpoint.
        source: name of the checkpoint, for the message.

    Raises:
        ValueError: naming the class and how to allow it, or what does not fit the class.

    Example:
        >>> rebuild({"losses": {"kl": {"class_path": "cvae_lightning.losses.PriorKLLoss"}}}, "a.ckpt")
        {'losses': {'kl': PriorKLLoss()}}
        >>> rebuild({"losses": {"kl": {"class_path": "elsewhere.KL"}}}, "a.ckpt")
        Traceback (most recent call last):
        ValueError: a.ckpt names elsewhere.KL, whose module is not imported: if you trust it, `import elsewhere` first
    """
    if isinstance(value, list | tuple):
        return [rebuild(item, source) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: rebuild(item, source) for key, item in value.items()}
    cls = find_class(value["class_path"], HasSpec, source)
    arguments: dict[str, Any] = {}
    for key in ("init_args", "dict_kwargs"):
        part = rebuild(value.get(key) or {}, source)
        if not isinstance(part, dict):
            raise ValueError(f"{source}: {key} of {value['class_path']} must be a mapping, got {part!r:.60}")
        arguments |= part
    try:
        return cls(**arguments)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source}: {value['class_path']} cannot be built: {error}") from error


def find_class(path: Any, base: type, source: str) -> Any:
    """Return the class that a checkpoint names, without importing anything but modules of this package.

    Args:
        path: dotted path of the class.
        base: class that it must derive from.
        source: name of the checkpoint, for the message.

    Raises:
        ValueError: if its module is not imported yet, or it is no such class.
    """
    if not isinstance(path, str) or "." not in path:
        raise ValueError(f"{source}: a class_path must be a dotted path, got {path!r:.60}")
    parts = path.split(".")
    module = ".".join(parts[:-1])
    if parts[0] == OWN and module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"{source} names {path}, which this version of {OWN} does not have") from error
    known = next((i for i in range(len(parts) - 1, 0, -1) if ".".join(parts[:i]) in sys.modules), 0)
    if not known:
        raise ValueError(
            f"{source} names {path}, whose module is not imported: if you trust it, `import {module}` first"
        )
    found: Any = sys.modules[".".join(parts[:known])]
    for part in parts[known:]:  # the __getattr__ of a module of others might import what is asked of it
        found = getattr(found, part, None) if parts[0] == OWN else getattr(found, "__dict__", {}).get(part)
    if not (isinstance(found, type) and issubclass(found, base)):
        if known < len(parts) - 1 and found is None:
            raise ValueError(
                f"{source} names {path}, whose module is not imported: if you trust it, `import {module}` first"
            )
        raise ValueError(
            f"{source} names {path}, which is no {base.__name__}: a checkpoint may name only such classes; "
            "give other objects to load_from_checkpoint as arguments"
        )
    return found
