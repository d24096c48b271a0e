"""Terms on statistics of the global batch: how often each latent is used."""

from __future__ import annotations

from torch import Tensor

from cvae_lightning.functional import categorical_router_marginal_kl
from cvae_lightning.losses.base import LossCallback
from cvae_lightning.losses.divergence import as_prior
from cvae_lightning.outputs import DiscreteOutputs


class _MarginalKLLoss(LossCallback):
    def __init__(self, weight: float = 1.0, prior: list[float] | None = None) -> None:
        super().__init__(weight)
        self.prior = prior

    def _kl(self, log_probs: Tensor) -> Tensor:
        return categorical_router_marginal_kl(log_probs, as_prior(self.prior, log_probs.shape[-1], log_probs))


class RouterMarginalKLLoss(_MarginalKLLoss):
    """Keeps the router from forgetting a latent: KL(mean_batch p(z|x) || prior); falls as usage nears the prior.

    Bounds: 0, inf (log K for a uniform prior).  Zero iff the batch mean equals the prior.  A statistic of the global
    batch: under DDP the mean runs over all ranks, with gradients.

    Args:
        weight: factor of the term; 0 = diagnostic only.
        prior: K probabilities; None = uniform.

    Returns:
        [] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return the KL, []."""
        return self._kl(outputs.router_log_probs)


class AggregatePosteriorBalanceLoss(_MarginalKLLoss):
    """Makes the data use every latent: KL(mean_batch q(z|x,y) || prior); falls as usage nears the prior.

    With the sharp posteriors of a small temperature this is what stops all solutions from sharing one latent.
    Bounds: 0, inf (log K for a uniform prior).  Zero iff the batch mean equals the prior.  A statistic of the global
    batch, as in :class:`RouterMarginalKLLoss`.
    Source: Zhao et al. 2018 (batch prior regularisation, arXiv 1804.08069).

    Args:
        weight: factor of the term; 0 = diagnostic only.
        prior: K probabilities; None = uniform, which is wrong where strategies are known to be skewed.

    Returns:
        [] nats, fp32.
    """

    def forward(self, outputs: DiscreteOutputs) -> Tensor:
        """Return the KL, []."""
        return self._kl(outputs.posterior_log_probs)
