"""Terms that compare distributions of one example: prior KL, free energy, inter-latent divergence, entropies."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cvae_lightning.functional import categorical_entropy, categorical_kl, masked_token_mean, router_support
from cvae_lightning.losses.base import LossCallback
from cvae_lightning.outputs import DiscreteOutputs, require


class PriorKLLoss(LossCallback):
    """What the posterior knows beyond the router: KL(q(z|x,y) || p(z|x)); falls as the router learns to foresee it.

    K_prior = sum_k q_k (log q_k - log p_k);  with free nats: max(K_prior, free_nats).  Bounds: 0, inf.  Zero iff q = p.
    ``weight`` is beta (Higgins et al. 2017). InfoVAE style: a small weight here and a positive one on the router
    marginal (Zhao et al. 2019, arXiv 1706.02262).

    Args:
        weight: beta; 0 = diagnostic only.
        free_nats: KL per example below which the term has no gradient, in nats (Kingma et al. 2016, arXiv 1606.04934).

    Returns:
        [B] nats, fp32.
    """

    def __init__(self, weight: float = 1.0, free_nats: float = 0.0) -> None:
        super().__init__(weight)
        if free_nats < 0:
            raise ValueError(f"free_nats must be >= 0 nats, got {free_nats}")
        self.free_nats = free_nats

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return the KL, [B]."""
        return categorical_kl(outputs.posterior_log_probs, outputs.router_log_probs).clamp_min(self.free_nats)


class FreeEnergyLoss(LossCallback):
    """Free energy at the module's temperature beta, in units of the entangled model's cost.

    F = (sum_k q_k sum_t nll_t(z_k) + beta KL(q || p)) / (T c_base).  With the exact posterior q* this is
    -beta log sum_k p_k exp(-sum_t nll_t(z_k) / beta) / (T c_base); beta = 1 is the exact marginal NLL, beta < 1 pays
    for latents that tell the solutions apart.  Bounds: 0, inf.
    Source: Neal & Hinton 1998 (free energy); Higgins et al. 2017 (beta).

    Returns:
        [B] without unit (1 = the entangled model), fp32.

    Raises:
        ValueError: if the outputs hold no ``c_base``.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"c_base"})

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return F, [B]."""
        expected = (outputs.posterior_log_probs.exp() * outputs.sequence_nll).sum(-1)
        kl = categorical_kl(outputs.posterior_log_probs, outputs.router_log_probs)
        return (expected + outputs.temperature * kl) / (outputs.num_tokens * require(outputs, "c_base"))


class PosteriorDistillationLoss(LossCallback):
    """Teaches the posterior network the exact posterior, so that inference needs no enumeration.

    L = -sum_k q_k log q_xi(z_k|x,y), q detached.  Bounds: H(q), inf.  Equal to H(q) iff q_xi = q.

    Returns:
        [B] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return the cross-entropy, [B]."""
        target = outputs.posterior_log_probs.detach().exp()
        return -(target * outputs.amortized_log_probs).sum(-1)


class InterLatentDivergenceLoss(LossCallback):
    """Spreads the latents' next-token distributions apart; falls as they differ more.

    L = -sum_t w_t JSD_t / sum_t w_t, w_t = b_t detached (uniform where sum_t w_t <= threshold);
    JSD_t = H(mean_k p_k,t) - mean_k H(p_k,t), the mutual information I(z; y_t | context) under a uniform z.
    Bounds: -log K, 0.  Zero iff all latents predict alike.
    Source: Lin 1991 (generalised Jensen-Shannon divergence); the token weights are this package's.

    Args:
        weight: factor of the term; 0 = diagnostic only.
        threshold: total weight in nats at or below which an example falls back to the uniform mean.

    Returns:
        [B] nats, fp32.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"inter_latent_jsd", "baseline_nll"})

    def __init__(self, weight: float = 1.0, threshold: float = 1e-4) -> None:
        super().__init__(weight)
        self.threshold = threshold

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return the negative weighted JSD, [B]."""
        jsd, weights = require(outputs, "inter_latent_jsd"), require(outputs, "baseline_nll").detach()
        return -masked_token_mean(jsd, outputs.y_mask, weights, self.threshold)

    def diagnostics(self, outputs: DiscreteOutputs) -> dict[str, Tensor]:
        """Return the weighted mean JSD in nats."""
        return {"inter_latent_jsd/weighted_mean": -self(outputs).mean()}


class PosteriorEntropyLoss(LossCallback):
    """Entropy H(q(z|x,y)); a positive weight sharpens the posterior, a negative one keeps it soft.

    Bounds: 0, log K.  Zero iff q is one latent.

    Returns:
        [B] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return H(q), [B]."""
        return categorical_entropy(outputs.posterior_log_probs)


class RouterSupportLoss(LossCallback):
    """Keeps every latent possible for every x; falls to 0 once the router gives each at least the floor.

    L = mean_k relu(1 - p(z_k|x) / f).  Bounds: 0, 1.  Zero iff p(z_k|x) >= f for all k.
    Source: this package.

    Args:
        weight: factor of the term; 0 = diagnostic only.
        floor: smallest probability f that counts as supported; None = 0.5 / K.

    Returns:
        [B] without unit, fp32.
    """

    def __init__(self, weight: float = 1.0, floor: float | None = None) -> None:
        super().__init__(weight)
        if floor is not None and not 0 < floor < 1:
            raise ValueError(f"floor must lie between 0 and 1, got {floor}")
        self.floor = floor

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return the missing support, [B]."""
        return router_support(outputs.router_log_probs, self.floor)


def as_prior(prior: list[float] | None, num_latents: int, like: Tensor) -> Tensor | None:
    """Return a checked prior over K latents as a tensor, None for uniform.

    Raises:
        ValueError: if it has another length than K, a value <= 0, or a sum other than 1.
    """
    if prior is None:
        return None
    if len(prior) != num_latents or min(prior) <= 0 or abs(sum(prior) - 1) > 1e-4:
        raise ValueError(f"prior must hold {num_latents} positive numbers that sum to 1, got {prior}")
    return torch.tensor(prior, dtype=like.dtype, device=like.device)
