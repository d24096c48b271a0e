"""``--config`` by file or recipe name, where a later file changes single losses and leaves the others as they were."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile, Namespace

from cvae_lightning.recipes import find_recipe

MAX_DEPTH = 50
MAX_ENTRIES = 100_000


class MergeConfig(ActionConfigFile):
    """Config option that merges ``model.init_args.losses`` by name (jsonargparse alone replaces the whole dict)."""

    def __call__(self, parser: Any, cfg: Any, value: Any, option_string: str | None = None) -> None:
        """Apply one config file on top of what the options before it gave."""
        if value.startswith("{"):  # YAML on the command line
            path, config = value, parse_config(value, "--config")
        else:
            path = Path(value) if Path(value).is_file() else find_recipe(value)
            config = read_config(path)
        try:
            merged = merge_model(config, _plain(cfg.get("model")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if merged:  # the new model entry is complete: what it replaces must not leak into it
            before = cfg["model"]  # keeps its class: jsonargparse drops the arguments that another one does not have
            cfg["model"] = Namespace(class_path=before["class_path"], init_args=before.get("init_args") or Namespace())
            if "losses" in (config["model"].get("init_args") or {}):
                cfg["model"]["init_args"].pop("losses", None)
        super().__call__(parser, cfg, yaml.safe_dump(config, sort_keys=False) if merged else str(path), option_string)


def rewrite_nulls(words: Sequence[str]) -> list[str]:
    """Replace ``--model.losses.NAME null`` by the config that switches this loss off.

    jsonargparse takes that ``null`` for the name of a class when the model itself is given by ``class_path``.

    Example:
        >>> rewrite_nulls(["fit", "--model.losses.kl=null", "--model.losses.jsd.weight", "2"])
        ['fit', '--config', '{model: {losses: {kl: null}}}', '--model.losses.jsd.weight', '2']
    """
    result: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        name = re.fullmatch(r"--model\.(?:init_args\.)?losses\.(\w+)", option)
        if name and (value or (rest and rest[0])) == "null":
            if not equals:
                rest.pop(0)
            result += ["--config", f"{{model: {{losses: {{{name.group(1)}: null}}}}}}"]
        else:
            result.append(word)
    return result


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON config file.

    Raises:
        ValueError: if it is not valid YAML (the message names file and line) or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    return parse_config(text, str(path))


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Return the content of a config in YAML or JSON.

    Args:
        text: the config.
        where: name of its file or option, for messages.

    Raises:
        ValueError: if it is not valid YAML (the message names the line) or not a mapping.
    """
    try:
        content = jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"{where}{line}: not valid YAML: {problem!s:.200}") from error
    except Exception as error:  # what a value is made into: a date of month 13, a number of 5000 digits, deep nesting
        raise ValueError(f"{where}: not valid YAML: {error!s:.200}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping with keys such as model, data, trainer; got {content!r:.60}")
    try:
        _check_entries(content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return content


def _check_entries(content: Any) -> None:
    """Raise where a key is no name, or where aliases stand for so much that merging it would fill the memory."""
    level, entries = [content], 0
    for _ in range(MAX_DEPTH):
        mappings = [value for value in level if isinstance(value, dict)]
        for key in (key for mapping in mappings for key in mapping):
            if isinstance(key, bool) or not isinstance(key, str | int):  # numbers name the labels of a model's config
                raise ValueError(f"expected a text as key, got {key!r:.60} ({type(key).__name__})")
        entries += len(level)
        level = [value for mapping in mappings for value in mapping.values()] + [
            item for value in level if isinstance(value, list) for item in value
        ]
        if not level:
            return
        if entries > MAX_ENTRIES:
            break
    raise ValueError(
        f"expected at most {MAX_ENTRIES} entries and {MAX_DEPTH} levels, got more, or a config that contains itself"
    )


def merge_model(config: dict[str, Any], previous: Any) -> bool:
    """Complete ``config["model"]`` in place with the class path and the losses of the previous config.

    A model entry without ``class_path`` keeps the previous class; without ``init_args`` its keys are the arguments.

    Returns:
        Whether there was anything to complete.

    Raises:
        ValueError: if a new loss has no ``class_path``, which a misspelt name would look like.

    Example:
        >>> config = {"model": {"losses": {"kl": {"weight": 0.3}, "r": None}}}
        >>> losses = {"kl": {"class_path": "KL"}, "r": {"class_path": "R"}, "jsd": {"class_path": "J"}}
        >>> merge_model(config, {"class_path": "M", "init_args": {"losses": losses}})
        True
        >>> for name, loss in config["model"]["init_args"]["losses"].items(): print(name, loss)
        kl {'class_path': 'KL', 'init_args': {'weight': 0.3}}
        r None
        jsd {'class_path': 'J'}
    """
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(previous, dict) or "class_path" not in previous:
        return False
    if not model.keys() & {"class_path", "init_args", "dict_kwargs"}:
        model = config["model"] = {"init_args": model}
    model.setdefault("class_path", previous["class_path"])
    losses, before = (_arguments(entry).get("losses") for entry in (model, previous))
    if isinstance(losses, dict) and isinstance(before, dict):
        for name in losses.keys() - before.keys():
            if not isinstance(losses[name], dict) or "class_path" not in losses[name]:
                near = difflib.get_close_matches(str(name), map(str, before), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"existing losses: {', '.join(map(str, before)):.200}"
                raise ValueError(f"losses.{name!s:.60} is new and needs a class_path; {hint}")
        merged = before | {name: merge_loss(entry, before.get(name)) for name, entry in losses.items()}
        model["init_args"]["losses"] = merged
    return True


def merge_loss(entry: Any, before: Any) -> Any:
    """Return one loss entry completed by the entry of that name before it; another class starts afresh.

    Example:
        >>> merge_loss({"weight": 2}, {"class_path": "KL", "init_args": {"weight": 1, "free": 0.1}})
        {'class_path': 'KL', 'init_args': {'weight': 2, 'free': 0.1}}
        >>> merge_loss({"class_path": "JSD"}, {"class_path": "KL", "init_args": {"weight": 1}})
        {'class_path': 'JSD'}
    """
    if not isinstance(entry, dict) or not isinstance(before, dict):
        return entry
    if not entry.keys() & {"class_path", "init_args", "dict_kwargs"}:
        entry = {"init_args": entry}
    if entry.get("class_path", before.get("class_path")) != before.get("class_path"):
        return entry
    arguments = _arguments(before) | _arguments(entry)
    return before | entry | {"init_args": arguments}


def _arguments(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the ``init_args`` of the entry of a class.

    Raises:
        ValueError: if they are no mapping.
    """
    arguments = entry.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"init_args: expected a mapping, got {arguments!r:.60}")
    return arguments


def _plain(value: Any) -> Any:
    """Turn namespaces, nested in dicts too, into dicts."""
    if isinstance(value, Namespace):
        value = vars(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
