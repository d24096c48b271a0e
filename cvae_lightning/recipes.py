"""The shipped recipes: whole YAML files, in the package of an installed wheel or in ``configs/`` of a clone."""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath


def recipe_folder() -> Path:
    """Return the folder of the shipped recipes.

    Raises:
        FileNotFoundError: if neither the installed package nor the clone has one.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no recipes beside {package}: the installation is incomplete, install the package again")


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted, without ``.yaml``."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of the recipe with this name, given with or without ``.yaml``.

    What lies in a folder of its own is named with it: ``benchmark/alignment``.

    Raises:
        FileNotFoundError: if there is none; the message holds the nearest names.
    """
    stem = name.removesuffix(".yaml")
    names = recipe_names()
    inner = PurePosixPath(stem)
    if stem in names or (len(inner.parts) > 1 and ".." not in inner.parts and not inner.is_absolute()):
        path = recipe_folder() / f"{stem}.yaml"
        if path.is_file():
            return path
    near = difflib.get_close_matches(stem, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped recipes: {', '.join(names) or 'none'}"
    raise FileNotFoundError(f"no config file and no shipped recipe is named {name!r}; {hint}")


def describe(path: Path) -> str:
    """Return the first comment line of a recipe, without ``#``; empty if it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""
