"""Gaussian latents against torch.distributions and Monte Carlo."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from cvae_lightning.functional import (
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_prob,
    gaussian_router_marginal_kl,
    gaussian_sample,
    importance_weighted_evidence,
    posterior_variance,
    soft_bound,
)

SHAPES = [(4, 3), (1, 3), (4, 1), (1, 1)]  # B, D


def pair(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4)]


def distribution(mean, logvar):
    return Independent(Normal(mean, (0.5 * logvar).exp()), 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_forms_equal_those_of_torch(shape):
    mean_q, logvar_q, mean_p, logvar_p = pair(shape)
    q, p = distribution(mean_q, logvar_q), distribution(mean_p, logvar_p)
    torch.testing.assert_close(gaussian_kl(mean_q, logvar_q, mean_p, logvar_p), kl_divergence(q, p))
    torch.testing.assert_close(gaussian_entropy(logvar_q), q.entropy())
    z = torch.linspace(-2, 2, shape[0] * shape[1], dtype=torch.float64).view(shape)
    torch.testing.assert_close(gaussian_log_prob(z, mean_q, logvar_q), q.log_prob(z))


def test_kl_and_entropy_are_monte_carlo_means():
    torch.manual_seed(0)
    mean_q, logvar_q, mean_p, logvar_p = (t[:1] for t in pair((4, 3)))
    z = gaussian_sample(mean_q, logvar_q, 400_000)  # [1, S, 3]
    log_q, log_p = gaussian_log_prob(z, mean_q, logvar_q), gaussian_log_prob(z, mean_p, logvar_p)
    for terms, closed in (
        (log_q - log_p, gaussian_kl(mean_q, logvar_q, mean_p, logvar_p)),
        (-log_q, gaussian_entropy(logvar_q)),
    ):
        error = float(terms.std() / math.sqrt(terms.numel()))
        assert abs(float(terms.mean() - closed)) < 4 * error
    torch.testing.assert_close(posterior_variance(logvar_q), z.var(1).mean(-1), rtol=0.02, atol=0)


def test_the_router_marginal_is_the_moment_matched_mixture():
    torch.manual_seed(0)
    mean, logvar, _, _ = pair((6, 2))
    z = gaussian_sample(mean, logvar, 200_000).flatten(0, 1)  # samples of the equal mixture
    m, v = z.mean(0), z.var(0)
    expected = 0.5 * (v + m.square() - 1 - v.log()).sum()
    assert float(gaussian_router_marginal_kl(mean, logvar)) == pytest.approx(float(expected), rel=0.02)


def test_samples_have_the_moments_and_pass_the_gradient():
    torch.manual_seed(0)
    mean, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -4.0]]).requires_grad_()
    z = gaussian_sample(mean, logvar, 100_000)
    assert z.shape == (1, 100_000, 2)
    torch.testing.assert_close(z.mean(1), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(1), logvar.exp().detach(), atol=0, rtol=0.03)
    z.square().mean(1).sum().backward()  # d E[z^2] / d logvar = var
    torch.testing.assert_close(logvar.grad, logvar.exp().detach(), atol=0.004, rtol=0.03)


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_coupled_samples_are_samples_in_opposite_and_orthogonal_directions(samples, size):
    torch.manual_seed(0)
    mean, logvar = torch.ones(20_000, size), torch.full((20_000, size), math.log(4.0))
    z = gaussian_sample(mean, logvar, samples, coupled=True)
    assert z.shape == (20_000, samples, size)
    for s in range(samples):  # each for itself is N(1, 4 I)
        torch.testing.assert_close(z[:, s].mean(0), mean[0], atol=0.08, rtol=0)
        torch.testing.assert_close(z[:, s].T.cov().view(size, size), 4 * torch.eye(size), atol=0.2, rtol=0)
    direction = torch.nn.functional.normalize(z - 1, dim=-1)
    cosines = direction @ direction.mT
    assert samples < 2 or bool((cosines[:, 0, 1] < -0.999).all())
    if size > 1 and samples > 2:
        assert float(cosines[:, 0, 2].abs().max()) < 1e-4


def test_gradients():
    parts = [t.clone().requires_grad_() for t in pair((3, 2))]
    assert torch.autograd.gradcheck(gaussian_kl, parts)
    assert torch.autograd.gradcheck(gaussian_log_prob, parts[:3])
    assert torch.autograd.gradcheck(gaussian_router_marginal_kl, parts[:2])
    assert torch.autograd.gradcheck(lambda v: soft_bound(v, -1.0, 2.0), parts[:1])
    assert torch.autograd.gradcheck(importance_weighted_evidence, parts[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("raw", [-1e4, -80.0, 0.0, 80.0, 1e4])
def test_extreme_log_variances_stay_finite_with_their_gradients(dtype, raw):
    numbers = torch.full((2, 3), raw, dtype=dtype, requires_grad=True)
    logvar = soft_bound(numbers, -8.0, 4.0)
    assert float(logvar.detach().min()) >= -8
    assert float(logvar.detach().max()) <= 4
    mean = torch.full((2, 3), 50.0, dtype=dtype)
    zero = torch.zeros(2, 3, dtype=dtype)
    total = (
        gaussian_kl(mean, logvar, zero, logvar.flip(-1)).sum()
        + gaussian_kl(zero, zero, mean, logvar).sum()
        + gaussian_router_marginal_kl(mean, logvar)
        + posterior_variance(logvar).sum()
        + gaussian_log_prob(gaussian_sample(mean, logvar, 2), mean[:, None], logvar[:, None]).sum()
    )
    total.backward()
    assert bool(total.isfinite())
    assert bool(numbers.grad.isfinite().all())


def test_bounds_are_close_to_the_identity_inside_and_checked():
    inside = torch.tensor([-4.0, -2.0, 0.0, 1.0])
    torch.testing.assert_close(soft_bound(inside, -8.0, 4.0), inside, atol=0.06, rtol=0)
    with pytest.raises(ValueError, match="low < high"):
        soft_bound(inside, 1.0, 1.0)


def test_evidence_of_a_linear_gaussian_model():
    """y | z ~ N(z, 1), z ~ N(0, 1): y ~ N(0, 2); the error covers the miss about as often as it should."""
    torch.manual_seed(0)
    y = torch.linspace(-2, 2, 200)
    z = torch.randn(200, 400)  # the prior proposes
    log_weights = -0.5 * (math.log(2 * math.pi) + (y[:, None] - z).square())
    estimate, error = importance_weighted_evidence(log_weights)
    exact = -0.5 * (math.log(4 * math.pi) + y.square() / 2)
    assert float(((estimate - exact).abs() < 2 * error).float().mean()) > 0.88
    # the exact posterior as proposal: no variance at all
    posterior = y[:, None] / 2 + math.sqrt(0.5) * torch.randn(200, 3)
    log_r = gaussian_log_prob(posterior[..., None], y[:, None, None] / 2, torch.full((1, 1, 1), math.log(0.5)))
    log_p = -0.5 * (math.log(2 * math.pi) + posterior.square())
    log_y = -0.5 * (math.log(2 * math.pi) + (y[:, None] - posterior).square())
    estimate, error = importance_weighted_evidence(log_p + log_y - log_r)
    torch.testing.assert_close(estimate, exact, atol=1e-5, rtol=1e-5)
    assert float(error.max()) < 1e-5
    assert bool(importance_weighted_evidence(log_weights[:, :1])[1].isnan().all())
