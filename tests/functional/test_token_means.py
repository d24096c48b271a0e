import math

import oracles
import pytest
import torch

from cvae_lightning.functional import masked_token_mean

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()


def numbers(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weights():
    values = numbers(4, 4) + 0.1
    values[1] = 1e-6  # sums to less than the threshold: uniform
    return values


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_oracle_per_latent(weighted):
    values, used = numbers(4, 4, 4), weights() if weighted else None  # B = K: broadcasting must not mix them up
    means = masked_token_mean(values, MASK, used)
    for b in range(4):
        row_weights = used[b].tolist() if weighted else None
        for k in range(4):
            expected = oracles.token_mean(values[b, k].tolist(), MASK[b].tolist(), row_weights)
            assert means[b, k].item() == pytest.approx(expected, rel=1e-12)
        flat = masked_token_mean(values[:, 0], MASK, used)
        assert flat[b].item() == pytest.approx(means[b, 0].item(), rel=1e-12)


def test_the_fallback_is_decided_per_example_at_the_threshold():
    values = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    mask = torch.ones(2, 2).bool()
    result = masked_token_mean(values, mask, torch.tensor([[0.5, 0.0], [0.6, 0.0]]), min_total_weight=0.5)
    assert result.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_masked_values_have_no_influence(poison):
    clean = numbers(4, 4).requires_grad_()
    dirty = torch.where(MASK, clean.detach(), poison).requires_grad_()
    for used in (None, weights()):
        dirty_weights = None if used is None else torch.where(MASK, used, poison)
        first, second = masked_token_mean(clean, MASK, used), masked_token_mean(dirty, MASK, dirty_weights)
        assert torch.equal(first, second)
        first.sum().backward()
        second.sum().backward()
    assert torch.equal(clean.grad, dirty.grad)
    assert not dirty.grad[~MASK].any()


def test_gradients():
    values, used = numbers(4, 3, 4).requires_grad_(), weights().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: masked_token_mean(v, MASK, used), values)
    assert torch.autograd.gradcheck(lambda v: masked_token_mean(v, MASK), values)


def test_low_precision_is_accumulated_in_fp32():
    values = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    mean = masked_token_mean(values, torch.ones(1, 4096).bool())
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(values[0, 0].item(), rel=1e-5)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\)"):
        masked_token_mean(torch.zeros(2, 3, 5), torch.ones(2, 3).bool())
