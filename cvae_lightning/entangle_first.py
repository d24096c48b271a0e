"""Trains the entangled model that a recipe starts from, where it has not been trained yet."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cvae_lightning.atomic_write import write_json, write_text
from cvae_lightning.benchmark.child import end_with_parent
from cvae_lightning.benchmark.claims import BEAT, Claim
from cvae_lightning.benchmark.plan import holds_model
from cvae_lightning.config_merge import read_config
from cvae_lightning.file_content import content_of, file_contents
from cvae_lightning.launch import alone, world_size
from cvae_lightning.quickstart import program
from cvae_lightning.recipes import find_recipe

OWN_DATA_ARGUMENTS = ("batch_size", "eval_batch_size")
"""What the entangled recipe decides for itself; all else about the data comes from the run that needs the model."""
LIMITS = {"max_length": None, "on_overflow": "error", "padding_side": "left"}
"""Arguments that a model and its entangled model share, and their defaults, in whose place a recipe may have others."""
UNTRAINED = ("num_workers", "pin_memory", "length_bucketing", "self_generated", "strategy_column", "test_path")
"""Arguments of a data module that change nothing about the records that an entangled model is trained on."""
MARK = "entangled_unfinished"
"""File in the artifact's folder that says, while the model is trained, by which recipe and on which data."""
NOTE = "trained_on.json"
"""File in the artifact's folder that says on which data the model there was trained."""
LOOK = 2.0
"""Seconds between two looks at an entangled model that another process trains."""


def train_entangled_first(recipe: str, config: dict[str, Any]) -> None:
    """Run ``fit`` of the entangled recipe in a process of its own, unless its artifact is there or not asked for.

    It is asked for if ``model.init_args.entangled`` is the folder that the recipe writes: a user who names another
    folder or a hub model has one already. A training that was killed goes on from its last checkpoint, if neither its
    recipe nor its data have changed; it ends with this process. Of several runs that need it one trains it, and the
    others wait.

    Args:
        recipe: name or file of the recipe that trains the entangled model.
        config: the configuration of the run that needs it, as plain data; its data settings are handed on.

    Raises:
        ValueError: if several processes would train it at once, or the folder holds the model of other data.
        SystemExit: with the exit code of the training, if it fails.
    """
    path = Path(recipe) if Path(recipe).is_file() else find_recipe(recipe)
    target = (read_config(path).get("model") or {}).get("init_args", {}).get("output_dir")
    wanted = ((config.get("model") or {}).get("init_args") or {}).get("entangled")
    if not target or not isinstance(wanted, str) or Path(wanted) != Path(target):
        return
    folder = Path(target)
    if not holds_model(folder) and world_size() > 1:
        raise ValueError(
            f"there is no entangled model in {folder}: train it first with `cvae-lightning fit --config {recipe}`"
        )
    claim = wait_for_turn(folder)
    if claim is None:
        check_data(folder, config["data"], recipe)
        return
    try:
        _train(recipe, path, folder, config, claim)
    finally:
        claim.release()


def wait_for_turn(folder: Path) -> Claim | None:
    """Return the right to train the model of this folder, or None once it holds one, which another may be training."""
    told = False
    while not holds_model(folder):
        claim = Claim.take(folder)
        if claim is None:
            if not told:
                print(f"another process trains the entangled model in {folder}: waiting for it", flush=True)
                told = True
            time.sleep(LOOK)
        elif holds_model(folder):  # finished between the two looks
            claim.release()
        else:
            return claim
    return None


def _train(recipe: str, path: Path, folder: Path, config: dict[str, Any], claim: Claim) -> None:
    shared = Path(config["trainer"]["default_root_dir"]) / "entangled_overrides.yaml"
    taken = overrides(config)
    if ((read_config(path).get("data") or {}).get("init_args") or {}).get("self_generated"):
        taken["data"]["init_args"].pop("self_generated", None)  # its model is asked in another way
    text = yaml.safe_dump(taken, sort_keys=False)
    write_text(shared, text)
    words = ["fit", "--config", recipe, "--config", str(shared)]
    data = training_data(config["data"])
    mark, content = folder / MARK, path.read_bytes() + text.encode() + json.dumps(data).encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    trial = bool(config["trainer"].get("fast_dev_run"))  # which leaves all on disk as it was
    if not trial and mark.exists() and mark.read_text(encoding="utf-8") == digest:
        words += ["--ckpt_path", "last"]
    elif not trial:
        put_aside(read_config(path))
    if not trial:
        write_text(mark, digest)
    print(
        f"no entangled model in {folder} yet: training it first\n$ {shlex.join(['cvae-lightning', *words])}", flush=True
    )
    code = run([*program(), *words], claim)
    killed = code < 0 or code == 128 + signal.SIGTERM
    if not killed and not trial:
        mark.unlink()
    if code:
        if not killed:
            shared.unlink()
        raise SystemExit(code if code > 0 else 128 - code)  # its message is printed already
    if trial:
        raise ValueError(
            f"fast_dev_run has tried `{recipe}`, which leaves no model then, and this run needs one: train it with "
            f"`cvae-lightning fit --config {recipe} --config {shared} --trainer.fast_dev_run false`"
        )
    if holds_model(folder):
        write_json(folder / NOTE, {"artifact": content_of(folder / "baseline.json"), "data": data})


def run(words: Sequence[str], claim: Claim) -> int:
    """Return the exit code of a command, during which the claim gives signs of life."""
    process = subprocess.Popen(words, env=alone(os.environ), preexec_fn=end_with_parent())
    try:
        while True:
            try:
                return process.wait(BEAT)
            except subprocess.TimeoutExpired:
                if not claim.beat():
                    raise ValueError(
                        f"another process has taken the training in {claim.path.parent} over, because this one was "
                        "still for minutes: start this run again when that one is done"
                    ) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def put_aside(recipe: dict[str, Any]) -> None:
    """Rename checkpoints that ``--ckpt_path last`` would find: a training that begins afresh may never get to one."""
    root = (recipe.get("trainer") or {}).get("default_root_dir") or "runs/unnamed"
    folder = Path((recipe.get("checkpoint") or {}).get("dirpath") or Path(root) / "checkpoints")
    for checkpoint in folder.glob("last*"):
        checkpoint.replace(checkpoint.with_name(checkpoint.name.replace("last", "earlier", 1)))


def training_data(data: dict[str, Any]) -> dict[str, Any]:
    """Return what the training records follow from, with the content of files beside their names.

    Example:
        >>> training_data({"class_path": "D", "init_args": {"seed": 3, "batch_size": 8, "val_path": None}})
        {'class_path': 'D', 'seed': 3, 'val_path': False}
    """
    left_out = {*OWN_DATA_ARGUMENTS, *UNTRAINED}
    if data["class_path"].endswith(".PairsDataModule"):
        left_out.add("seed")  # of their order alone
    kept = {name: value for name, value in (data.get("init_args") or {}).items() if name not in left_out}
    if "val_path" in kept:  # which records it holds shows in c_base; without one, training leaves some out
        kept["val_path"] = kept["val_path"] is not None
    contents = {name: {"file": kept[name], "content": value} for name, value in file_contents(kept).items()}
    plain: dict[str, Any] = json.loads(json.dumps({"class_path": data["class_path"], **kept, **contents}, default=str))
    return plain


def check_data(folder: Path, data: dict[str, Any], recipe: str) -> None:
    """Refuse a model that was trained here on other data; one that came without a note is taken as it is.

    Raises:
        ValueError: naming what differs.
    """
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if note["artifact"] != content_of(folder / "baseline.json"):
            return  # of a model that was here before
        then = note["data"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    now = training_data(data)
    differing = [name for name in {**then, **now} if _compared(then.get(name)) != _compared(now.get(name))]
    if differing:
        texts = [f"{name}: {_shown(then.get(name))} then, {_shown(now.get(name))} now" for name in differing]
        raise ValueError(
            f"{folder} holds the entangled model of other data ({'; '.join(texts)[:200]}): train one on this data with "
            f"`cvae-lightning fit --config {recipe} --model.init_args.output_dir FOLDER`, in another folder, which "
            f"--model.init_args.entangled then names, or remove {folder}"
        )


def _compared(value: Any) -> Any:
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "content" in value:
        return f"{value['file']} (content {value['content'][:6]})"
    return f"{value!r:.60}"


def overrides(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the entangled run takes over: the data, the hardware, and which records are too long.

    Example:
        >>> data = {"class_path": "D", "init_args": {"seed": 3, "batch_size": 8}}
        >>> model = {"class_path": "M", "init_args": {"max_length": 99, "padding_side": "left"}}
        >>> trainer = {"accelerator": "cpu", "devices": 1, "precision": None, "max_steps": 5}
        >>> for group, value in overrides({"data": data, "model": model, "trainer": trainer}).items():
        ...     print(group, value)
        data {'class_path': 'D', 'init_args': {'seed': 3}}
        trainer {'accelerator': 'cpu', 'devices': 1}
        model {'init_args': {'max_length': 99}}
    """
    arguments = config["data"].get("init_args") or {}
    kept = {name: value for name, value in arguments.items() if name not in OWN_DATA_ARGUMENTS}
    given = config["trainer"]
    hardware = {name: given[name] for name in ("accelerator", "devices") if name in given}
    hardware |= {name: given[name] for name in ("precision", "fast_dev_run") if given.get(name)}
    result = {"data": {"class_path": config["data"]["class_path"], "init_args": kept}, "trainer": hardware}
    chosen = (config.get("model") or {}).get("init_args") or {}
    limits = {name: chosen[name] for name, usual in LIMITS.items() if chosen.get(name, usual) != usual}
    return result | ({"model": {"init_args": limits}} if limits else {})
