import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae_lightning.functional import categorical_kl, exact_posterior, log_marginal_likelihood

ROWS = st.lists(st.tuples(st.floats(-4, 4), st.floats(0, 30), st.floats(-4, 4)), min_size=1, max_size=6)


@given(ROWS)
def test_elbo_is_at_most_the_evidence_and_equal_at_the_exact_posterior(rows):
    router_logits, nll, posterior_logits = torch.tensor(rows, dtype=torch.float64).t()[:, None]
    router = router_logits.log_softmax(-1)
    evidence = log_marginal_likelihood(router, nll).item()
    assert evidence == pytest.approx(oracles.evidence(router[0].exp().tolist(), nll[0].tolist()), abs=1e-9)

    def elbo(log_q):
        return oracles.elbo(log_q[0].exp().tolist(), router[0].exp().tolist(), nll[0].tolist())

    assert elbo(posterior_logits.log_softmax(-1)) <= evidence + 1e-9
    assert elbo(exact_posterior(router, nll)) == pytest.approx(evidence, abs=1e-9)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_exact_posterior_minimises_the_tempered_objective(beta):
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(5, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    nll = torch.rand(5, 4, generator=generator, dtype=torch.float64) * 5

    def objective(log_q):
        return (log_q.exp() * nll).sum(-1) + beta * categorical_kl(log_q, router)

    best = exact_posterior(router, nll, beta)
    minimum = -beta * torch.logsumexp(router - nll / beta, -1)
    torch.testing.assert_close(objective(best), minimum)
    for _ in range(20):
        other = (best + 0.3 * torch.randn(5, 4, generator=generator, dtype=torch.float64)).log_softmax(-1)
        assert (objective(other) >= minimum).all()


def test_limits_of_beta():
    router, nll = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[3.0, 1.0, 2.0]])
    torch.testing.assert_close(exact_posterior(router, nll, 1e9), router)
    torch.testing.assert_close(exact_posterior(router, nll, torch.tensor(1e-3)).exp(), torch.tensor([[0.0, 1.0, 0.0]]))


def test_extreme_values_stay_finite():
    router = torch.tensor([[0.0, -1e4], [-1e4, 0.0]])
    nll = torch.tensor([[1e5, 1e5 + 1], [0.0, 1e6]])
    assert log_marginal_likelihood(router, nll).isfinite().all()
    assert exact_posterior(router, nll).isfinite().all()


def test_gradients_and_permutation():
    router = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    nll = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_marginal_likelihood, (router, nll))
    assert torch.autograd.gradcheck(exact_posterior, (router, nll))
    order = [2, 0, 3, 1]
    torch.testing.assert_close(exact_posterior(router[:, order], nll[:, order]), exact_posterior(router, nll)[:, order])


@pytest.mark.parametrize("beta", [0, -1.0, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be a positive temperature"):
        exact_posterior(torch.zeros(1, 2), torch.zeros(1, 2), beta)
