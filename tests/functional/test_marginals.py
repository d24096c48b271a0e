import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae_lightning.functional import (
    aggregate_gaussian,
    categorical_router_marginal_kl,
    gaussian_router_marginal_kl,
    posterior_variance,
    router_support,
)


def gaussians(batch=6, dims=3):
    return torch.randn(2, batch, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_moments_equal_loops_and_samples():
    mean, logvar = gaussians()
    centre, variance = aggregate_gaussian(mean, logvar)
    for d in range(3):
        mu, var = mean[:, d].tolist(), logvar[:, d].exp().tolist()
        m = sum(mu) / 6
        assert centre[d].item() == pytest.approx(m, rel=1e-12)
        second = sum(v + a * a for v, a in zip(var, mu, strict=True)) / 6
        assert variance[d].item() == pytest.approx(second - m * m, rel=1e-9)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(100_000, 6, 3, generator=generator, dtype=torch.float64)
    samples = (mean + (logvar / 2).exp() * noise).flatten(0, 1)
    torch.testing.assert_close(centre, samples.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(variance, samples.var(0), atol=0, rtol=0.02)


def test_gaussian_marginal_kl_equals_the_closed_form():
    mean, logvar = gaussians()
    centre, variance = (moment.tolist() for moment in aggregate_gaussian(mean, logvar))
    expected = oracles.gaussian_kl(centre, variance, [0.0] * 3, [1.0] * 3)
    assert gaussian_router_marginal_kl(mean, logvar).item() == pytest.approx(expected, rel=1e-12)


def test_gaussian_marginal_kl_is_0_for_routers_that_fill_the_prior_together():
    half = math.log(0.5)
    mean = torch.tensor([[math.sqrt(0.5)], [-math.sqrt(0.5)]], dtype=torch.float64)
    assert gaussian_router_marginal_kl(mean, torch.full((2, 1), half, dtype=torch.float64)).item() == pytest.approx(
        0.0, abs=1e-12
    )


def test_categorical_marginal_kl_equals_the_oracle():
    log_p = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    mean = oracles.mixture(log_p.exp().tolist())
    prior = [0.4, 0.3, 0.2, 0.1]
    uniform = categorical_router_marginal_kl(log_p).item()
    assert uniform == pytest.approx(oracles.kl(mean, [0.25] * 4), rel=1e-12)
    other = categorical_router_marginal_kl(log_p, torch.tensor(prior, dtype=torch.float64)).item()
    assert other == pytest.approx(oracles.kl(mean, prior), rel=1e-12)


@given(st.lists(st.lists(st.floats(-60, 60), min_size=4, max_size=4), min_size=1, max_size=6))
def test_bounds(rows):
    log_p = torch.tensor(rows).log_softmax(-1)
    assert -1e-6 <= categorical_router_marginal_kl(log_p).item() <= math.log(4) + 1e-6
    support = router_support(log_p)
    assert ((support >= 0) & (support <= 1)).all()


def test_router_support_equals_the_formula():
    log_p = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.8, 0.1, 0.05, 0.05]]).log()
    expected = [[max(0.0, 1 - p / 0.125) for p in row] for row in log_p.exp().tolist()]
    for value, row in zip(router_support(log_p).tolist(), expected, strict=True):
        assert value == pytest.approx(sum(row) / 4, abs=1e-6)
    assert router_support(log_p, floor=0.02)[0].item() == pytest.approx(0.375, abs=1e-6)
    with pytest.raises(ValueError, match="floor must be a probability"):
        router_support(log_p, floor=0.0)


def test_posterior_variance_is_the_mean_over_dimensions():
    logvar = torch.tensor([[0.0, math.log(3.0)], [math.log(0.5), math.log(0.5)]])
    torch.testing.assert_close(posterior_variance(logvar), torch.tensor([2.0, 0.5]))


def test_gradients():
    mean, logvar = gaussians().requires_grad_().unbind()
    logits = mean.detach().clone().requires_grad_()
    prior = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(gaussian_router_marginal_kl, (mean, logvar))
    assert torch.autograd.gradcheck(lambda x: categorical_router_marginal_kl(x.log_softmax(-1), prior), logits)
    assert torch.autograd.gradcheck(posterior_variance, logits)
    assert torch.autograd.gradcheck(lambda x: router_support((3 * x).log_softmax(-1)), logits)


def test_extreme_values_have_finite_gradients():
    logits = torch.tensor([[1e4, 0.0], [1e4, -math.inf]], requires_grad=True)
    mean = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    logvar = torch.tensor([[-80.0], [40.0]], requires_grad=True)
    log_p = logits.log_softmax(-1)
    value = categorical_router_marginal_kl(log_p) + router_support(log_p).sum()
    (value + gaussian_router_marginal_kl(mean, logvar)).backward()
    assert value.item() == pytest.approx(math.log(2) + 1.0)
    assert all(t.grad.isfinite().all() for t in (mean, logvar))
    assert logits.grad[0].isfinite().all()


def test_a_prior_or_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="prior must have one entry per latent, 2, got"):
        categorical_router_marginal_kl(torch.zeros(1, 2), torch.ones(3) / 3)
    with pytest.raises(ValueError, match="groups must have one entry per latent, 2, got"):
        categorical_router_marginal_kl(torch.zeros(1, 2), groups=torch.zeros(3))
    with pytest.raises(ValueError, match="a prior or groups of latents, not both"):
        categorical_router_marginal_kl(torch.zeros(1, 2), torch.ones(2) / 2, torch.zeros(2))
