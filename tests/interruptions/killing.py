"""Runs of ``cvae-lightning fit`` that are ended at random moments and started again by the same command."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import forked_commands
import torch
import yaml
from forked_commands import exit_code, same
from tiny import ADDITION_LM, addition_artifact

INTERVAL = 3
"""Optimizer steps between two checkpoints."""
WATCHER = '''\
"""A user's own callback: writes down every loss as it comes, and fills the disk where it is told to."""
import json, os, resource, signal
from lightning.pytorch import Callback

class Watcher(Callback):
    def note(self, trainer, kind, when, values):
        with open("seen.jsonl", "a") as file:
            file.write(json.dumps([kind, when, trainer.global_step, values]) + "\\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.note(trainer, "train", trainer.fit_loop.epoch_loop.total_batch_idx, {"loss": float(loss).hex()})
        if trainer.global_step == int(os.environ.get("FULL_FROM_STEP", -1)):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            metrics = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.note(trainer, "val", trainer.fit_loop.epoch_loop.total_batch_idx, metrics)
'''
LM = ADDITION_LM | {"attention_dropout": 0.2}
TRAINER = {
    "max_steps": 21,
    "accumulate_grad_batches": 2,
    "val_check_interval": 8,
    "check_val_every_n_epoch": None,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "default_root_dir": ".",
    "callbacks": [{"class_path": "watcher.Watcher"}],
}
DATA = {
    "class_path": "cvae_lightning.data.SyntheticDataModule",
    "init_args": {
        "task": {"class_path": "cvae_lightning.data.tasks.MultidigitAddition"},
        "train_size": 46,
        "val_size": 8,
        "batch_size": 4,
        "eval_batch_size": 4,
    },
}
LOSSES = ("FreeEnergyLoss", "AggregatePosteriorBalanceLoss", "TokenWeightedReconstructionLoss")
MODELS = {
    "entangled": {
        "class_path": "cvae_lightning.EntangledLM",
        "init_args": {"output_dir": "artifact", "config": LM, "warmup_steps": 3},
    },
    "discrete": {
        "class_path": "cvae_lightning.SharedDiscreteCVAE",
        "init_args": {
            "entangled": "../artifact",
            "num_latents": 3,
            "dropout": 0.2,
            "warmup_steps": 3,
            "losses": {name.lower(): {"class_path": f"cvae_lightning.losses.{name}"} for name in LOSSES},
        },
    },
}


def prepare(here):
    """Fill a user's folder: an artifact, an own callback, and a config per model."""
    here = Path(here)
    (here / "watcher.py").write_text(WATCHER)
    addition_artifact(here / "artifact", LM)
    for name, model in MODELS.items():
        config = {
            "seed_everything": 1,
            "trainer": TRAINER,
            "checkpoint": {"dirpath": "checkpoints", "every_n_train_steps": INTERVAL},
            "model": model,
            "data": DATA,
        }
        (here / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return here


def start(folder, name, **environment):
    """Start the one command that begins a run and goes on with it."""
    return forked_commands.start(folder, ["fit", "--config", f"../{name}.yaml", "--ckpt_path", "last"], **environment)


def finish(folder, name, **environment):
    """Let the command run to its end and return (exit code, seconds)."""
    begun = time.monotonic()
    code = exit_code(start(folder, name, **environment), 300)
    return code, time.monotonic() - begun


def seen(folder):
    """Return every value by (kind, batch); the same batch, seen again after a restart, must have come out the same."""
    values = {}
    for line in (folder / "seen.jsonl").read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            continue  # the watcher itself was killed while writing
        kind, when, _, found = json.loads(line)
        assert values.setdefault((kind, when), found) == found, (kind, when)
    return values


def last_step(folder):
    """Return the optimizer step that was seen last."""
    path = folder / "seen.jsonl"
    lines = [line for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return json.loads(lines[-1])[2] if lines else 0


def saved(folder):
    """Return the last checkpoint; None where there is none. A torn one raises."""
    path = folder / "checkpoints/last.ckpt"
    return torch.load(path, weights_only=True) if path.exists() else None


def end_state(folder):
    """Return all that a run has trained."""
    return forked_commands.end_state(folder / "checkpoints/last.ckpt")


@dataclass
class Figures:
    """What a number of interruptions did."""

    kills: int = 0
    before_training: int = 0
    rounds: int = 0
    left_temporary: int = 0
    steps_lost: list[int] = field(default_factory=list)
    values_compared: int = 0
    exit_codes: set[int] = field(default_factory=set)


def interrupt(here, name, kills, seed, number=signal.SIGKILL):
    """End runs at ``kills`` random moments, as many rounds as that takes, and compare each with the one left alone.

    Raises AssertionError where a value differs, more than a checkpoint interval is lost, or a file is torn.
    """
    whole = here / f"{name}-whole"
    if not (whole / "seconds").exists():
        code, seconds = finish(whole, name)
        assert code == 0, (whole / "log.txt").read_text()
        (whole / "seconds").write_text(f"{seconds}")
    figures, rng = Figures(), random.Random(seed)
    expected, wanted = seen(whole), end_state(whole)
    seconds = float((whole / "seconds").read_text())
    while figures.kills < kills:
        folder = here / f"{name}-{number.name}-{figures.rounds}"
        figures.rounds += 1
        while _interrupted(folder, name, figures, kills, number, rng.uniform(0, seconds)):
            pass
        assert same(seen(folder), expected), folder
        assert same(end_state(folder), wanted), folder
        figures.values_compared += sum(map(len, expected.values())) + len(wanted["state_dict"])
        if name == "entangled":
            found, right = (json.loads((f / "artifact/baseline.json").read_text()) for f in (folder, whole))
            assert found["c_base"] == right["c_base"]
    return figures


def _interrupted(folder, name, figures, kills, number, delay):
    """Start the command; return False when it reaches its end, True after it was ended and what it left is checked."""
    before = last_step(folder) if folder.exists() else 0
    child = start(folder, name)
    child.join(delay if figures.kills < kills else 300)
    ended = child.is_alive()
    if ended:
        os.kill(child.pid, number)
        child.join(60)
    if child.exitcode == 0:
        return False
    assert ended, (folder / "log.txt").read_text()
    figures.kills += 1
    figures.exit_codes.add(child.exitcode)
    figures.before_training += last_step(folder) == before
    checkpoint = saved(folder)
    step = 0 if checkpoint is None else checkpoint["global_step"]
    lost = max(0, last_step(folder) - step)
    assert lost <= INTERVAL, f"{lost} steps lost in {folder}"
    figures.steps_lost.append(lost)
    figures.left_temporary += any((folder / "checkpoints").glob(".*.tmp"))
    return True
