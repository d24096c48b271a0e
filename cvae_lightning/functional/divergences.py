"""Entropies and divergences of categorical and diagonal Gaussian distributions."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cvae_lightning.functional.precision import at_least_float32


def categorical_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(q || p) of categorical distributions.

    sum_k q_k (log q_k - log p_k). Bounds: 0, infinity. Zero iff q = p. Where q_k = 0 the term is 0; where p_k = 0 < q_k
    it is infinite.
    Source: Kullback & Leibler 1951.

    Args:
        log_q: normalised log-probabilities; may hold -inf.
        log_p: normalised log-probabilities; may hold -inf.

    Shape:
        log_q, log_p: [..., K] -> [...], nats, at least fp32.

    Example:
        >>> categorical_kl(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)
    """
    log_q, log_p = at_least_float32(log_q), at_least_float32(log_p)
    support = log_q > -math.inf
    log_ratio = torch.where(support, log_q, 0.0) - torch.where(support, log_p, 0.0)
    return (log_q.exp() * log_ratio).sum(-1)


def categorical_entropy(log_p: Tensor) -> Tensor:
    """Entropy H(p) of categorical distributions.

    -sum_k p_k log p_k. Bounds: 0, log K. Zero iff one category has all the mass.

    Args:
        log_p: normalised log-probabilities; may hold -inf.

    Shape:
        log_p: [..., K] -> [...], nats, at least fp32.

    Example:
        >>> categorical_entropy(torch.tensor([0.25, 0.25, 0.25, 0.25]).log())
        tensor(1.3863)
    """
    log_p = at_least_float32(log_p)
    return -(log_p.exp() * torch.where(log_p > -math.inf, log_p, 0.0)).sum(-1)


def gaussian_kl(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(q || p) of diagonal Gaussians, summed over the dimensions.

    1/2 sum_d [exp(a_d) - 1 - a_d + (mean_q - mean_p)^2 / var_p], a = logvar_q - logvar_p. Bounds: 0, infinity. Zero iff
    q = p; `expm1` keeps it exact to rounding near there.
    Source: Kingma & Welling 2014, Appendix B, arXiv 1312.6114; here for any p, there for N(0, I).

    Args:
        mean_q: means of q.
        logvar_q: natural log of the variances of q.
        mean_p: means of p.
        logvar_p: natural log of the variances of p.

    Shape:
        all: [..., D] -> [...], nats, at least fp32.

    Example:
        >>> zero = torch.zeros(1)
        >>> gaussian_kl(zero + 2, zero, zero, zero)
        tensor(2.)
    """
    mean_q, logvar_q, mean_p, logvar_p = map(at_least_float32, (mean_q, logvar_q, mean_p, logvar_p))
    log_ratio = logvar_q - logvar_p
    squared_distance = (mean_q - mean_p).square() * torch.exp(-logvar_p)
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + squared_distance).sum(-1)


def jensen_shannon_divergence(log_probs: Tensor) -> Tensor:
    """Jensen-Shannon divergence of K distributions under the uniform mixture.

    mean_k KL(p_k || m), m = mean_k p_k; equal to H(m) - mean_k H(p_k), but without its cancellation where the
    distributions nearly coincide. Bounds: 0, log K. Zero iff all p_k are equal.
    Source: Lin 1991, with equal weights.

    Args:
        log_probs: normalised log-probabilities; may hold -inf.

    Shape:
        log_probs: [..., K, V] -> [...], nats, at least fp32.

    Example:
        >>> jensen_shannon_divergence(torch.eye(2).log())
        tensor(0.6931)
    """
    return _JensenShannon.apply(at_least_float32(log_probs))


class _JensenShannon(torch.autograd.Function):
    """The divergence with its one-line gradient: p_k (log p_k - log m) / K."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor) -> Tensor:
        probs = log_probs.exp()
        log_mixture = probs.mean(-2, keepdim=True).clamp_min_(torch.finfo(probs.dtype).tiny).log_()
        log_ratio = (log_probs - log_mixture).clamp_min_(torch.finfo(probs.dtype).min)  # 0 * finite = 0 where p = 0
        terms = probs.mul_(log_ratio).div_(log_probs.shape[-2])
        ctx.save_for_backward(terms)
        return terms.sum(-1).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (terms,) = ctx.saved_tensors
        return terms * grad[..., None, None]
