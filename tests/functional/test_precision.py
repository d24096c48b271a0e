import pytest
import torch
from head_inputs import TINY, inputs
from torch import nn

from cvae_lightning.functional import latent_token_stats
from cvae_lightning.functional.precision import without_negligible_gradients


def gradient(given):
    values = torch.zeros(len(given), requires_grad=True)
    without_negligible_gradients(values * 1).backward(torch.tensor(given))
    return values.grad


def test_what_would_be_lost_in_a_sum_is_zero():
    torch.testing.assert_close(gradient([-2.0, 1e-11, -1e-13, 1e-30, 0.0]), torch.tensor([-2.0, 1e-11, 0.0, 0.0, 0.0]))


def test_small_gradients_among_their_like_stay():
    torch.testing.assert_close(gradient([1e-30, -3e-30]), torch.tensor([1e-30, -3e-30]), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays(bad):
    given = torch.tensor([1.0, bad, 1e-30])
    assert torch.equal(gradient(given.tolist()).isfinite(), given.isfinite())


def test_values_without_elements_or_gradient():
    empty = torch.zeros(2, 0, requires_grad=True)
    without_negligible_gradients(empty * 1).sum().backward()
    assert empty.grad.shape == (2, 0)
    assert not without_negligible_gradients(torch.ones(1)).requires_grad


@pytest.mark.parametrize("pieces", [{}, TINY], ids=["plain", "chunked"])
def test_a_latent_that_does_not_explain_y_has_no_denormal_gradient(pieces):
    # a weight of e^-92 is a denormal number; what a layer makes of the gradient has more of them
    hidden, weight, _, targets = (t.float() if t.is_floating_point() else t for t in inputs())
    before = hidden.requires_grad_()
    layer = nn.Linear(hidden.shape[-1], hidden.shape[-1])
    nll, _ = latent_token_stats(layer(before), weight, targets, need_jsd=False, **pieces)
    log_q = torch.zeros(nll.shape[1])
    log_q[1:] = -92
    ((nll.sum(-1) * log_q.softmax(-1)).sum()).backward()
    assert before.grad[:, 0].any()
    assert not before.grad[:, 1:].any()
    for parameter in layer.parameters():
        size = parameter.grad.abs()
        assert (size[size > 0] > torch.finfo(torch.float32).tiny).all()
