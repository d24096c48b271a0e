"""Reseeds every training batch, so that a resumed run draws the noise that an uninterrupted one would have drawn."""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def batch_seed(seed: int, epoch: int, batch_idx: int, rank: int) -> int:
    """Return the 63-bit seed of one training batch: equal arguments, equal seed, on every machine.

    Example:
        >>> batch_seed(1, 0, 0, 0) == batch_seed(1, 0, 0, 0), batch_seed(1, 0, 0, 0) == batch_seed(1, 0, 0, 1)
        (True, False)
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{batch_idx}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StepSeed(Callback):
    """Seeds torch, NumPy and random as a function of (seed, epoch, batch, rank) before every training batch.

    Checkpoints hold no random state. With this callback they need none: dropout and sampling depend on the position
    in the run alone, validation cannot disturb them, and each rank has its own stream.

    Args:
        seed: base seed; null takes the one given to ``seed_everything`` (0 if there is none).
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators of this process."""
        base = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        seed = batch_seed(base, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
