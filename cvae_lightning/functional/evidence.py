"""Exact inference over enumerated latents."""

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
