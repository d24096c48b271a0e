"""Terms that compare distributions of one example: prior KL, free energy, inter-latent divergence, entropies."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from cvae_lightning.functional import (
    categorical_entropy,
    categorical_kl,
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    global_batch_mean,
    masked_token_mean,
    posterior_variance,
    router_support,
)
from cvae_lightning.losses.base import LossCallback
from cvae_lightning.losses.reconstruction import expected_over_latents
from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs, require


class PriorKLLoss(LossCallback):
    """What the posterior knows beyond the router: KL(q(z|x,y) || p(z|x)); falls as the router learns to foresee it.

    Discrete: K_prior = sum_k q_k (log q_k - log p_k). Continuous: the KL of diagonal Gaussians, in closed form.
    With free nats: max(K_prior, free_nats).  Bounds: 0, inf.  Zero iff q = p.
    ``weight`` is beta (Higgins et al. 2017). InfoVAE style: a small weight here and a positive one on the router
    marginal (Zhao et al. 2019, arXiv 1706.02262).

    Args:
        weight: beta; 0 = diagnostic only.
        free_nats: KL below which the term has no gradient, in nats (Kingma et al. 2016, arXiv 1606.04934): per example,
            or per dimension of the batch mean with ``per_dimension``.
        target_nats: instead, the term is |mean KL - target_nats| of the global batch, a budget that is neither
            exceeded nor undercut (Burgess et al. 2018, arXiv 1804.03599); a good one is the entropy of the strategies.
        per_dimension: continuous only: free nats for every dimension, sum_d max(mean_batch KL_d, free_nats).
        detach_posterior: q is a constant, so that the term trains the router alone: what is latent stays as it is, and
            the router learns how often.

    Returns:
        [B] nats, fp32; [] with ``target_nats`` or ``per_dimension``.
    """

    def __init__(
        self,
        weight: float = 1.0,
        free_nats: float = 0.0,
        target_nats: float | None = None,
        per_dimension: bool = False,
        detach_posterior: bool = False,
    ) -> None:
        super().__init__(weight)
        if free_nats < 0:
            raise ValueError(f"free_nats must be >= 0 nats, got {free_nats}")
        if target_nats is not None and (target_nats < 0 or free_nats or per_dimension):
            raise ValueError(f"target_nats must be >= 0 and stand alone, without free nats, got {target_nats}")
        self.free_nats = free_nats
        self.target_nats = target_nats
        self.per_dimension = per_dimension
        self.detach_posterior = detach_posterior

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the KL, [B] or []."""
        if self.detach_posterior:
            outputs = detached_posterior(outputs)
        if self.per_dimension:
            if isinstance(outputs, DiscreteOutputs):
                raise ValueError("per_dimension free nats need a latent with dimensions, and this one is discrete")
            return global_batch_mean(_kl_per_dimension(outputs)).clamp_min(self.free_nats).sum()
        kl = prior_kl(outputs)
        if self.target_nats is not None:
            return (global_batch_mean(kl) - self.target_nats).abs()
        return kl.clamp_min(self.free_nats)

    def diagnostics(self, outputs: DiscreteOutputs | ContinuousOutputs) -> dict[str, Tensor]:
        """Return the KL itself where the term bends it."""
        return {"prior_kl": prior_kl(outputs).mean()} if self.target_nats is not None or self.free_nats else {}


def prior_kl(outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
    """Return KL(q(z|x,y) || p(z|x)), [B] nats."""
    if isinstance(outputs, DiscreteOutputs):
        return categorical_kl(outputs.posterior_log_probs, outputs.router_log_probs)
    return gaussian_kl(outputs.posterior_mean, outputs.posterior_logvar, outputs.prior_mean, outputs.prior_logvar)


def detached_posterior(outputs: DiscreteOutputs | ContinuousOutputs) -> DiscreteOutputs | ContinuousOutputs:
    """Return the outputs with a posterior that no gradient goes through."""
    if isinstance(outputs, DiscreteOutputs):
        return replace(outputs, posterior_log_probs=outputs.posterior_log_probs.detach())
    mean, logvar = outputs.posterior_mean.detach(), outputs.posterior_logvar.detach()
    return replace(outputs, posterior_mean=mean, posterior_logvar=logvar)


def _kl_per_dimension(outputs: ContinuousOutputs) -> Tensor:
    parts = (outputs.posterior_mean, outputs.posterior_logvar, outputs.prior_mean, outputs.prior_logvar)
    return gaussian_kl(*(part[..., None] for part in parts))  # [B, D]


class FreeEnergyLoss(LossCallback):
    """Free energy at the module's temperature beta, in units of the entangled model's cost.

    F = (E_q[sum_t nll_t(z)] + beta KL(q || p)) / (T c_base).  With the exact posterior q* of a discrete z this is
    -beta log sum_k p_k exp(-sum_t nll_t(z_k) / beta) / (T c_base); beta = 1 is the exact marginal NLL, beta < 1 pays
    for latents that tell the solutions apart.  Bounds: 0, inf.  Continuous z with importance weights:
    -beta log (1/S) sum_s p(z_s|x) exp(-sum_t nll_t(z_s) / beta) / r(z_s), the same value estimated from samples of a
    proposal r (Burda et al. 2016, arXiv 1509.00519, at beta = 1).
    Source: Neal & Hinton 1998 (free energy); Higgins et al. 2017 (beta).

    Returns:
        [B] without unit (1 = the entangled model), fp32.

    Raises:
        ValueError: if the outputs hold no ``c_base``.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"c_base"})

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return F, [B]."""
        if isinstance(outputs, ContinuousOutputs) and outputs.sample_log_weights is not None:
            cost = -require(outputs, "temperature") * outputs.sample_log_weights.logsumexp(-1)
            return cost / (outputs.num_tokens * require(outputs, "c_base"))
        expected = expected_over_latents(outputs.sequence_nll, outputs)
        cost = expected + require(outputs, "temperature") * prior_kl(outputs)
        return cost / (outputs.num_tokens * require(outputs, "c_base"))


class PosteriorDistillationLoss(LossCallback):
    """Teaches the posterior network the exact posterior, so that inference needs no enumeration.

    Discrete: L = -sum_k q_k log q_xi(z_k|x,y), q detached.  Bounds: H(q), inf.  Equal to H(q) iff q_xi = q.
    Continuous: the same with samples, L = -sum_s w_s log q_xi(z_s|x,y), w_s the normalised importance weights,
    detached; the wake phase of Bornschein & Bengio 2015, arXiv 1406.2751.  Without bounds.

    Returns:
        [B] nats, fp32.

    Raises:
        ValueError: for a continuous posterior that is estimated without importance weights.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"amortized_log_probs"})

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the cross-entropy, [B]."""
        if isinstance(outputs, DiscreteOutputs):
            target = outputs.posterior_log_probs.detach().exp()
            return -(target * require(outputs, "amortized_log_probs")).sum(-1)
        if outputs.sample_log_weights is None:
            raise ValueError("PosteriorDistillationLoss needs weighted samples: set model.posterior to importance")
        target = outputs.sample_log_weights.detach().softmax(-1)
        mean, logvar = outputs.posterior_mean[:, None], outputs.posterior_logvar[:, None]
        return -(target * gaussian_log_prob(require(outputs, "latents").detach(), mean, logvar)).sum(-1)


class InterLatentDivergenceLoss(LossCallback):
    """Spreads the latents' next-token distributions apart; falls as they differ more.

    L = -sum_t w_t JSD_t / sum_t w_t, w_t = b_t detached (uniform where sum_t w_t <= threshold);
    JSD_t = H(mean_k p_k,t) - mean_k H(p_k,t), the mutual information I(z; y_t | context) under a uniform z.
    For a continuous z the K latents are drawn from the posteriors of the batch's examples, so that they are spread as
    the solutions are, and every x is generated under the latents of others; that form is this package's.
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

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the negative weighted JSD, [B]."""
        jsd, weights = require(outputs, "inter_latent_jsd"), require(outputs, "baseline_nll").detach()
        return -masked_token_mean(jsd, outputs.y_mask, weights, self.threshold)

    def diagnostics(self, outputs: DiscreteOutputs | ContinuousOutputs) -> dict[str, Tensor]:
        """Return the weighted mean JSD in nats."""
        return {"inter_latent_jsd/weighted_mean": -self(outputs).mean()}


class PosteriorEntropyLoss(LossCallback):
    """Entropy H(q(z|x,y)); a positive weight sharpens the posterior, a negative one keeps it soft.

    Bounds: 0, log K, zero iff q is one latent; for a continuous z the differential entropy, without bounds.

    Returns:
        [B] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return H(q), [B]."""
        if isinstance(outputs, DiscreteOutputs):
            return categorical_entropy(outputs.posterior_log_probs)
        return gaussian_entropy(outputs.posterior_logvar)


class PosteriorVarianceLoss(LossCallback):
    """Mean variance of a continuous posterior; falls as q(z|x,y) becomes certain about z.

    V_post = mean_d exp(logvar_d).  Bounds: 0, inf.
    Source: this package.

    Returns:
        [B] squared latent units, fp32.

    Raises:
        ValueError: for a discrete latent.
    """

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return V_post, [B]."""
        if isinstance(outputs, DiscreteOutputs):
            raise ValueError("PosteriorVarianceLoss reads a Gaussian posterior; use PosteriorEntropyLoss here")
        return posterior_variance(outputs.posterior_logvar)

    def diagnostics(self, outputs: DiscreteOutputs | ContinuousOutputs) -> dict[str, Tensor]:
        """Return the variance as a standard deviation in latent units."""
        return {"posterior_std": self(outputs).mean().sqrt()}


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

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the missing support, [B]."""
        if not isinstance(outputs, DiscreteOutputs):
            raise ValueError(
                "RouterSupportLoss counts latents, and a continuous latent has none: use RouterMarginalKLLoss"
            )
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
