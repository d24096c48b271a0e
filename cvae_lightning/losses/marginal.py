"""Terms on statistics of the global batch: how often each latent is used."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from cvae_lightning.functional import categorical_router_marginal_kl, gaussian_router_marginal_kl
from cvae_lightning.losses.base import LossCallback
from cvae_lightning.losses.divergence import as_prior
from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs


class _MarginalKLLoss(LossCallback):
    of_marginals: ClassVar[bool] = True

    def __init__(self, weight: float = 1.0, prior: list[float] | Literal["seeds", "ways"] | None = None) -> None:
        super().__init__(weight)
        self.prior = prior

    def _discrete(self, log_probs: Tensor, seed_shares: Tensor | None, seed_ways: Tensor | None) -> Tensor:
        if self.prior == "ways":
            return categorical_router_marginal_kl(log_probs, groups=seed_ways)
        if self.prior == "seeds":
            if seed_shares is None:
                raise ValueError(
                    "prior: seeds stands for the shares of the latents among the solutions that seed them, and "
                    "model.seeding is null: give K probabilities, or null for the uniform prior"
                )
            return categorical_router_marginal_kl(log_probs, seed_shares)
        return categorical_router_marginal_kl(log_probs, as_prior(self.prior, log_probs.shape[-1], log_probs))

    def _gaussian(self, mean: Tensor, logvar: Tensor) -> Tensor:
        if self.prior is not None:
            raise ValueError(f"prior holds probabilities of latents; a continuous z has N(0, I), got {self.prior}")
        return gaussian_router_marginal_kl(mean, logvar)


class RouterMarginalKLLoss(_MarginalKLLoss):
    """Keeps the router from forgetting a latent: KL(mean_batch p(z|x) || prior); falls as usage nears the prior.

    Bounds: 0, inf (log K for a uniform prior).  Zero iff the batch mean equals the prior.  A statistic of the global
    batch: under DDP the mean runs over all ranks, with gradients. Continuous: the batch's Gaussians are matched in
    their moments by one, and that is compared with N(0, I).

    Args:
        weight: factor of the term; 0 = diagnostic only.
        prior: K probabilities; ``seeds`` = the shares of the latents, as they are seeded, among the entangled model's
            solutions (:class:`LatentSeeding`; uniform until there are seeds); ``ways`` = equal parts for the latents
            that were seeded with the same way of solving, whatever its share; None = uniform. Discrete only.

    Returns:
        [] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the KL, []."""
        if isinstance(outputs, DiscreteOutputs):
            return self._discrete(outputs.router_log_probs, outputs.seed_shares, outputs.seed_ways)
        return self._gaussian(outputs.prior_mean, outputs.prior_logvar)


class AggregatePosteriorBalanceLoss(_MarginalKLLoss):
    """Makes the data use every latent: KL(mean_batch q(z|x,y) || prior); falls as usage nears the prior.

    With the sharp posteriors of a small temperature this is what stops all solutions from sharing one latent.
    Bounds: 0, inf (log K for a uniform prior).  Zero iff the batch mean equals the prior.  A statistic of the global
    batch, as in :class:`RouterMarginalKLLoss`. Continuous: the aggregate posterior's moments against N(0, I), which
    keeps the code from shrinking into the noise.
    Source: Zhao et al. 2018 (batch prior regularisation, arXiv 1804.08069).

    Args:
        weight: factor of the term; 0 = diagnostic only.
        prior: K probabilities; ``seeds`` = the shares of the latents, as they are seeded, among the entangled model's
            solutions (:class:`LatentSeeding`; uniform until there are seeds), an estimate of how often each strategy is
            used; ``ways`` = equal parts for the latents that were seeded with the same way of solving, whatever
            its share, for a K larger than the number of ways (where each way has one latent the term is 0;
            without seeds all latents are of one way); None = uniform, which is wrong where strategies are known to be
            skewed.

    Returns:
        [] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs | ContinuousOutputs) -> Tensor:
        """Return the KL, []."""
        if isinstance(outputs, DiscreteOutputs):
            return self._discrete(outputs.posterior_log_probs, outputs.seed_shares, outputs.seed_ways)
        return self._gaussian(outputs.posterior_mean, outputs.posterior_logvar)
