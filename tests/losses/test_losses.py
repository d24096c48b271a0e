"""Every loss against a slow loop over examples, latents and tokens."""

import math

import pytest
import torch

from cvae_lightning import losses as L
from cvae_lightning.outputs import DiscreteOutputs

B, K, T = 3, 4, 5


def outputs(seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    values = {
        "router_log_probs": torch.randn(B, K, generator=g, dtype=torch.float64).log_softmax(-1),
        "posterior_log_probs": (2 * torch.randn(B, K, generator=g, dtype=torch.float64)).log_softmax(-1),
        "amortized_log_probs": torch.randn(B, K, generator=g, dtype=torch.float64).log_softmax(-1),
        "token_nll": torch.rand(B, K, T, generator=g, dtype=torch.float64) * mask[:, None],
        "y_mask": mask,
        "temperature": torch.tensor(0.3, dtype=torch.float64),
        "c_base": torch.tensor(0.25, dtype=torch.float64),
        "baseline_nll": torch.rand(B, T, generator=g, dtype=torch.float64) * mask,
        "inter_latent_jsd": torch.rand(B, T, generator=g, dtype=torch.float64) * mask,
    }
    return DiscreteOutputs(**(values | changes))


def loop(o, per_example):
    return torch.tensor([per_example(i, int(o.y_mask[i].sum())) for i in range(len(o.y_mask))], dtype=torch.float64)


def q(o, i):
    return o.posterior_log_probs[i].exp().tolist()


def p(o, i):
    return o.router_log_probs[i].exp().tolist()


def test_reconstruction_and_its_normalised_form():
    o = outputs()
    expected = loop(
        o, lambda i, n: sum(q(o, i)[k] * o.token_nll[i, k, :n].tolist()[t] / n for k in range(K) for t in range(n))
    )
    torch.testing.assert_close(L.ReconstructionLoss()(o).double(), expected, rtol=1e-5, atol=1e-6)
    normalised = L.BaselineNormalizedReconstructionLoss()(o).double()
    torch.testing.assert_close(normalised, expected / 0.25, rtol=1e-5, atol=1e-6)


def test_token_weighted_reconstruction_and_its_fallback():
    o = outputs()
    light = o.baseline_nll.clone()
    light[1] = 1e-6  # total weight below the threshold: uniform mean
    o = outputs(baseline_nll=light)

    def one(i, n):
        w = o.baseline_nll[i, :n].tolist()
        w = w if sum(w) > 1e-4 else [1.0] * n
        return sum(q(o, i)[k] * sum(w[t] * float(o.token_nll[i, k, t]) for t in range(n)) / sum(w) for k in range(K))

    torch.testing.assert_close(L.TokenWeightedReconstructionLoss()(o).double(), loop(o, one), rtol=1e-5, atol=1e-6)


def test_token_weights_get_no_gradient():
    nll = outputs().baseline_nll.clone().requires_grad_()
    source = outputs().token_nll.clone().requires_grad_()
    L.TokenWeightedReconstructionLoss()(outputs(baseline_nll=nll, token_nll=source)).sum().backward()
    assert nll.grad is None
    assert source.grad.abs().sum() > 0


def test_a_detached_posterior_trains_the_router_alone():
    values = outputs()
    q, p = (getattr(values, name).clone().requires_grad_() for name in ("posterior_log_probs", "router_log_probs"))
    o = outputs(posterior_log_probs=q, router_log_probs=p)
    kl = L.PriorKLLoss(detach_posterior=True)(o)
    torch.testing.assert_close(kl, L.PriorKLLoss()(values))
    kl.sum().backward()
    assert q.grad is None
    torch.testing.assert_close(p.grad.double(), -q.detach().exp(), rtol=1e-5, atol=1e-6)


def test_prior_kl_entropy_distillation():
    o = outputs()
    kl = loop(o, lambda i, n: sum(a * math.log(a / b) for a, b in zip(q(o, i), p(o, i), strict=True)))
    torch.testing.assert_close(L.PriorKLLoss()(o).double(), kl, rtol=1e-5, atol=1e-6)
    floor = float(kl.median())
    torch.testing.assert_close(L.PriorKLLoss(free_nats=floor)(o).double(), kl.clamp_min(floor), rtol=1e-5, atol=1e-6)
    entropy = loop(o, lambda i, n: -sum(a * math.log(a) for a in q(o, i)))
    torch.testing.assert_close(L.PosteriorEntropyLoss()(o).double(), entropy, rtol=1e-5, atol=1e-6)
    cross = loop(o, lambda i, n: -sum(a * float(o.amortized_log_probs[i, k]) for k, a in enumerate(q(o, i))))
    torch.testing.assert_close(L.PosteriorDistillationLoss()(o).double(), cross, rtol=1e-5, atol=1e-6)


def test_free_energy_is_the_log_sum_at_the_exact_posterior_and_above_it_elsewhere():
    o = outputs()

    def value(i, n):
        terms = [p(o, i)[k] * math.exp(-float(o.token_nll[i, k].sum()) / 0.3) for k in range(K)]
        return -0.3 * math.log(sum(terms)) / (n * 0.25)

    best = loop(o, value)
    log_q = (o.router_log_probs - o.token_nll.sum(-1) / 0.3).log_softmax(-1)
    at_optimum = L.FreeEnergyLoss()(outputs(posterior_log_probs=log_q)).double()
    torch.testing.assert_close(at_optimum, best, rtol=1e-5, atol=1e-6)
    assert (L.FreeEnergyLoss()(o).double() > best).all()


def test_free_energy_has_no_gradient_through_the_exact_posterior():
    """The envelope theorem: at q* the gradient is that of the objective with q held fixed."""
    grads = []
    for detach in (False, True):
        nll = outputs().token_nll.clone().requires_grad_()
        log_q = (outputs().router_log_probs - nll.sum(-1) / 0.3).log_softmax(-1)
        o = outputs(token_nll=nll, posterior_log_probs=log_q.detach() if detach else log_q)
        L.FreeEnergyLoss()(o).sum().backward()
        grads.append(nll.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def test_inter_latent_divergence():
    o = outputs()

    def one(i, n):
        w = o.baseline_nll[i, :n].tolist()
        return -sum(w[t] * float(o.inter_latent_jsd[i, t]) for t in range(n)) / sum(w)

    loss = L.InterLatentDivergenceLoss()
    torch.testing.assert_close(loss(o).double(), loop(o, one), rtol=1e-5, atol=1e-6)
    key, value = next(iter(loss.diagnostics(o).items()))
    assert key == "inter_latent_jsd/weighted_mean"
    assert float(value) == pytest.approx(-float(loop(o, one).mean()), rel=1e-5)


def test_router_support():
    o = outputs()
    for floor in (None, 0.3):
        f = floor or 0.5 / K
        expected = loop(o, lambda i, n, f=f: sum(max(0.0, 1 - a / f) for a in p(o, i)) / K)
        torch.testing.assert_close(L.RouterSupportLoss(floor=floor)(o).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prior", [None, [0.5, 0.25, 0.15, 0.1]])
@pytest.mark.parametrize(
    ("loss", "field"),
    [(L.RouterMarginalKLLoss, "router_log_probs"), (L.AggregatePosteriorBalanceLoss, "posterior_log_probs")],
)
def test_marginals(loss, field, prior):
    o = outputs()
    mean = [sum(math.exp(float(getattr(o, field)[i, k])) for i in range(B)) / B for k in range(K)]
    expected = sum(m * math.log(m / r) for m, r in zip(mean, prior or [1 / K] * K, strict=True))
    assert float(loss(prior=prior)(o)) == pytest.approx(expected, rel=1e-5)


def test_bad_arguments_and_missing_fields():
    with pytest.raises(ValueError, match="free_nats"):
        L.PriorKLLoss(free_nats=-1)
    with pytest.raises(ValueError, match="floor"):
        L.RouterSupportLoss(floor=1.5)
    with pytest.raises(ValueError, match="prior must hold 4"):
        L.RouterMarginalKLLoss(prior=[0.5, 0.5])(outputs())
    shares = [0.4, 0.3, 0.2, 0.1]
    seeded = outputs(seed_shares=torch.tensor(shares))
    for loss in (L.RouterMarginalKLLoss, L.AggregatePosteriorBalanceLoss):
        assert float(loss(prior="seeds")(seeded)) == pytest.approx(float(loss(prior=shares)(outputs())), rel=1e-6)
        with pytest.raises(ValueError, match=r"model\.seeding is null"):
            loss(prior="seeds")(outputs())
    with pytest.raises(ValueError, match=r"baseline_nll.*baseline\.json"):
        L.TokenWeightedReconstructionLoss()(outputs(baseline_nll=None))
    with pytest.raises(ValueError, match="c_base"):
        L.FreeEnergyLoss()(outputs(c_base=None))


@pytest.mark.parametrize("loss", [L.RouterMarginalKLLoss, L.AggregatePosteriorBalanceLoss])
def test_latents_of_one_way_have_equal_parts_whatever_its_share(loss):
    o, term = outputs(), loss(prior="ways")
    log_probs = o.router_log_probs if loss is L.RouterMarginalKLLoss else o.posterior_log_probs
    m = log_probs.exp().mean(0)
    expected = sum(p * (p / ((m[0] + m[2]) / 2)).log() for p in (m[0], m[2]))
    assert float(term(outputs(seed_ways=torch.tensor([5, 1, 5, 0])))) == pytest.approx(float(expected), rel=1e-4)
    for every in (outputs(), outputs(seed_ways=torch.zeros(4, dtype=torch.int64))):  # no seeds: all are of one way
        assert float(term(every)) == pytest.approx(float(loss()(o)), rel=1e-5)


def test_where_every_way_has_one_latent_nothing_is_pulled():
    """Exactly, so that a run with the term is bit for bit one without it."""
    log_probs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).mul(9).log_softmax(-1).requires_grad_()
    term = L.AggregatePosteriorBalanceLoss(prior="ways")(
        outputs(posterior_log_probs=log_probs, seed_ways=torch.arange(4))
    )
    (gradient,) = torch.autograd.grad(term, log_probs)
    assert term.item() == 0.0
    assert not gradient.any()


class Unnamed(L.PriorKLLoss):
    """Hands on what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class MoreUnnamed(Unnamed):
    """Has an argument of its own."""

    def __init__(self, scale, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale


def test_arguments_that_are_handed_on_are_remembered_by_name():
    for loss in (Unnamed(0.3), Unnamed(weight=0.3)):
        assert loss.spec()["init_args"] == {"weight": 0.3}
    more = MoreUnnamed(2.0, 0.3, free_nats=0.1)
    assert more.spec()["init_args"] == {"scale": 2.0, "weight": 0.3, "free_nats": 0.1}
    assert MoreUnnamed(**more.spec()["init_args"]).weight == 0.3


def test_a_loss_remembers_how_it_was_built():
    assert L.PriorKLLoss(0.3, free_nats=0.1).spec() == {
        "class_path": "cvae_lightning.losses.divergence.PriorKLLoss",
        "init_args": {
            "weight": 0.3,
            "free_nats": 0.1,
            "target_nats": None,
            "per_dimension": False,
            "detach_posterior": False,
        },
    }
