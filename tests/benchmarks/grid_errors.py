"""Which records of grid_pathfinding the exact posterior gets wrong, by what is true of their inputs.

python tests/benchmarks/grid_errors.py .../grid_pathfinding/exact_posterior/seed1/checkpoints/last.ckpt
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from cvae_lightning import SharedDiscreteCVAE
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import GridPathfinding
from cvae_lightning.metrics.matching import latent_strategies


def main() -> None:
    """Print a table of the records by kind, and of the confusions among those that are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--records", type=int, default=3000, help="of the test split")
    given = parser.parse_args()
    task, free = GridPathfinding(), GridPathfinding(walls=0)
    records = SyntheticDataModule(task=task, train_size=200000, val_size=512, test_size=given.records).records("test")
    every = [records[i] for i in range(len(records))]
    model = SharedDiscreteCVAE.load_from_checkpoint(given.checkpoint, map_location="cpu")
    latents = model.infer([r.x for r in every], [r.y for r in every], posterior="exact").argmax(-1).tolist()
    names = task.strategies
    counts = np.zeros((model.num_latents, len(names)), dtype=int)
    np.add.at(counts, (latents, [r.strategy for r in every]), 1)
    strategy_of = latent_strategies(counts)
    kinds: Counter[tuple[str, str]] = Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for record, latent in zip(every, latents, strict=True):
        label, found = names[record.strategy], names[strategy_of[latent]]
        open_x = record.x.split("#")[0]
        blocked = any(task.solve(record.x, name) != free.solve(open_x, name) for name in names)
        if label == found:
            outcome = "right"
        elif found in task.compatible_strategies(record.x, record.y):
            outcome = "another strategy that writes this y"
        else:
            outcome = "wrong"
            wrong[label, found] += 1
        kinds["a wall in the way of a strategy" if blocked else "no wall in the way", outcome] += 1
    print("| input | posterior | records |\n|---|---|---:|")
    for (kind, outcome), count in sorted(kinds.items()):
        print(f"| {kind} | {outcome} | {count} |")
    print("\nwrong:", ", ".join(f"{label} as {found}: {count}" for (label, found), count in wrong.most_common()))


if __name__ == "__main__":
    main()
