"""Pure tensor mathematics of the package: torch only, no state. Nats and natural logs throughout."""

from cvae_lightning.functional.divergences import (
    categorical_entropy,
    categorical_kl,
    gaussian_kl,
    jensen_shannon_divergence,
)
from cvae_lightning.functional.evidence import exact_posterior, importance_weighted_evidence, log_marginal_likelihood
from cvae_lightning.functional.gaussians import gaussian_entropy, gaussian_log_prob, gaussian_sample, soft_bound
from cvae_lightning.functional.global_batch import global_batch_mean, local_batch
from cvae_lightning.functional.latent_head import latent_token_stats
from cvae_lightning.functional.marginals import (
    aggregate_gaussian,
    categorical_router_marginal_kl,
    gaussian_router_marginal_kl,
    posterior_variance,
    router_support,
)
from cvae_lightning.functional.token_means import masked_token_mean

__all__ = [
    "aggregate_gaussian",
    "categorical_entropy",
    "categorical_kl",
    "categorical_router_marginal_kl",
    "exact_posterior",
    "gaussian_entropy",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_router_marginal_kl",
    "gaussian_sample",
    "global_batch_mean",
    "importance_weighted_evidence",
    "jensen_shannon_divergence",
    "latent_token_stats",
    "local_batch",
    "log_marginal_likelihood",
    "masked_token_mean",
    "posterior_variance",
    "router_support",
    "soft_bound",
]
