"""Reconstruction against the entangled model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics
from cvae_lightning.metrics.figures import Axes, Figure, bars


class ReconstructionRatio(SumStatistics):
    """rho_recon: reconstruction NLL per token over c_base, that of the entangled model.

    (sum nll / sum tokens) / c_base. 1 = as good as the entangled model; below 1 = the latent is informative. nan
    without tokens.

    Args:
        c_base: mean NLL of the entangled model on the validation split, > 0, in nats per token.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = ReconstructionRatio(c_base=0.5)
        >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([4, 12]))
        >>> metric.compute().item()
        0.5
    """

    higher_is_better = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, c_base: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not c_base > 0:
            raise ValueError(f"c_base must be a positive number of nats per token, got {c_base}")
        self.c_base = float(c_base)
        self.add_sum("nll")
        self.add_sum("tokens", dtype=torch.int64)

    def update(self, nll_sum: Tensor, token_count: Tensor) -> None:
        """Add summed costs and the number of tokens they are summed over.

        Args:
            nll_sum: any shape, NLL summed over tokens, in nats.
            token_count: any shape, number of tokens.
        """
        self.nll = self.nll + nll_sum.detach().double().sum()
        self.tokens = self.tokens + token_count.sum()

    def result(self) -> Tensor:
        """Divide once."""
        return self.nll / self.tokens / self.c_base

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw both costs."""
        ratio = self.latest()
        values = {"entangled model": self.c_base, "with latent": ratio * self.c_base}
        return bars(values, title=f"Reconstruction: rho = {float(ratio):.3f}", label="nats per token", axes=ax)
