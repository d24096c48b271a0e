"""Reconstruction terms: how well the generator predicts y under the latents that the posterior names."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cvae_lightning.functional import masked_token_mean
from cvae_lightning.losses.base import LossCallback
from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs, require


def expected_over_latents(values: Tensor, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
    """Return sum_k q_k values_k for a discrete z, or the (weighted) mean over samples otherwise: [B, K] -> [B]."""
    if isinstance(outputs, DiscreteOutputs):
        return (outputs.posterior_log_probs.exp() * values).sum(-1)
    if outputs.sample_log_weights is None:
        return values.mean(-1)
    return (outputs.sample_log_weights.softmax(-1) * values).sum(-1)


class ReconstructionLoss(LossCallback):
    """Expected NLL per y-token under the posterior; falls as the generator predicts y better.

    R = sum_k q_k (1/T) sum_t nll_t(z_k).  Bounds: 0, inf.  Zero iff y is certain under every latent with q_k > 0.
    Source: Kingma & Welling 2014, Eq. 3, arXiv 1312.6114; differs by the mean over tokens in place of their sum.

    Returns:
        [B] nats per token, fp32.
    """

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return R, [B]."""
        return expected_over_latents(masked_token_mean(outputs.token_nll, outputs.y_mask), outputs)


class BaselineNormalizedReconstructionLoss(ReconstructionLoss):
    """Reconstruction in units of the entangled model's mean NLL per token.

    R_norm = R / c_base: 1 = as good as the entangled model, below 1 = z is informative. One scale for all tasks, so
    that weights carry over between them.  Bounds: 0, inf.

    Returns:
        [B] without unit, fp32.

    Raises:
        ValueError: if the outputs hold no ``c_base``.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"c_base"})

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return R / c_base, [B]."""
        return super().forward(outputs) / require(outputs, "c_base")


class TokenWeightedReconstructionLoss(LossCallback):
    """Reconstruction in which a token counts by how hard it is for the baseline: easy tokens do not dilute z.

    w_t = b_t detached;  R^w(z) = sum_t w_t nll_t(z) / sum_t w_t where sum_t w_t > threshold, else R(z), decided per
    example;  L = sum_k q_k R^w(z_k).  Bounds: 0, inf.
    Source: this package. A baseline that is only subtracted changes no gradient; weighting does.

    Args:
        weight: factor of the term in the objective; 0 = diagnostic only.
        threshold: total weight in nats at or below which an example falls back to the uniform mean.

    Returns:
        [B] nats per token, fp32.

    Raises:
        ValueError: if the outputs hold no ``baseline_nll``.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"baseline_nll"})

    def __init__(self, weight: float = 1.0, threshold: float = 1e-4) -> None:
        super().__init__(weight)
        self.threshold = threshold

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the weighted reconstruction, [B]."""
        weights = require(outputs, "baseline_nll").detach()
        per_latent = masked_token_mean(outputs.token_nll, outputs.y_mask, weights, self.threshold)
        return expected_over_latents(per_latent, outputs)
