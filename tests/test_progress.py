"""How long a run is, where a loader has a length and where it has none."""

import math

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import QUIET
from torch.utils.data import DataLoader, IterableDataset

from cvae_lightning.progress import steps_of_run


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.randn(3, 32)


class Asked(L.Callback):
    def on_train_start(self, trainer, pl_module):
        self.steps = steps_of_run(trainer)


@pytest.mark.parametrize(
    ("data", "limits", "steps"),
    [
        (torch.randn(3, 32), {"max_epochs": 2}, 6),
        (torch.randn(3, 32), {"max_epochs": 2, "accumulate_grad_batches": 3}, 2),
        (Stream(), {"max_epochs": 2}, math.inf),
        (Stream(), {"max_steps": 4}, 4),
    ],
)
def test_steps_of_a_run(data, limits, steps):
    asked = Asked()
    trainer = L.Trainer(**QUIET, **limits, limit_val_batches=0, callbacks=[asked])
    trainer.fit(BoringModel(), DataLoader(data))
    assert asked.steps == steps
