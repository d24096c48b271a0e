"""Turns the nested error reports of jsonargparse into one sentence, with the nearest name where there is one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from typing import Any

from jsonargparse import ArgumentParser

_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value type:",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
)


def explain(message: str, parser: ArgumentParser) -> str:
    """Return a jsonargparse error as one line, with a suggestion for a misspelt option, argument or class.

    Args:
        message: the text of the ArgumentError.
        parser: the parser of a subcommand, whose options are the candidates for a misspelt one.
    """
    return condense(message) + suggest(message, parser)


def condense(message: str) -> str:
    r"""Join the lines that say what is wrong, outermost first.

    Example:
        >>> condense("Parser key 'a':\n  Errors:\n    - Expected an int. Got value: x\n")
        "Parser key 'a': Expected an int. Got value: x"
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    kept = [line for line in kept if not line.startswith("Given value:") or "NestedArg" in line]
    text = "; ".join(dict.fromkeys(kept)).replace(":; ", ": ")
    text = re.sub(r";? ?Given value: NestedArg\(key='([^']*)', val='?(.*?)'?\)", r" (given: \1 = \2)", text)
    return text.replace("<class 'NoneType'>", "null")


def suggest(message: str, parser: ArgumentParser) -> str:
    """Return ``; did you mean ...?`` or other advice that fits the error, or nothing."""
    if "is abstract" in message or "Subclass types expect one of" in message:
        return "; a new entry needs its own class_path, and a name that changes an existing entry must be spelt alike"
    for pattern, candidates in (
        (r"unrecognized arguments: --([\w.]+)", lambda _: _destinations(parser)),
        (r"[Kk]ey '([\w.]+)' is not expected", lambda _: _destinations(parser)),
        (r"does not accept (?:option|nested key) '([\w.]+)'", lambda _: _destinations(parser)),
        (r"Option '([\w.]+)' is not accepted", lambda _: _arguments(message)),
        (r"module '[\w.]+' has no attribute '(\w+)'", lambda _: _members(message)),
    ):
        found = re.search(pattern, message)
        if found:
            names = candidates(found)
            near = difflib.get_close_matches(found.group(1), names, n=1) or _by_last_part(found.group(1), names)
            return f"; did you mean {near[0]!r}?" if near else ""
    return ""


def _destinations(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest]


def _by_last_part(name: str, names: list[str]) -> list[str]:
    return [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]


def _arguments(message: str) -> list[str]:
    """Return the argument names of the innermost class that the message names."""
    paths = re.findall(r"class_path '([\w.]+)'", message)
    try:
        module, name = paths[-1].rsplit(".", 1)
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (IndexError, ValueError, ImportError, AttributeError):
        return []


def _members(message: str) -> list[str]:
    found: Any = re.search(r"module '([\w.]+)' has no attribute", message)
    try:
        module = importlib.import_module(found.group(1))
        return [*dir(module), *getattr(module, "__all__", [])]  # a lazy module lists only the latter
    except ImportError:
        return []
