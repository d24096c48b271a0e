"""Runs ``cvae-lightning benchmark``, or ``sweep`` where that is the first of the arguments, on the stand-in.

``python drive.py STAND_IN ARGUMENTS...``: with short beats.
"""

import sys

from cvae_lightning import cli
from cvae_lightning.benchmark import claims, runner


def main():
    claims.BEAT, claims.STALE_AFTER, claims.DEAD_AFTER = 0.2, 30.0, 1.5
    runner.COMMAND = (sys.executable, "-S", sys.argv[1])
    runner.POLL, runner.SCAN = 0.02, 0.2
    words = sys.argv[2:]
    if words[0] == "sweep":
        from cvae_lightning.sweep import search

        search.FRESH = 0.5
    else:
        words = ["benchmark", *words]
    sys.exit(cli.main(words))


if __name__ == "__main__":
    main()
