"""The quickstart: runs, and prints, the public commands that take a small example from an entangled model to a CVAE."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cvae_lightning.atomic_write import write_json
from cvae_lightning.benchmark.child import end_with_parent
from cvae_lightning.launch import alone
from cvae_lightning.recipes import find_recipe

FOLDER = Path("runs/quickstart")


@dataclass(frozen=True)
class Step:
    """One public command.

    Args:
        title: what it does, for the user.
        words: the command after ``cvae-lightning``.
        product: pattern, below FOLDER, of a file that the command leaves behind.
    """

    title: str
    words: tuple[str, ...]
    product: str

    @property
    def shown(self) -> str:
        """The command as a user types it."""
        return shlex.join(["cvae-lightning", *self.words])


STEPS = (
    Step(
        "train the entangled language model",
        ("fit", "--config", "quickstart_entangled"),
        "entangled/**/baseline.json",
    ),
    Step(
        "post-train it into a SharedDiscreteCVAE",
        ("fit", "--config", "quickstart_discrete"),
        "discrete/checkpoints/last.ckpt",
    ),
    Step(
        "evaluate it on the test split",
        ("test", "--config", "quickstart_discrete", "--ckpt_path", str(FOLDER / "discrete/checkpoints/last.ckpt")),
        "summary.json",
    ),
)


def quickstart(args: Sequence[str] = (), command: Sequence[str] | None = None) -> int:
    """Run the steps that an earlier quickstart has not finished, and return the exit code.

    Args:
        args: ``--force`` runs every step again.
        command: the command to call; None = the ``cvae-lightning`` of this environment.
    """
    if args and args[0] in ("-h", "--help"):
        print(f"usage: cvae-lightning quickstart [--force]\n\ntrain and evaluate a small example in {FOLDER}/")
        return 0
    if list(args) not in ([], ["--force"]):
        raise ValueError(f"quickstart takes --force or nothing, got {shlex.join(args)}")
    command_line = command or program()
    stamp_file = FOLDER / "finished.json"
    finished = {} if args or not stamp_file.exists() else json.loads(stamp_file.read_text(encoding="utf-8"))
    upstream, rerun = version("cvae-lightning"), False
    for number, step in enumerate(STEPS, start=1):
        upstream = _fingerprint(step, upstream)
        print(f"\n[{number}/{len(STEPS)}] {step.title}\n$ {step.shown}", flush=True)
        done = {} if rerun else finished.get(step.shown, {})
        if done.get("fingerprint") == upstream and any(FOLDER.glob(step.product)):
            print(f"finished earlier in {done['seconds']:.0f} s; `cvae-lightning quickstart --force` runs it again")
            continue
        if not rerun:  # what comes after a step that runs again is stale, also for a call after one that is broken off
            later = {stale.shown for stale in STEPS[number - 1 :]}
            finished = {name: entry for name, entry in finished.items() if name not in later}
            write_json(stamp_file, finished)
        rerun = True
        start = time.monotonic()
        code = subprocess.run(
            [*command_line, *step.words], check=False, env=alone(os.environ), preexec_fn=end_with_parent()
        ).returncode
        if code:
            print(f"cvae-lightning: error: the command above ended with exit code {code}", file=sys.stderr)
            return code
        finished[step.shown] = {"fingerprint": upstream, "seconds": time.monotonic() - start}
        write_json(stamp_file, finished)
    _finish(sum(step["seconds"] for step in finished.values()))
    return 0


def program() -> list[str]:
    """Return the console script beside this interpreter, or the module where it is not installed."""
    script = Path(sys.executable).with_name("cvae-lightning")
    return [str(script)] if script.exists() else [sys.executable, "-m", "cvae_lightning.cli"]


def _fingerprint(step: Step, upstream: str) -> str:
    """Hash the recipe of a step, its command, and all that comes before it."""
    recipe = find_recipe(step.words[step.words.index("--config") + 1]).read_bytes()
    return hashlib.blake2b(repr((upstream, step.words, recipe)).encode(), digest_size=8).hexdigest()


def _finish(seconds: float) -> None:
    """Add the wall time to the summary, and say what to look at next."""
    path = FOLDER / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) | {"seconds": round(seconds, 1)}
    write_json(path, summary)
    print(f"\nThe figures are in {path} ({seconds:.0f} s in all).")
    print(f"Look at the curves and figures:\n$ tensorboard --logdir {FOLDER}")
