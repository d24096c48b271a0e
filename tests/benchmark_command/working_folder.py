"""A working folder with a benchmark of fourteen cells, and what happened in it."""

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).parent
CONFIG = {
    "results": "out",
    "seeds": [1, 2, 3],
    "tasks": {task: {"entangled": f"entangled_{task}"} for task in ("sorting_algorithms", "base_conversion")},
    "recipes": {
        "ours": {"configs": ["discrete_{task}"], "group": "ours"},
        "plain": {"configs": ["discrete_{task}", "benchmark/plain_elbo"], "group": "theirs"},
    },
}
NAMES = [
    *(f"{task}/entangled" for task in CONFIG["tasks"]),
    *(f"{task}/{recipe}/seed{k}" for task in CONFIG["tasks"] for recipe in CONFIG["recipes"] for k in (1, 2, 3)),
]


class Folder:
    """A working folder with a benchmark, or a sweep if that is the command, and what happened in it."""

    def __init__(self, path, config=CONFIG, command=()):
        self.path, self.command = path, command
        self.write(config)

    def write(self, config):
        (self.path / "bench.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def start(self, *words):
        driven = [str(HERE / "drive.py"), str(HERE / "stand_in.py"), *self.command, "--config", "bench.yaml", *words]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        return subprocess.Popen(
            [sys.executable, *driven],
            cwd=self.path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *words, code=0):
        process = self.start(*words)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == code, out
        return out

    def calls(self):
        """Return how often each command was called, and forget it."""
        path = self.path / "calls.txt"
        counts = collections.Counter(path.read_text().splitlines() if path.exists() else [])
        path.unlink(missing_ok=True)
        return counts

    def results(self):
        return {
            f"{r['task']}/{r['recipe']}" + (f"/seed{r['seed']}" if r["seed"] else ""): r
            for r in map(json.loads, (self.path / "out/results.jsonl").read_text().splitlines())
        }

    def wait_for(self, text):
        """Wait until a call was made."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (self.path / "calls.txt").exists() and text in (self.path / "calls.txt").read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"{text} did not happen in a minute")
