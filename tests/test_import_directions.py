"""Who may import whom: the arrows of the data flow, read from the source."""

import ast
from pathlib import Path

import pytest

import cvae_lightning

PACKAGE = Path(cvae_lightning.__file__).parent
HEAVY = {"lightning", "torchmetrics", "transformers"}
ALLOWED = {
    "outputs": set(),
    "atomic_write": set(),
    "launch": set(),
    "progress": set(),
    "scheduled": set(),
    "spec": set(),
    "trust": {"spec"},
    "functional": set(),
    "template": {"outputs"},
    "backbones": {"atomic_write", "outputs", "template", "functional", "lightning", "transformers"},
    "losses": {"outputs", "functional", "spec"},
    "metrics": {"outputs", "functional", "torchmetrics"},
    "data": {"atomic_write", "backbones", "progress", "template", "outputs", "spec", "lightning"},
    "callbacks": {"atomic_write", "metrics", "outputs", "progress", "scheduled", "trust", "lightning"},
    "modules": {
        "outputs",
        "progress",
        "scheduled",
        "spec",
        "functional",
        "template",
        "backbones",
        "losses",
        "metrics",
        "trust",
        *HEAVY,
    },
}
"""Rooms of the package, and heavy libraries, that each room may import besides itself."""


def imported(path):
    """Rooms and heavy libraries that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for first, *rest in (name.split(".") for name in names):
            if first == "cvae_lightning" and rest:
                yield rest[0]
            elif first in HEAVY:
                yield first


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    wrong = [f"{path.name}: {name}" for path in files for name in imported(path) if name not in ALLOWED[room] | {room}]
    assert not wrong
