"""Fuzzes every target with many inputs and prints how many were accepted and refused.

``OMP_NUM_THREADS=1 python tests/fuzz/run.py --inputs 100000``
"""

import argparse
import collections
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

CHUNK = 2000
"""Inputs of one hypothesis run; each has a seed of its own."""


def main():
    from fuzz.targets import SHARES, TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(TARGETS))
    chosen = parser.parse_args()
    total, share = collections.Counter(), sum(SHARES[name] for name in chosen.only)
    for name in chosen.only:
        counts, begun, wanted = collections.Counter(), time.monotonic(), -(-chosen.inputs * SHARES[name] // share)
        number = chosen.seed
        while (left := wanted - sum(counts.values())) > 0:
            fuzz(*TARGETS[name], counts, min(CHUNK, left), number)
            number += 1
        total += counts
        print(f"{name:12} {dict(sorted(counts.items()))} in {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{'all':12} {dict(sorted(total.items()))}: {sum(total.values())} inputs, no unhandled exception")


def fuzz(strategy, target, counts, inputs, number):
    """Call a target on random inputs and count what it returns."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value):
        counts[target(value)] += 1

    run()


if __name__ == "__main__":
    main()
