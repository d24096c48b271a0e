"""Trains the entangled model that a recipe starts from, where it has not been trained yet."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

from cvae_lightning.config_merge import read_config
from cvae_lightning.quickstart import program
from cvae_lightning.recipes import find_recipe

OWN_DATA_ARGUMENTS = ("batch_size", "eval_batch_size")
"""What the entangled recipe decides for itself; all else about the data comes from the run that needs the model."""


def train_entangled_first(recipe: str, config: dict[str, Any]) -> None:
    """Run ``fit`` of the entangled recipe in a process of its own, unless its artifact is there or not asked for.

    It is asked for if ``model.init_args.entangled`` is the folder that the recipe writes: a user who names another
    folder or a hub model has one already.

    Args:
        recipe: name or file of the recipe that trains the entangled model.
        config: the configuration of the run that needs it, as plain data; its data settings are handed on.

    Raises:
        ValueError: if several processes would train it at once.
        SystemExit: with the exit code of the training, if it fails.
    """
    path = Path(recipe) if Path(recipe).is_file() else find_recipe(recipe)
    folder = (read_config(path).get("model") or {}).get("init_args", {}).get("output_dir")
    wanted = ((config.get("model") or {}).get("init_args") or {}).get("entangled")
    if not folder or not isinstance(wanted, str) or Path(wanted) != Path(folder):
        return
    if (Path(folder) / "baseline.json").exists():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"there is no entangled model in {folder}: train it first with `cvae-lightning fit --config {recipe}`"
        )
    shared = Path(config["trainer"]["default_root_dir"]) / "entangled_overrides.yaml"
    shared.parent.mkdir(parents=True, exist_ok=True)
    shared.write_text(yaml.safe_dump(overrides(config), sort_keys=False), encoding="utf-8")
    words = ["fit", "--config", recipe, "--config", str(shared)]
    print(
        f"no entangled model in {folder} yet: training it first\n$ {shlex.join(['cvae-lightning', *words])}", flush=True
    )
    code = subprocess.run([*program(), *words], check=False).returncode
    if code:
        shared.unlink()
        raise SystemExit(code if code > 0 else 128 - code)  # its message is printed already


def overrides(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the entangled run takes over: the data, and the hardware.

    Example:
        >>> data = {"class_path": "D", "init_args": {"seed": 3, "batch_size": 8}}
        >>> overrides({"data": data, "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 5}})
        {'data': {'class_path': 'D', 'init_args': {'seed': 3}}, 'trainer': {'accelerator': 'cpu', 'devices': 1}}
    """
    arguments = config["data"].get("init_args") or {}
    kept = {name: value for name, value in arguments.items() if name not in OWN_DATA_ARGUMENTS}
    hardware = {name: config["trainer"][name] for name in ("accelerator", "devices") if name in config["trainer"]}
    return {"data": {"class_path": config["data"]["class_path"], "init_args": kept}, "trainer": hardware}
