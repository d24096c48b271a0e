"""The contract of one loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs
from cvae_lightning.spec import HasSpec


class LossCallback(HasSpec, nn.Module, ABC):
    """One named term of the objective J = sum_i weight_i L_i.

    The module applies the mean over the batch and the weight once; a term returns its raw value. A term of weight 0
    is diagnostic only: computed without gradient, logged raw, adding nothing to J.

    Args:
        weight: factor of the term in the objective; may be negative; 0 = diagnostic only.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """Optional fields of the outputs that ``forward`` reads; the module computes only what is asked for."""

    of_marginals: ClassVar[bool] = False
    """Whether a batch statistic depends on the batch's aggregate distributions alone, so that an evaluation can compute
    it exactly for a whole split; other batch statistics are averaged over batches there."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = float(weight)

    @abstractmethod
    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the unweighted term: [B] per example in fp32, or [] for a statistic of the global batch."""

    def diagnostics(self, outputs: DiscreteOutputs | ContinuousOutputs) -> dict[str, Tensor]:
        """Return extra scalars to log under ``diagnostics/``; called without gradient."""
        return {}
