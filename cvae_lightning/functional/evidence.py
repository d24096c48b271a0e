"""Inference over enumerated latents, exact, and over sampled ones, importance-weighted."""

import math

import torch
from torch import Tensor

from cvae_lightning.functional.precision import at_least_float32


def log_marginal_likelihood(router_log_probs: Tensor, sequence_nll: Tensor) -> Tensor:
    """Exact evidence log p(y|x) of a discrete latent; at most 0, higher is better.

    logsumexp_k [log p(z_k|x) - sum_t nll_t(z_k)]. An upper bound of the ELBO of every posterior.

    Args:
        router_log_probs: normalised log p(z_k|x).
        sequence_nll: NLL of y under each latent, summed over its tokens, in nats.

    Shape:
        router_log_probs, sequence_nll: [B, K] -> [B], nats, at least fp32.

    Example:
        >>> log_marginal_likelihood(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 1.0]]))
        tensor([-1.])
    """
    return torch.logsumexp(at_least_float32(router_log_probs) - at_least_float32(sequence_nll), dim=-1)


def exact_posterior(router_log_probs: Tensor, sequence_nll: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities of the posterior that minimises E_q[sum_t nll_t] + beta KL(q || p).

    log q*_k = log p(z_k|x) - sum_t nll_t(z_k) / beta - const. beta = 1 is the exact posterior p(z|x,y);
    beta -> infinity is the router, beta -> 0 the best latent.

    Args:
        router_log_probs: normalised log p(z_k|x).
        sequence_nll: NLL of y under each latent, summed over its tokens, in nats.
        beta: temperature, > 0.

    Shape:
        router_log_probs, sequence_nll: [B, K]; beta: [] -> [B, K] normalised log-probabilities, at least fp32.

    Raises:
        ValueError: if beta is a number that is not positive.

    Example:
        >>> exact_posterior(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 2.0]]), beta=2.0).exp()
        tensor([[0.7311, 0.2689]])
    """
    if not isinstance(beta, Tensor) and not beta > 0:
        raise ValueError(f"beta must be a positive temperature, got {beta}: use 1.0 for the exact posterior p(z|x,y)")
    scores = at_least_float32(router_log_probs) - at_least_float32(sequence_nll) / beta
    return torch.log_softmax(scores, dim=-1)


def importance_weighted_evidence(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate log p(y|x) from samples of a continuous latent, with its standard error.

    log (1/S) sum_s w_s, w_s = p(y|x,z_s) p(z_s|x) / r(z_s) for samples of a proposal r. A lower bound of log p(y|x) in
    expectation, tighter with more samples. The error is that of the delta method, sd(w) / (sqrt(S) mean(w)).
    Source: Burda et al. 2016, Eq. 8, arXiv 1509.00519; the error is this package's.

    Args:
        log_weights: log w_s.

    Shape:
        log_weights: [..., S] -> ([...], [...]), nats, at least fp32; the error is nan for a single sample.

    Example:
        >>> importance_weighted_evidence(torch.tensor([1.0, 3.0]).log())  # mean 2, sd sqrt 2
        (tensor(0.6931), tensor(0.5000))
    """
    log_weights = at_least_float32(log_weights)
    samples = log_weights.shape[-1]
    log_mean = torch.logsumexp(log_weights, -1) - math.log(samples)
    relative = (log_weights - log_mean[..., None]).exp()
    return log_mean, relative.std(-1) / math.sqrt(samples) if samples > 1 else torch.full_like(log_mean, torch.nan)
