"""What no model of the six tasks can go below, beside what was reached: -log p(y|x) of the data themselves.

A strategy writes one y for an x, so that p(y|x) is the share of the strategies that write y. Under the right latent y
is certain: the optimum of rho_recon is 0. Tokens are characters, and y ends with two more of them.

    python tests/benchmarks/optimum.py [--write]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

from cvae_lightning.data import SyntheticDataModule, tasks

RESULTS = Path(__file__).parent / "results"
CLOSING = 2  # </y> <eos>


def optimum(task: tasks.Task) -> float:
    """Nats per token of the test split of the recipes."""
    records = SyntheticDataModule(task=task, train_size=200000, val_size=512, test_size=1000).records("test")
    every = [records[i] for i in range(len(records))]
    shares = [len(task.compatible_strategies(r.x, r.y)) / len(task.strategies) for r in every]
    return -sum(map(math.log, shares)) / sum(len(r.y) + CLOSING for r in every)


def main() -> None:
    """Print the table."""
    cells = [json.loads(line) for line in (RESULTS / "alignment.jsonl").read_text().splitlines()]
    lines = ["| task | optimum | marginal over latents | entangled |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(cell["task"] for cell in cells):
        task = getattr(tasks, name.title().replace("_", ""))()
        own = [c["metrics"] for c in cells if c["task"] == name and c["seed"] is not None]
        reached, base = (statistics.median(m[key] for m in own) for key in ("marginal_nll", "baseline_nll"))
        lines.append(f"| {name} | {optimum(task):.4f} | {reached:.4f} | {base:.4f} |")
    print("\n".join(lines))
    if "--write" in sys.argv:
        heading = "Nats per token, test split, median of the seeds: `python tests/benchmarks/optimum.py --write`"
        (RESULTS / "optimum.md").write_text("\n".join([heading, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
