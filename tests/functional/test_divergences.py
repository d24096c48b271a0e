import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae_lightning.functional import categorical_entropy, categorical_kl, gaussian_kl, jensen_shannon_divergence

LOGITS = st.floats(-40, 40)


def distributions(rows, columns, seed=0, temperature=2.0):
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits * temperature).log_softmax(-1)


def test_categorical_divergences_equal_the_oracle():
    log_q, log_p = distributions(6, 5, 0), distributions(6, 5, 1)
    for row in range(6):
        q, p = log_q[row].exp().tolist(), log_p[row].exp().tolist()
        assert categorical_kl(log_q, log_p)[row].item() == pytest.approx(oracles.kl(q, p), rel=1e-12)
        assert categorical_entropy(log_q)[row].item() == pytest.approx(oracles.entropy(q), rel=1e-12)


def test_jsd_equals_the_entropy_form():
    log_probs = distributions(3 * 4, 7).view(3, 4, 7)
    for row in range(3):
        expected = oracles.jsd(log_probs[row].exp().tolist())
        assert jensen_shannon_divergence(log_probs)[row].item() == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.lists(LOGITS, min_size=4, max_size=4), min_size=1, max_size=5))
def test_jsd_lies_between_0_and_log_k(rows):
    value = jensen_shannon_divergence(torch.tensor(rows).log_softmax(-1)).item()
    assert -1e-6 <= value <= math.log(len(rows)) + 1e-6


@given(st.lists(LOGITS, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_kl_is_not_negative_and_0_for_equal_arguments(logits, random):
    log_q = torch.tensor(logits).log_softmax(-1)
    log_p = torch.tensor(random.sample(logits, len(logits))).log_softmax(-1)
    assert categorical_kl(log_q, log_p).item() >= -1e-5
    assert categorical_kl(log_q, log_q).item() == 0.0


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.floats(-9, 9), st.floats(-9, 9)), min_size=1))
def test_gaussian_kl_equals_the_oracle_and_is_not_negative(rows):
    mean_q, logvar_q, mean_p, logvar_p = torch.tensor(rows, dtype=torch.float64).t()
    variances = [[math.exp(value) for value in logvar.tolist()] for logvar in (logvar_q, logvar_p)]
    expected = oracles.gaussian_kl(mean_q.tolist(), variances[0], mean_p.tolist(), variances[1])
    value = gaussian_kl(mean_q, logvar_q, mean_p, logvar_p).item()
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert value >= 0.0
    assert gaussian_kl(mean_q, logvar_q, mean_q, logvar_q).item() == 0.0


def test_gaussian_kl_agrees_with_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    mean_q, logvar_q, mean_p, logvar_p = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    q = torch.distributions.Normal(mean_q, (logvar_q / 2).exp())
    p = torch.distributions.Normal(mean_p, (logvar_p / 2).exp())
    samples = mean_q + (logvar_q / 2).exp() * torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    differences = (q.log_prob(samples) - p.log_prob(samples)).sum(-1)
    error = 5 * differences.std().item() / len(samples) ** 0.5
    assert gaussian_kl(mean_q, logvar_q, mean_p, logvar_p).item() == pytest.approx(differences.mean().item(), abs=error)


def test_gradients():
    logits = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda q, p: categorical_kl(q.log_softmax(-1), p.log_softmax(-1)), logits[:2])
    assert torch.autograd.gradcheck(lambda p: categorical_entropy(p.log_softmax(-1)), logits[:1])
    assert torch.autograd.gradcheck(jensen_shannon_divergence, logits[:1])
    assert torch.autograd.gradcheck(gaussian_kl, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_probabilities_give_exact_values_and_finite_gradients(dtype):
    logits = torch.tensor([[300.0, 0.0, -math.inf], [0.0, 300.0, -math.inf]], dtype=dtype, requires_grad=True)
    log_probs = logits.log_softmax(-1)
    values = torch.stack(
        [
            jensen_shannon_divergence(log_probs),
            categorical_entropy(log_probs).sum(),
            categorical_kl(log_probs[0], torch.tensor([0.5, 0.5, 0.0]).log()),
        ]
    )
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([math.log(2), 0.0, math.log(2)]))
    values.sum().backward()
    assert logits.grad[:, :2].isfinite().all()


def test_kl_is_infinite_where_only_p_is_zero():
    even, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert categorical_kl(even, sure).item() == math.inf
    assert categorical_kl(sure, even).item() == pytest.approx(math.log(2))


def test_jsd_keeps_its_precision_near_collapse():
    noise = torch.randn(64, 4, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    log_probs = noise.log_softmax(-1)
    exact = jensen_shannon_divergence(log_probs)
    assert exact.mean().item() < 1e-6
    error = (jensen_shannon_divergence(log_probs.float()) - exact).abs().mean() / exact.mean()
    assert error.item() < 0.05


def test_one_distribution_has_no_divergence():
    assert jensen_shannon_divergence(distributions(1, 5)).item() == pytest.approx(0.0, abs=1e-15)
