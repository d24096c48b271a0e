"""Runs ``cvae-lightning benchmark`` on the stand-in, with short beats: ``python drive.py STAND_IN ARGUMENTS...``."""

import sys

from cvae_lightning import cli
from cvae_lightning.benchmark import claims, runner


def main():
    claims.BEAT, claims.STALE_AFTER, claims.DEAD_AFTER = 0.2, 30.0, 1.5
    runner.COMMAND = (sys.executable, "-S", sys.argv[1])
    runner.POLL, runner.SCAN = 0.02, 0.2
    sys.exit(cli.main(["benchmark", *sys.argv[2:]]))


if __name__ == "__main__":
    main()
