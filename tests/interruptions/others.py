"""The benchmark runner and the baseline cache, killed at random moments."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from cvae_lightning.backbones.baseline_cache import BaselineCache

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests/benchmark_command"
BENCHMARK = {
    "results": "out",
    "seeds": [1, 2],
    "tasks": {task: {"entangled": f"entangled_{task}"} for task in ("sorting_algorithms", "base_conversion")},
    "recipes": {"ours": {"configs": ["discrete_{task}"]}},
}
CELLS = 6  # two entangled models, two seeds of each task


def kill_benchmark(here, kills, seed):
    """Kill the runner ``kills`` times, in as many rounds as that takes; every cell must be finished, once, each round.

    Its cells are trained by the stand-in of the runner's own tests.
    """
    rng, done, rounds, torn, again = random.Random(seed), 0, 0, 0, 0
    seconds = None
    while done < kills or seconds is None:
        folder = here / str(rounds)
        folder.mkdir(parents=True)
        (folder / "bench.yaml").write_text(yaml.safe_dump(BENCHMARK, sort_keys=False))
        begun = time.monotonic()
        while True:
            runner = _start_runner(folder)
            try:
                runner.wait(120 if seconds is None or done >= kills else rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                runner.send_signal(signal.SIGKILL)
                runner.wait()
                done += 1
                for path in folder.glob("out/**/*.json"):  # whatever has its name is whole
                    json.loads(path.read_text())
                torn += any(folder.glob("out/**/.*.tmp"))
                continue
            assert runner.returncode == 0, (folder / "log.txt").read_text()
            break
        seconds = seconds or time.monotonic() - begun
        rounds += 1
        results = [json.loads(line) for line in (folder / "out/results.jsonl").read_text().splitlines()]
        assert len(results) == CELLS
        assert all(result["status"] == "done" for result in results)
        calls = (folder / "calls.txt").read_text().splitlines()
        finished = [call for call in calls if call.startswith("finished")]
        # a test that was killed between its summary and the cell's result is run again
        assert len({*finished}) == CELLS
        again += len(finished) - CELLS
    return (
        f"{done} times SIGKILL in {rounds} runs: all {CELLS} cells of each finished, {again} tests run twice, "
        f"{torn} times a half-written file was left, none was read"
    )


def _start_runner(folder):
    command = [sys.executable, str(STAND_IN / "drive.py"), str(STAND_IN / "stand_in.py"), "--config", "bench.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


RECORDS = 4000


def _costs(index):
    return torch.rand(1 + index % 37, generator=torch.Generator().manual_seed(index)) + index


def _batch(indices):
    rows = [_costs(i) for i in indices]
    values = torch.zeros(len(rows), max(map(len, rows)))
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        values[b, : len(row)], mask[b, : len(row)] = row, True
    return torch.tensor(indices), mask, values


def _fill(folder):
    cache = BaselineCache(folder, "a", RECORDS)
    missing = cache.missing(range(RECORDS))
    for start in range(0, len(missing), 8):
        index, mask, values = _batch(missing[start : start + 8])
        cache.rows(index, mask, lambda values=values: values)


def kill_cache(folder, kills, seed):
    """Kill the process that fills a cache ``kills`` times; what can be read must be right, and nothing may be lost."""
    rng, done, rounds = random.Random(seed), 0, 0
    begun = time.monotonic()
    _fill(Path(folder) / "timed")
    seconds = time.monotonic() - begun
    while done < kills:
        here = Path(folder) / str(rounds)
        rounds += 1
        known = 0
        while known < RECORDS:
            child = multiprocessing.get_context("fork").Process(target=_fill, args=(here,))
            child.start()
            child.join(rng.uniform(0, seconds))
            if child.is_alive() and done < kills:
                child.kill()
                done += 1
            child.join()
            cache = BaselineCache(here, "a", RECORDS)
            missing = {*cache.missing(range(RECORDS))}
            assert RECORDS - len(missing) >= known
            known = RECORDS - len(missing)
            there = [i for i in range(RECORDS) if i not in missing]
            for start in range(0, len(there), 64):
                index, mask, values = _batch(there[start : start + 64])
                assert torch.equal(cache.rows(index, mask, _never), values)
    return f"{done} times SIGKILL in {rounds} fillings of {RECORDS} rows: every row read back was right, none was lost"


def _never():
    raise AssertionError("a row that is known was computed again")
