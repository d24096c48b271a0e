"""Every loss on continuous outputs against a slow loop."""

import math

import pytest
import torch
from processes import run_in_processes

from cvae_lightning import losses as L
from cvae_lightning.outputs import ContinuousOutputs

B, S, T, D = 3, 4, 5, 2


def outputs(seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    values = {
        "prior_mean": normal(B, D),
        "prior_logvar": 0.3 * normal(B, D),
        "posterior_mean": normal(B, D),
        "posterior_logvar": -1 + 0.3 * normal(B, D),
        "token_nll": torch.rand(B, S, T, generator=g, dtype=torch.float64) * mask[:, None],
        "y_mask": mask,
        "c_base": torch.tensor(0.25, dtype=torch.float64),
        "baseline_nll": torch.rand(B, T, generator=g, dtype=torch.float64) * mask,
        "inter_latent_jsd": torch.rand(B, T, generator=g, dtype=torch.float64) * mask,
        "temperature": torch.tensor(0.3, dtype=torch.float64),
        "latents": normal(B, S, D),
    }
    return ContinuousOutputs(**(values | changes))


def loop(function):
    o = outputs()
    return torch.tensor([function(o, i, int(o.y_mask[i].sum())) for i in range(B)], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def kl_of(o, i, dims=range(D)):
    total = 0.0
    for d in dims:
        mq, lq = float(o.posterior_mean[i, d]), float(o.posterior_logvar[i, d])
        mp, lp = float(o.prior_mean[i, d]), float(o.prior_logvar[i, d])
        total += 0.5 * (lp - lq - 1 + (math.exp(lq) + (mq - mp) ** 2) / math.exp(lp))
    return total


def test_reconstructions_average_the_samples():
    mean = loop(lambda o, i, n: sum(float(o.token_nll[i, s, t]) / n / S for s in range(S) for t in range(n)))
    close(L.ReconstructionLoss()(outputs()), mean)
    close(L.BaselineNormalizedReconstructionLoss()(outputs()), mean / 0.25)

    def weighted(o, i, n):
        w = o.baseline_nll[i, :n].tolist()
        return sum(w[t] * float(o.token_nll[i, s, t]) for s in range(S) for t in range(n)) / sum(w) / S

    close(L.TokenWeightedReconstructionLoss()(outputs()), loop(weighted))


def test_weighted_samples_count_by_their_weight():
    log_weights = torch.randn(B, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = [[math.exp(v) for v in row] for row in log_weights.tolist()]
    o = outputs(sample_log_weights=log_weights)
    expected = loop(lambda o, i, n: sum(w[i][s] * float(o.token_nll[i, s, :n].sum()) / n for s in range(S)) / sum(w[i]))
    close(L.ReconstructionLoss()(o), expected)
    close(L.FreeEnergyLoss()(o), loop(lambda o, i, n: -0.3 * math.log(sum(w[i])) / (n * 0.25)))

    def cross_entropy(o, i, n):
        total = 0.0
        for s in range(S):
            for d in range(D):
                m, v = float(o.posterior_mean[i, d]), float(o.posterior_logvar[i, d])
                z = float(o.latents[i, s, d])
                total += w[i][s] / sum(w[i]) * 0.5 * (math.log(2 * math.pi) + v + (z - m) ** 2 / math.exp(v))
        return total

    close(L.PosteriorDistillationLoss()(o), loop(cross_entropy))
    assert outputs(sample_log_weights=log_weights, num_posterior_samples=1).posterior_sequence_nll.shape == (B, 1)
    assert outputs().posterior_sequence_nll.shape == (B, S)


def test_a_detached_posterior_trains_the_router_alone():
    names = ("posterior_mean", "posterior_logvar", "prior_mean", "prior_logvar")
    leaves = {name: getattr(outputs(), name).clone().requires_grad_() for name in names}
    kl = L.PriorKLLoss(detach_posterior=True)(outputs(**leaves))
    close(kl, L.PriorKLLoss()(outputs()).double())
    kl.sum().backward()
    assert [name for name in names if leaves[name].grad is not None] == ["prior_mean", "prior_logvar"]


def test_prior_kl_and_its_free_nats_and_budget():
    kl = loop(lambda o, i, n: kl_of(o, i))
    close(L.PriorKLLoss()(outputs()), kl)
    floor = float(kl.median())
    close(L.PriorKLLoss(free_nats=floor)(outputs()), kl.clamp_min(floor))
    close(L.PriorKLLoss(target_nats=1.0)(outputs()), (kl.mean() - 1).abs())
    per_dimension = [sum(kl_of(outputs(), i, [d]) for i in range(B)) / B for d in range(D)]
    between = sum(per_dimension) / D
    expected = sum(max(value, between) for value in per_dimension)
    assert float(L.PriorKLLoss(free_nats=between, per_dimension=True)(outputs())) == pytest.approx(expected, rel=1e-6)
    assert float(L.PriorKLLoss(target_nats=1.0).diagnostics(outputs())["prior_kl"]) == pytest.approx(float(kl.mean()))


def test_free_energy():
    expected = loop(
        lambda o, i, n: (sum(float(o.token_nll[i, s].sum()) for s in range(S)) / S + 0.3 * kl_of(o, i)) / (n * 0.25)
    )
    close(L.FreeEnergyLoss()(outputs()), expected)


def test_entropy_variance_and_divergence():
    close(
        L.PosteriorEntropyLoss()(outputs()),
        loop(
            lambda o, i, n: sum(0.5 * (1 + math.log(2 * math.pi) + float(o.posterior_logvar[i, d])) for d in range(D))
        ),
    )
    variance = loop(lambda o, i, n: sum(math.exp(float(o.posterior_logvar[i, d])) for d in range(D)) / D)
    close(L.PosteriorVarianceLoss()(outputs()), variance)
    diagnosed = L.PosteriorVarianceLoss().diagnostics(outputs())["posterior_std"]
    assert float(diagnosed) == pytest.approx(math.sqrt(float(variance.mean())))

    def jsd(o, i, n):
        w = o.baseline_nll[i, :n].tolist()
        return -sum(w[t] * float(o.inter_latent_jsd[i, t]) for t in range(n)) / sum(w)

    close(L.InterLatentDivergenceLoss()(outputs()), loop(jsd))


@pytest.mark.parametrize(
    ("loss", "name"), [(L.RouterMarginalKLLoss, "prior"), (L.AggregatePosteriorBalanceLoss, "posterior")]
)
def test_marginals_match_moments(loss, name):
    o = outputs()
    mean, variance = getattr(o, f"{name}_mean"), getattr(o, f"{name}_logvar").exp()
    total = 0.0
    for d in range(D):
        m = sum(mean[:, d].tolist()) / B
        v = sum((variance[:, d] + mean[:, d] ** 2).tolist()) / B - m * m
        total += 0.5 * (v + m * m - 1 - math.log(v))
    assert float(loss()(o)) == pytest.approx(total, rel=1e-6)


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="counts latents"):
        L.RouterSupportLoss()(outputs())
    with pytest.raises(ValueError, match="posterior to importance"):
        L.PosteriorDistillationLoss()(outputs())
    with pytest.raises(ValueError, match=r"N\(0, I\)"):
        L.RouterMarginalKLLoss(prior=[0.5, 0.5])(outputs())
    with pytest.raises(ValueError, match="target_nats"):
        L.PriorKLLoss(target_nats=1.0, free_nats=0.5)
    with pytest.raises(ValueError, match="c_base"):
        L.FreeEnergyLoss()(outputs(c_base=None))


SIZES = (2, 1)  # uneven shards


def test_batch_statistics_of_two_uneven_processes_equal_one(tmp_path):
    chosen = [
        L.RouterMarginalKLLoss(),
        L.AggregatePosteriorBalanceLoss(),
        L.PriorKLLoss(target_nats=5.0),
        L.PriorKLLoss(free_nats=0.1, per_dimension=True),
    ]
    names = ("prior_mean", "prior_logvar", "posterior_mean", "posterior_logvar")

    def value_and_gradients(rank):
        o = outputs()
        rows = slice(None) if rank is None else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
        parts = {name: getattr(o, name)[rows].clone().requires_grad_() for name in names}
        values = torch.stack([loss(outputs(**parts)) for loss in chosen])
        (values * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        return [values.detach(), *(part.grad for part in parts.values())]

    expected = value_and_gradients(None)
    for rank, found in enumerate(run_in_processes(value_and_gradients, tmp_path)):
        rows = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        for actual, whole in zip(found[1:], expected[1:], strict=True):  # DDP takes the mean over processes
            torch.testing.assert_close(actual / len(SIZES), whole[rows], atol=1e-5, rtol=1e-5)
