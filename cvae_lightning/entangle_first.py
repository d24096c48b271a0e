"""Trains the entangled model that a recipe starts from, where it has not been trained yet."""

from __future__ import annotations

import hashlib
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import yaml

from cvae_lightning.atomic_write import write_text
from cvae_lightning.benchmark.child import end_with_parent
from cvae_lightning.config_merge import read_config
from cvae_lightning.launch import world_size
from cvae_lightning.quickstart import program
from cvae_lightning.recipes import find_recipe

OWN_DATA_ARGUMENTS = ("batch_size", "eval_batch_size")
"""What the entangled recipe decides for itself; all else about the data comes from the run that needs the model."""
MARK = "entangled_unfinished"
"""File beside the run's own that says, while the entangled model is trained, by which recipe and on which data."""


def train_entangled_first(recipe: str, config: dict[str, Any]) -> None:
    """Run ``fit`` of the entangled recipe in a process of its own, unless its artifact is there or not asked for.

    It is asked for if ``model.init_args.entangled`` is the folder that the recipe writes: a user who names another
    folder or a hub model has one already. A training that was killed goes on from its last checkpoint, if neither its
    recipe nor its data have changed; it ends with this process.

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
    if world_size() > 1:
        raise ValueError(
            f"there is no entangled model in {folder}: train it first with `cvae-lightning fit --config {recipe}`"
        )
    shared = Path(config["trainer"]["default_root_dir"]) / "entangled_overrides.yaml"
    text = yaml.safe_dump(overrides(config), sort_keys=False)
    write_text(shared, text)
    words = ["fit", "--config", recipe, "--config", str(shared)]
    mark, digest = shared.with_name(MARK), hashlib.blake2b(path.read_bytes() + text.encode(), digest_size=8).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") == digest:
        words += ["--ckpt_path", "last"]
    write_text(mark, digest)
    print(
        f"no entangled model in {folder} yet: training it first\n$ {shlex.join(['cvae-lightning', *words])}", flush=True
    )
    code = subprocess.run([*program(), *words], check=False, preexec_fn=end_with_parent()).returncode
    killed = code < 0 or code == 128 + signal.SIGTERM
    if not killed:
        mark.unlink()
    if code:
        if not killed:
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
