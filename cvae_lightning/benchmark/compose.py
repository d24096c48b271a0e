"""Configs and options become one config, by the rules of ``cvae-lightning fit --config A --config B --name value``."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from cvae_lightning.config_merge import merge_model

ENTRY_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def compose(configs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configs merged in order, with the options set.

    Args:
        configs: contents of config files; later ones win, losses merge by name.
        options: values by dotted name. ``callbacks.PATTERN.ARGUMENT`` sets an argument of the callbacks whose class
            name matches the shell pattern.

    Raises:
        ValueError: if an option leads nowhere, or a new loss has no class.

    Example:
        >>> kl = {"class_path": "KL", "init_args": {"weight": 1, "free_nats": 0.5}}
        >>> base = {"model": {"class_path": "M", "init_args": {"num_latents": 4, "losses": {"kl": kl}}}}
        >>> more = {"model": {"losses": {"kl": {"weight": 2}}}}
        >>> compose([base, more], {"model.num_latents": 8})["model"]["init_args"]
        {'num_latents': 8, 'losses': {'kl': {'class_path': 'KL', 'init_args': {'weight': 2, 'free_nats': 0.5}}}}
    """
    result: dict[str, Any] = {}
    for config in configs:
        result = _merge(result, deepcopy(dict(config)))
    check_groups(result)
    for name, value in options.items():
        set_option(result, name, deepcopy(value))
    check_groups(result)
    return result


def check_groups(config: Mapping[str, Any]) -> None:
    """Refuse a config whose groups are of another kind than those of ``cvae-lightning fit``.

    Raises:
        ValueError: naming the group.
    """
    for group in ("model", "data", "trainer", "checkpoint"):
        entry = config.get(group, {})
        if not isinstance(entry, dict) or not isinstance(entry.get("init_args") or {}, dict):
            raise ValueError(f"{group}: expected a mapping, got {entry!r:.60}")
    callbacks = config.get("trainer", {}).get("callbacks") or []
    if not isinstance(callbacks, list) or not all(isinstance(entry, dict | str) for entry in callbacks):
        raise ValueError(f"trainer.callbacks: expected a list of classes, got {callbacks!r:.60}")
    for entry in callbacks:
        if isinstance(entry, dict) and not isinstance(entry.get("init_args") or {}, dict):
            raise ValueError(f"trainer.callbacks: expected init_args as a mapping, got {entry['init_args']!r:.60}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merge_model(over, base.get("model"))  # completes the class and the losses of the model entry
    result = dict(base)
    for group, value in over.items():
        before = base.get(group)
        result[group] = _merge_entry(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _merge_entry(before: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge a group of options, or the entry of a class, key by key; plain dicts and lists are replaced."""
    if "class_path" in before and not over.keys() & ENTRY_KEYS:
        over = {"init_args": over}
    result = dict(before)
    if "class_path" in before and over.get("class_path", before["class_path"]) != before["class_path"]:
        before = result = {**before, "init_args": accepted(over["class_path"], before.get("init_args") or {})}
    for key, value in over.items():
        if isinstance(key, str) and key.endswith("+"):
            more = value if isinstance(value, list) else [value]
            result[key[:-1]] = [*(before.get(key[:-1]) or []), *more]
        elif key == "init_args":
            result[key] = _merge_arguments(before.get(key) or {}, value or {})
        else:
            result[key] = value
    return result


def accepted(class_path: Any, arguments: Any) -> Any:
    """Return those arguments of another class that this one takes too, as LightningCLI keeps them.

    All of them where the class cannot be looked at from here: then the training says what does not fit.
    """
    module, _, name = str(class_path).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return arguments
    if not isinstance(cls, type) or not isinstance(arguments, dict):
        return arguments
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "taken", fail_untyped=False)
    kept = {}
    for key, value in arguments.items():
        with contextlib.suppress(ArgumentError, TypeError, ValueError, KeyError):
            parser.validate(Namespace(taken=Namespace(**{key: deepcopy(value)})), skip_required=True)
            kept[key] = value
    return kept


def _merge_arguments(before: Any, over: Any) -> dict[str, Any]:
    for arguments in (before, over):
        if not isinstance(arguments, dict):
            raise ValueError(f"init_args: expected a mapping, got {arguments!r:.60}")
    merged = {key: _merge_entry(before[key], value) for key, value in over.items() if _same_class(before, key, value)}
    return before | over | merged


def _same_class(before: dict[str, Any], key: str, value: Any) -> bool:
    old = before.get(key)
    if not isinstance(old, dict) or not isinstance(value, dict) or "class_path" not in old:
        return False
    return value.get("class_path", old["class_path"]) == old["class_path"]


def set_option(config: dict[str, Any], name: str, value: Any) -> None:
    """Set one dotted option in place; ``init_args`` may be left out of its name, as on the command line.

    Raises:
        ValueError: if a part of the name is no mapping, or no callback matches.
    """
    if not isinstance(name, str):
        raise ValueError(f"option {name!r:.60}: expected a dotted name")
    first, *path = name.split(".")
    if first == "callbacks":
        _set_callback(config, name, path, value)
        return
    node, parts = config, [first, *path]
    for i, part in enumerate(parts):
        if "class_path" in node and part not in ENTRY_KEYS:
            node = node.setdefault("init_args", {})
        if i == len(parts) - 1:
            node[part] = value
            return
        if not isinstance(node.setdefault(part, {}), dict):
            raise ValueError(
                f"option {name}: {'.'.join(parts[: i + 1])} is {node[part]!r:.60}, which has no {parts[i + 1]}"
            )
        node = node[part]


def _set_callback(config: dict[str, Any], name: str, path: list[str], value: Any) -> None:
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    if len(path) != 2:
        raise ValueError(f"option {name}: expected callbacks.CLASS.ARGUMENT")
    found = [c for c in callbacks if fnmatch.fnmatchcase(class_name(c), path[0])]
    if not found:
        known = ", ".join(class_name(c) for c in callbacks) or "none"
        raise ValueError(f"option {name}: no callback is named {path[0]!r}; trainer.callbacks has {known}")
    for i, callback in enumerate(callbacks):
        if callback in found:
            entry: dict[str, Any] = {"class_path": callback} if isinstance(callback, str) else callback
            callbacks[i] = entry | {"init_args": (entry.get("init_args") or {}) | {path[1]: value}}


def class_name(entry: Mapping[str, Any] | str) -> str:
    """Return the last part of the entry's class path, or of the path itself; empty if it has none."""
    return str(entry if isinstance(entry, str) else entry.get("class_path", "")).rsplit(".", 1)[-1]


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Return what differs between two configs, one text per option.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
        ['a.c: 2 then, 3 now', 'd: absent then, 4 now']
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(dict.fromkeys([*before, *after]))
        parts = (
            differences(before.get(k, ABSENT), after.get(k, ABSENT), f"{name}.{k}" if name else str(k)) for k in keys
        )
        return [text for part in parts for text in part]
    return [] if before == after else [f"{name}: {before!r:.80} then, {after!r:.80} now"]
