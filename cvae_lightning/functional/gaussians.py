"""Densities, samples and bounds of diagonal Gaussian latents."""

import math

import torch
from torch import Tensor

from cvae_lightning.functional.precision import at_least_float32


def gaussian_log_prob(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian, summed over the dimensions.

    -1/2 sum_d [log 2 pi + logvar + (z - mean)^2 / var].

    Args:
        z: points.
        mean: means.
        logvar: natural log of the variances.

    Shape:
        all: [..., D] -> [...], nats, at least fp32.

    Example:
        >>> zero = torch.zeros(2)
        >>> gaussian_log_prob(zero, zero, zero)  # -log 2 pi
        tensor(-1.8379)
    """
    z, mean, logvar = map(at_least_float32, (z, mean, logvar))
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mean).square() * torch.exp(-logvar)).sum(-1)


def gaussian_entropy(logvar: Tensor) -> Tensor:
    """Differential entropy of a diagonal Gaussian; may be negative.

    1/2 sum_d (1 + log 2 pi + logvar_d).

    Shape:
        logvar: [..., D] -> [...], nats, at least fp32.

    Example:
        >>> gaussian_entropy(torch.zeros(1))
        tensor(1.4189)
    """
    return 0.5 * (1 + math.log(2 * math.pi) + at_least_float32(logvar)).sum(-1)


def gaussian_sample(mean: Tensor, logvar: Tensor, num_samples: int, coupled: bool = False) -> Tensor:
    """Draw reparameterised samples z = mean + exp(logvar / 2) eps, eps ~ N(0, I).

    Coupled samples of an example stand in opposite and orthogonal directions: each is a sample like any other, and
    together they cover the space, so that few of them see every mode.
    Source: Kingma & Welling 2014, Section 2.4, arXiv 1312.6114; for the coupling Yu et al. 2016, arXiv 1610.09072.

    Args:
        mean: means.
        logvar: natural log of the variances.
        num_samples: S, at least 1.
        coupled: couple the samples of each example.

    Shape:
        mean, logvar: [B, D] -> [B, S, D], at least fp32.
    """
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    noise = torch.randn(mean.shape[0], num_samples, mean.shape[1], dtype=mean.dtype, device=mean.device)
    if coupled:
        noise = _coupled_directions(noise) * noise.norm(dim=-1, keepdim=True)
    return mean[:, None] + torch.exp(0.5 * logvar)[:, None] * noise


def _coupled_directions(noise: Tensor) -> Tensor:
    """Return unit vectors [B, S, D]: in turn u_1, -u_1, u_2, -u_2, ... of uniformly random orthogonal frames."""
    batch, samples, size = noise.shape
    frames = -(-samples // (2 * size))
    gaussian = torch.randn(batch, frames, size, size, dtype=noise.dtype, device=noise.device)
    q, r = torch.linalg.qr(gaussian)
    frame = (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT.flatten(1, 2)  # [B, frames * D, D]
    return torch.stack([frame, -frame], 2).flatten(1, 2)[:, :samples]


def soft_bound(values: Tensor, low: float, high: float) -> Tensor:
    """Squash values smoothly into [low, high], close to the identity inside: finite for any finite input.

    low + softplus(u - low), u = high - softplus(high - values).

    Shape:
        values: [...] -> [...], at least fp32.

    Raises:
        ValueError: if low is not below high.

    Example:
        >>> soft_bound(torch.tensor([-1e4, -2.0, 1e4]), -8.0, 4.0)
        tensor([-8.0000, -2.0000,  4.0000])
    """
    if not low < high:
        raise ValueError(f"soft_bound needs low < high, got {low} and {high}")
    softplus = torch.nn.functional.softplus
    upper = high - softplus(high - at_least_float32(values))
    return (low + softplus(upper - low)).clamp_max(high)
