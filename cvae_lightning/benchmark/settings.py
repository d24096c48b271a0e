"""The config file of a benchmark, checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cvae_lightning.config_merge import read_config
from cvae_lightning.recipes import find_recipe

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Source:
    """Configs merged in order, and dotted options on top.

    Args:
        configs: config files or names of shipped recipes; ``{task}`` stands for the name of the task.
        options: values by dotted name.
        folder: entangled models only: a folder that holds one already, in place of configs.
    """

    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None


@dataclass(frozen=True)
class TaskSettings:
    """One task.

    Args:
        entangled: how the entangled model that its recipes start from is trained.
        options: what every recipe of this task gets, after the recipe's configs and before the recipe's options.
    """

    entangled: Source
    options: Mapping[str, Any]


@dataclass(frozen=True)
class RecipeSettings:
    """One recipe: an ordinary config of the command line.

    Args:
        source: its configs and options.
        group: heading of its rows in the table.
        tasks: names of its tasks; None = all.
        seeds: its seeds; None = those of the benchmark.
        entangled: configs in place of the task's, and options on top of the task's, where it needs another entangled
            model.
    """

    source: Source
    group: str = ""
    tasks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    entangled: Source | None = None


@dataclass(frozen=True)
class Settings:
    """A benchmark.

    Args:
        results: folder of all that it writes; several processes or machines may share it.
        tasks: tasks by name.
        recipes: recipes by name.
        seeds: seeds of every recipe.
        jobs: cells that one process runs at a time.
        threads: threads of each.
        test_options: options that count in tests only, for instance a larger number of generated examples.
        columns: further columns of the table: ``KEY`` or ``KEY / KEY`` of ``summary.json``, by heading.
    """

    results: str
    tasks: Mapping[str, TaskSettings]
    recipes: Mapping[str, RecipeSettings]
    seeds: tuple[int, ...] = (1, 2, 3)
    jobs: int = 1
    threads: int = 1
    test_options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)


def find_benchmark(name: str, kind: str = "benchmark") -> Path:
    """Return the file of a benchmark: a file, or the name of a shipped one with or without ``benchmark/``.

    Args:
        name: file or name.
        kind: folder of the shipped ones.

    Raises:
        FileNotFoundError: if there is none.
    """
    if Path(name).is_file():
        return Path(name)
    for candidate in (f"{kind}/{name}", name):
        try:
            return find_recipe(candidate)
        except FileNotFoundError as error:
            failure = error
    raise failure


def load_settings(path: Path) -> Settings:
    """Read and check the config file of a benchmark.

    Raises:
        ValueError: naming the file and the key that is unknown, missing or of another kind than expected.
    """
    content = read_config(path)
    try:
        return parse_settings(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_settings(content: dict[str, Any]) -> Settings:
    """Return the settings that the content of a config file describes.

    Raises:
        ValueError: naming the key.
    """
    check_keys(content, "", [f.name for f in fields(Settings)], required=("results", "tasks", "recipes"))
    tasks = {name: _task(name, entry) for name, entry in _named(content, "tasks").items()}
    recipes = {name: _recipe(name, entry, tasks) for name, entry in _named(content, "recipes").items()}
    columns = mapping(content.get("columns"), "columns")
    for title, key in columns.items():
        if not isinstance(key, str) or not 1 <= len(key.split(" / ")) <= 2:
            raise ValueError(f"columns.{title}: expected KEY or 'KEY / KEY' of summary.json, got {key!r}")
    return Settings(
        results=_text(content["results"], "results"),
        tasks=tasks,
        recipes=recipes,
        seeds=_seeds(content.get("seeds", [1, 2, 3]), "seeds"),
        jobs=positive(content.get("jobs", 1), "jobs"),
        threads=positive(content.get("threads", 1), "threads"),
        test_options=mapping(content.get("test_options"), "test_options"),
        columns=columns,
    )


def _task(name: str, entry: Any) -> TaskSettings:
    key = f"tasks.{name}"
    if isinstance(entry, str):
        entry = {"entangled": entry}
    entry = mapping(entry, key)
    check_keys(entry, key, ("entangled", "options"), required=("entangled",))
    entangled = _source(entry["entangled"], f"{key}.entangled", may_be_folder=True)
    if bool(entangled.configs) == bool(entangled.folder):
        raise ValueError(f"{key}.entangled: expected either configs or a folder, got {entry['entangled']!r}")
    return TaskSettings(entangled, mapping(entry.get("options"), f"{key}.options"))


def _recipe(name: str, entry: Any, tasks: Mapping[str, TaskSettings]) -> RecipeSettings:
    key = f"recipes.{name}"
    if name.startswith("entangled"):
        raise ValueError(f"{key}: names that begin with 'entangled' are those of the entangled models")
    entry = mapping(entry, key)
    check_keys(entry, key, ("configs", "options", "group", "tasks", "seeds", "entangled"), required=("configs",))
    chosen = entry.get("tasks")
    for task in _texts(chosen, f"{key}.tasks") if chosen is not None else ():
        if task not in tasks:
            raise ValueError(f"{key}.tasks: {task!r} is none of the tasks {', '.join(tasks)}")
    entangled = entry.get("entangled")
    return RecipeSettings(
        source=_source({k: entry[k] for k in ("configs", "options") if k in entry}, key),
        group=_text(entry.get("group", ""), f"{key}.group", empty=True),
        tasks=None if chosen is None else _texts(chosen, f"{key}.tasks"),
        seeds=_seeds(entry["seeds"], f"{key}.seeds") if "seeds" in entry else None,
        entangled=None if entangled is None else _source(entangled, f"{key}.entangled", may_be_folder=True),
    )


def _source(entry: Any, key: str, may_be_folder: bool = False) -> Source:
    if isinstance(entry, str | list):
        entry = {"configs": entry}
    entry = mapping(entry, key)
    check_keys(entry, key, ("configs", "options", "folder") if may_be_folder else ("configs", "options"))
    configs = entry.get("configs", [])
    folder = entry.get("folder")
    return Source(
        configs=_texts([configs] if isinstance(configs, str) else configs, f"{key}.configs"),
        options=mapping(entry.get("options"), f"{key}.options"),
        folder=None if folder is None else _text(folder, f"{key}.folder"),
    )


def check_keys(entry: Mapping[str, Any], key: str, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Refuse keys that are unknown, missing or empty; the message holds the nearest known one."""
    known, place = list(known), f"{key}." if key else ""
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
            raise ValueError(f"unknown key {place}{name}; {hint}")
    for name in required:
        if entry.get(name) in (None, "", [], {}):
            raise ValueError(f"{place}{name} is missing or empty")


def _named(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entries = mapping(content[key], key)
    for name in entries:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{key}: a name becomes a folder: expected letters, digits and _ . + -, got {name!r}")
    return entries


def mapping(value: Any, key: str) -> dict[str, Any]:
    """Return a checked mapping; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected a mapping, got {value!r:.60}")
    return value


def _text(value: Any, key: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{key}: expected a text, got {value!r:.60}")
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{key}: expected a list of texts, got {value!r:.60}")
    return tuple(_text(item, key) for item in value)


def _seeds(value: Any, key: str) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not whole or not value or len({*value}) < len(value):
        raise ValueError(f"{key}: expected a list of different integers >= 0, got {value!r:.60}")
    return tuple(value)


def positive(value: Any, key: str) -> int:
    """Return a checked integer of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}: expected an integer of at least 1, got {value!r:.60}")
    return value
