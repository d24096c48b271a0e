"""The smallest module and data module that the command line can run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cvae_lightning.losses.base import LossCallback


class MeanSquare(LossCallback):
    """Mean square of the prediction.

    Args:
        weight: factor of the term; no unit.
        power: exponent; no unit.
    """

    def __init__(self, weight: float = 1.0, power: float = 2.0) -> None:
        super().__init__(weight)
        self.power = power

    def forward(self, outputs):
        return outputs.abs().pow(self.power).mean()


class MeanAbs(MeanSquare):
    """Mean absolute value.

    Args:
        weight: factor of the term; no unit.
        power: exponent; no unit.
        shift: added to the value; no unit.
    """

    def __init__(self, weight: float = 1.0, power: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(weight, power)
        self.shift = shift

    def forward(self, outputs):
        return outputs.abs().mean() + self.shift


class TinyModule(LightningModule):
    """A linear layer with named losses.

    Args:
        losses: terms by name.
        learning_rate: step size; no unit.
        nan_from_step: optimizer step from which the first term is NaN; -1 = never.
    """

    def __init__(
        self, losses: dict[str, LossCallback | None], learning_rate: float = 0.1, nan_from_step: int = -1
    ) -> None:
        super().__init__()
        if _given_hyperparameters.get() is not None:  # built by the command line
            self.save_hyperparameters()
        self.losses = nn.ModuleDict({name: loss for name, loss in losses.items() if loss is not None})
        self.layer = nn.Linear(3, 1)
        self.learning_rate = learning_rate
        self.nan_from_step = nan_from_step
        self.temperature = 1.0
        self.last_terms: dict[str, torch.Tensor] = {}
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        out = self.layer(batch[0] + 0.1 * torch.randn_like(batch[0]))
        self.last_terms = {name: loss(out) for name, loss in self.losses.items()}
        if 0 <= self.nan_from_step <= self.trainer.global_step:
            first = next(iter(self.last_terms))
            self.last_terms[first] = self.last_terms[first] * float("nan")
        return sum(self.losses[name].weight * term for name, term in self.last_terms.items())

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def test_step(self, batch, batch_idx):
        weights = {name: loss.weight for name, loss in self.losses.items()}
        print("TEST", weights, f"bias={self.layer.bias.item():.6f}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


class TinyData(LightningDataModule):
    """Random vectors.

    Args:
        size: number of records.
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size

    def _loader(self):
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(self.size, 3, generator=generator)), batch_size=4)

    def train_dataloader(self):
        return self._loader()

    val_dataloader = test_dataloader = train_dataloader
