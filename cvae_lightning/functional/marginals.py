"""Statistics of router and posterior: over the global batch for the marginals, per example for the rest."""

import torch
from torch import Tensor

from cvae_lightning.functional.global_batch import global_batch_mean
from cvae_lightning.functional.precision import at_least_float32


def aggregate_gaussian(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Match the moments of a global batch of diagonal Gaussians, the equal mixture, with one diagonal Gaussian.

    m = mean_i mu_i, v = mean_i (sigma_i^2 + mu_i^2) - m^2, computed as mean_i (sigma_i^2 + (mu_i - m)^2), which cannot
    become negative.

    Args:
        mean: means of this process's Gaussians.
        logvar: natural log of their variances.

    Shape:
        mean, logvar: [B, D] -> ([D], [D]) mean and variance, at least fp32.

    Example:
        >>> aggregate_gaussian(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1))
        (tensor([0.]), tensor([2.]))
    """
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    centre = global_batch_mean(mean)
    return centre, global_batch_mean(logvar.exp() + (mean - centre).square())


def gaussian_router_marginal_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Distance of the moment-matched marginal router from N(0, I); falls when the routers together fill the prior.

    1/2 sum_d (v_d + m_d^2 - 1 - log v_d) with m, v from `aggregate_gaussian`. Bounds: 0, infinity.
    Zero iff m = 0, v = 1. A statistic of the global batch.
    Source: the marginal term of Zhao et al. 2019 (InfoVAE), arXiv 1706.02262; here of the router, and moment-matched.

    Args:
        mean: router means of this process's batch.
        logvar: natural log of the router variances.

    Shape:
        mean, logvar: [B, D] -> [], nats, at least fp32.

    Example:
        >>> gaussian_router_marginal_kl(torch.tensor([[2.0], [2.0]]), torch.zeros(2, 1))
        tensor(2.)
    """
    centre, variance = aggregate_gaussian(mean, logvar)
    log_variance = variance.clamp_min(torch.finfo(variance.dtype).tiny).log()
    return 0.5 * (variance + centre.square() - 1 - log_variance).sum()


def categorical_router_marginal_kl(log_p: Tensor, prior: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
    """KL(p_bar || prior) of the mean distribution of a global batch; falls when the latents are used as the prior says.

    p_bar = mean_i p_i. Bounds: 0, and log K for the uniform prior. Zero iff p_bar = prior. Serves the router and the
    aggregate posterior alike. A zero in the prior counts as the smallest positive number, so the value stays finite.

    With groups of latents, what a group has of p_bar may be anything, and the prior is that its latents have equal
    parts of it: zero iff they do, and so where every group is one latent.

    Args:
        log_p: normalised log-probabilities of this process's batch; may hold -inf.
        prior: probabilities that sum to 1; None = uniform.
        groups: the group of each latent, any numbers, in place of a prior.

    Shape:
        log_p: [B, K]; prior: [K]; groups: [K] int -> [], nats, at least fp32.

    Raises:
        ValueError: if prior or groups do not have one entry per latent, or both are given.

    Example:
        >>> categorical_router_marginal_kl(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log())
        tensor(0.)
    """
    marginal = global_batch_mean(at_least_float32(log_p).exp())
    if prior is not None and groups is not None:
        raise ValueError("give a prior or groups of latents, not both")
    for name, given in (("prior", prior), ("groups", groups)):
        if given is not None and given.shape != marginal.shape:
            raise ValueError(f"{name} must have one entry per latent, {marginal.shape[0]}, got {tuple(given.shape)}")
    if groups is not None:
        alike = (groups[:, None] == groups).to(marginal)
        prior = (alike @ marginal) / alike.sum(-1)
    elif prior is None:
        prior = torch.full_like(marginal, 1 / marginal.shape[0])
    tiny = torch.finfo(marginal.dtype).tiny
    log_ratio = marginal.clamp_min(tiny).log() - prior.to(marginal).clamp_min(tiny).log()
    return (marginal * log_ratio).sum()


def posterior_variance(logvar: Tensor) -> Tensor:
    """Mean over the dimensions of the posterior variance; falls as the posterior becomes certain.

    V_post = mean_d exp(logvar_d). Bounds: 0, infinity.

    Shape:
        logvar: [..., D] -> [...], at least fp32.

    Example:
        >>> posterior_variance(torch.tensor([[0.0, 0.0]]))
        tensor([1.])
    """
    return at_least_float32(logvar).exp().mean(-1)


def router_support(log_p: Tensor, floor: float | None = None) -> Tensor:
    """How far the router starves latents; zero iff every latent has at least `floor` for this x.

    mean_k relu(1 - p(z_k|x) / f). Bounds: 0, 1.

    Args:
        log_p: normalised log p(z_k|x).
        floor: probability f below which a latent counts as starved, in (0, 1]; None = 0.5 / K.

    Shape:
        log_p: [..., K] -> [...], at least fp32.

    Raises:
        ValueError: if floor is not in (0, 1].

    Example:
        >>> router_support(torch.tensor([[1.0, 0.0]]).log()), router_support(torch.tensor([[0.75, 0.25]]).log())
        (tensor([0.5000]), tensor([0.]))
    """
    floor = 0.5 / log_p.shape[-1] if floor is None else floor
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be a probability in (0, 1], got {floor}: leave it out for 0.5 / K")
    return torch.relu(1 - at_least_float32(log_p).exp() / floor).mean(-1)
