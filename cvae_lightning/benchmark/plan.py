"""From the settings to the cells: one training and test each, with the one config that it runs."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvae_lightning.benchmark.compose import class_name, compose, set_option
from cvae_lightning.benchmark.settings import Settings, Source
from cvae_lightning.benchmark.smoke import shrink
from cvae_lightning.config_merge import read_config
from cvae_lightning.file_content import file_contents
from cvae_lightning.recipes import find_recipe

ENTANGLED_GROUP = "entangled models"
EVALUATION = {"class_path": "cvae_lightning.callbacks.StrategyEvaluation"}


@dataclass(frozen=True, eq=False)
class Cell:
    """One training and its test.

    Args:
        task: name of the task.
        recipe: name of the recipe, or of the entangled model.
        seed: seed; None for an entangled model, which all seeds share.
        group: heading of its row in the table.
        root: folder of the results.
        config: what is trained, without the folders, which follow from the cell.
        test_config: the same for the test.
        entangled: the cell whose model it starts from; None for an entangled model, or if ``model_folder`` is given.
        model_folder: entangled model that it starts from, or (for an entangled cell) the one that it writes.
        fit_hash: of all that the trained model follows from.
        hash: of all that the numbers follow from.
    """

    task: str
    recipe: str
    seed: int | None
    group: str
    root: Path
    config: dict[str, Any] = field(repr=False)
    test_config: dict[str, Any] = field(repr=False)
    entangled: Cell | None
    model_folder: Path
    fit_hash: str
    hash: str

    @property
    def name(self) -> str:
        """``task/recipe/seed1``, and ``task/entangled`` for an entangled model."""
        return f"{self.task}/{self.recipe}" + ("" if self.seed is None else f"/seed{self.seed}")

    @property
    def folder(self) -> Path:
        """Folder of all its files."""
        return self.root / self.name

    @property
    def checkpoint(self) -> Path:
        """Where its training goes on, and what is tested."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of its training, if the config says."""
        steps = (self.config.get("trainer") or {}).get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def matches(self, pattern: str) -> bool:
        """Return whether a shell pattern fits the name, or its task, recipe or seed alone."""
        return any(fnmatch.fnmatchcase(text, pattern) for text in (self.name, *self.name.split("/")))


def plan(settings: Settings, smoke: bool = False) -> list[Cell]:
    """Return all cells in the order in which they are run: entangled models, then one seed after the other.

    Args:
        settings: the checked config.
        smoke: a few tiny steps, the first seed and the first two tasks of every recipe, in a folder of their own.

    Raises:
        ValueError: if a config or an option does not fit, naming the recipe and the task.
    """
    root = Path(settings.results)
    if smoke:
        root = root.with_name(f"{root.name}-smoke")
    models: dict[tuple[str, str], Cell] = {}
    cells: list[Cell] = []
    for recipe_name, recipe in settings.recipes.items():
        seeds = recipe.seeds or settings.seeds
        tasks = [name for name in settings.tasks if recipe.tasks is None or name in recipe.tasks]
        for task_name in tasks[:2] if smoke else tasks:
            task = settings.tasks[task_name]
            try:
                entangled = combine(task.entangled, recipe.entangled)
                name = "entangled" if recipe.entangled is None else f"entangled_{recipe_name}"
                model = _entangled(entangled, task_name, name, root, settings.test_options, smoke)
                base = _fill(recipe.source.configs, task_name)
                config = compose(base, {**task.options, **recipe.source.options})
                config = _without_folders(shrink(config) if smoke else config)
                test = config if smoke else compose([config], settings.test_options)
                _check_steps(config)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"recipe {recipe_name} on {task_name}: {error}") from error
            if isinstance(model, Cell):  # its name is that of the first recipe that needs it
                model = models.setdefault((task_name, model.fit_hash), model)
            for seed in seeds[:1] if smoke else seeds:
                cells.append(_cell(task_name, recipe_name, seed, recipe.group, root, config, test, model))
    rank = {seed: i for i, seed in enumerate(dict.fromkeys(cell.seed for cell in cells))}
    cells.sort(key=lambda cell: rank[cell.seed])
    return [*models.values(), *cells]


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells that one of the patterns names, and the entangled models that they need.

    Raises:
        ValueError: if a pattern names nothing.
    """
    if not patterns:
        return list(cells)
    for pattern in patterns:
        if not any(cell.matches(pattern) for cell in cells):
            tasks, recipes = (", ".join(dict.fromkeys(getattr(c, part) for c in cells)) for part in ("task", "recipe"))
            raise ValueError(f"--only {pattern}: names no cell; tasks: {tasks}; recipes: {recipes}")
    chosen = {cell.name for cell in cells if any(cell.matches(pattern) for pattern in patterns)}
    chosen |= {cell.entangled.name for cell in cells if cell.name in chosen and cell.entangled}
    return [cell for cell in cells if cell.name in chosen]


def combine(task: Source, recipe: Source | None) -> Source:
    """Return how a recipe's entangled model is trained: its own configs or the task's, options on top of the task's."""
    if recipe is None:
        return task
    if recipe.folder:
        return recipe
    return Source(
        recipe.configs or task.configs, {**task.options, **recipe.options}, None if recipe.configs else task.folder
    )


def _fill(names: Sequence[str], task: str) -> list[dict[str, Any]]:
    paths = [name.replace("{task}", task) for name in names]
    return [read_config(Path(name) if Path(name).is_file() else find_recipe(name)) for name in paths]


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a whole entangled model: its baseline is the last file that is written."""
    return (folder / "baseline.json").is_file()


def _entangled(
    source: Source, task: str, name: str, root: Path, test_options: Mapping[str, Any], smoke: bool
) -> Cell | Path:
    """Return the entangled model that this source describes: a cell, or a folder that holds one."""
    if source.folder is not None:
        folder = Path(source.folder.replace("{task}", task))
        if not holds_model(folder):
            raise ValueError(f"entangled.folder: {folder} holds no entangled model (no baseline.json)")
        return folder
    config = compose(_fill(source.configs, task), source.options)
    trainer = config.setdefault("trainer", {})
    names = [class_name(callback) for callback in trainer.get("callbacks") or []]
    if not any(name.endswith("Evaluation") for name in names):  # its accuracy belongs into the table
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), dict(EVALUATION)]
    config = _without_folders(shrink(config) if smoke else config)
    _check_steps(config)
    test = config if smoke else compose([config], test_options)
    return _cell(task, name, None, ENTANGLED_GROUP, root, config, test)


def _cell(
    task: str,
    recipe: str,
    seed: int | None,
    group: str,
    root: Path,
    config: dict[str, Any],
    test_config: dict[str, Any],
    model: Cell | Path | None = None,
) -> Cell:
    """Return the cell with the hash of all that its numbers follow from."""
    if isinstance(model, Cell):
        folder, start = model.model_folder, model.fit_hash
    elif model is not None:
        folder, start = model, digest((model / "baseline.json").read_text(encoding="utf-8"))
    else:
        folder, start = root / task / recipe / "model", ""
    files, test_files = data_files(config), data_files(test_config)
    trained_on = {name: content for name, content in files.items() if name != "test_path"}
    fit_hash = digest([config, seed, start, *([trained_on] if trained_on else [])])
    entangled = model if isinstance(model, Cell) else None
    whole = digest([fit_hash, test_config, *([test_files] if test_files else [])])
    return Cell(task, recipe, seed, group, root, config, test_config, entangled, folder, fit_hash, whole)


def data_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of the local files that a config's data are read from; none for a task that makes its own."""
    return file_contents((config.get("data") or {}).get("init_args") or {})


def digest(content: Any) -> str:
    """Return a short hash of what JSON can hold.

    Raises:
        ValueError: if a mapping has both texts and numbers as keys.
    """
    try:
        text = json.dumps(content, sort_keys=True, default=str)
    except TypeError as error:
        raise ValueError(f"a mapping with both texts and numbers as keys has no order: {error}") from error
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Take out what the cell itself decides: folders, and the seed of what has seeds."""
    trainer, arguments = config.setdefault("trainer", {}), _arguments(config)
    trainer.pop("default_root_dir", None)
    config.setdefault("checkpoint", {}).pop("dirpath", None)
    config.pop("entangled_config", None)
    if "entangled" in arguments:
        del arguments["entangled"]
        config.pop("seed_everything", None)
    arguments.pop("output_dir", None)
    trainer["callbacks"] = [c for c in trainer.get("callbacks") or [] if class_name(c) != "Report"]
    return config


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    model = config.get("model")
    if not isinstance(model, dict) or "class_path" not in model:
        raise ValueError("its configs name no model.class_path")
    arguments: dict[str, Any] = model.setdefault("init_args", {})
    return arguments


def _check_steps(config: dict[str, Any]) -> None:
    steps, every = config["trainer"].get("max_steps"), config["checkpoint"].get("every_n_train_steps")
    if isinstance(steps, int) and isinstance(every, int) and steps > 0 and every > 0 and steps % every:  # -1: no limit
        raise ValueError(
            f"trainer.max_steps {steps} is no multiple of checkpoint.every_n_train_steps {every}: the model tested "
            "would not be the last one"
        )


def located(cell: Cell, test: bool) -> dict[str, Any]:
    """Return the whole config of a cell's training or test, with its folders."""
    config = deepcopy(cell.test_config if test else cell.config)
    options: dict[str, Any] = {
        "trainer.default_root_dir": str(cell.folder),
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "checkpoint.dirpath": str(cell.checkpoint.parent),
    }
    if cell.seed is None:
        options["model.output_dir"] = str(cell.model_folder)
    else:
        options |= {"model.entangled": str(cell.model_folder), "seed_everything": cell.seed}
    for name, value in options.items():
        set_option(config, name, value)
    config["trainer"]["callbacks"] = [
        *(config["trainer"].get("callbacks") or []),
        {"class_path": "cvae_lightning.callbacks.Report", "init_args": {"path": str(cell.folder / "summary.json")}},
        {"class_path": "cvae_lightning.benchmark.step_file.StepFile", "init_args": {"path": str(cell.folder / "step")}},
    ]
    return config
