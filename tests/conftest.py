"""Settings that must be in place before torch or matplotlib is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking after a multi-threaded matmul hangs
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("cvae_lightning", deadline=None, derandomize=True)
settings.load_profile("cvae_lightning")
