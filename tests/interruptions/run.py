"""Ends runs at random moments, many times, and prints what came of it.

``OMP_NUM_THREADS=1 python tests/interruptions/run.py --kills 20``
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="fit, launches, benchmark or cache")
    given = parser.parse_args()
    from interruptions.killing import interrupt, prepare
    from interruptions.launchers import terminate_launches
    from interruptions.others import kill_benchmark, kill_cache

    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        if given.only in ("", "fit"):
            prepare(here)
            for number in (signal.SIGKILL, signal.SIGTERM):
                for name in ("entangled", "discrete"):
                    begun = time.monotonic()
                    f = interrupt(here, name, given.kills, given.seed, number)
                    print(
                        f"fit {name:9} {number.name}: {f.kills} times in {f.rounds} runs ({f.before_training} before a "
                        f"new step), exit codes {sorted(f.exit_codes)}, steps lost at most {max(f.steps_lost)}, mean "
                        f"{sum(f.steps_lost) / len(f.steps_lost):.2f}; {f.left_temporary} times a half-written file "
                        f"was left; {f.values_compared} values equal to the bit; {time.monotonic() - begun:.0f} s",
                        flush=True,
                    )
        if given.only in ("", "launches"):
            for line in terminate_launches(here / "launches"):
                print(line, flush=True)
        if given.only in ("", "benchmark"):
            print("benchmark:", kill_benchmark(here / "benchmark", given.kills, given.seed), flush=True)
        if given.only in ("", "cache"):
            print("baseline cache:", kill_cache(here / "cache", given.kills, given.seed), flush=True)


if __name__ == "__main__":
    main()
