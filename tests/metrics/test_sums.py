import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvae_lightning.metrics import Evidence, LatentUsage, LossContribution, ReconstructionRatio, WeightedMeans


def test_reconstruction_ratio_weighs_tokens_and_not_batches():
    metric = ReconstructionRatio(c_base=2.0)
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]))
    metric.update(torch.tensor(9.0), torch.tensor(6))
    assert metric.compute().item() == pytest.approx(12 / 8 / 2)
    _, axes = metric.plot()
    assert axes.get_title() == "Reconstruction: rho = 0.750"
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="c_base must be a positive number"):
            ReconstructionRatio(wrong)


def test_sums_do_not_lose_small_addends():
    metric = ReconstructionRatio(c_base=1.0)
    metric.update(torch.tensor(1e8), torch.tensor(0))
    for _ in range(1000):
        metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.compute().item() == (1e8 + 1000) / 1000


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_sums_stay_exact_in_a_module_that_is_cast(cast):
    """As bf16-true and 16-true cast it; after a reset too."""
    means, contributions = WeightedMeans(["v"]), LossContribution(["a", "b"])
    module = torch.nn.ModuleList([means, contributions, torch.nn.Linear(1, 1)])
    means.update({"v": torch.tensor(1.0 + 2.0**-20)})
    cast(module)
    assert module[2].weight.dtype != torch.float32
    assert means.compute()["v"].item() == 1.0 + 2.0**-20  # no digit lost on the way
    for _ in range(2):
        module[0].reset()
        contributions.reset()
        for i in range(1000):
            means.update({"v": torch.tensor(float(i))}, weight=32)
            contributions.update({"a": torch.tensor(3.0), "b": torch.tensor(1.0)})
        assert means.compute()["v"].item() == 499.5
        assert contributions.compute()["a"].item() == 0.75
        assert {means.sums.dtype, contributions.totals.dtype} == {torch.float64}
    assert means.set_dtype(torch.float32).sums.dtype == torch.float32


def test_evidence_and_baseline_per_token():
    metric = Evidence()
    metric.update(torch.tensor([-1.0, -2.0]), None, torch.tensor([2, 3]))
    assert math.isnan(metric.compute()["baseline_nll"])
    metric.update(torch.tensor([-3.0]), torch.tensor([6.0]), torch.tensor([5]))
    result = metric.compute()
    assert result["marginal_nll"].item() == pytest.approx(6 / 10)
    assert result["baseline_nll"].item() == pytest.approx(6 / 5)
    assert result["ratio"].item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"tokens must have shape \[1\]"):
        metric.update(torch.tensor([-3.0]), None, torch.tensor([5, 5]))


@given(st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=5))
def test_contributions_sum_to_1(steps):
    metric, names = LossContribution(["a", "b", "c"]), ("a", "b", "c")
    for step in steps:
        metric.update(dict(zip(names, map(torch.tensor, step), strict=True)))
    totals = [sum(abs(torch.tensor(step[i]).double().item()) for step in steps) for i in range(3)]
    fractions = metric.compute()
    if sum(totals) == 0:
        assert all(math.isnan(value) for value in fractions.values())
    else:
        assert sum(value.item() for value in fractions.values()) == pytest.approx(1.0)
        assert fractions["b"].item() == pytest.approx(totals[1] / sum(totals))


def test_contributions_accept_missing_and_refuse_unknown_names():
    metric = LossContribution(["a", "b"])
    metric.update({"a": torch.tensor(-2.0, requires_grad=True)})
    metric.update({"a": 1.0, "b": 1.0})
    assert {name: value.item() for name, value in metric.compute().items()} == {"a": 0.75, "b": 0.25}
    with pytest.raises(ValueError, match=r"\['kl_prio'\]: add them to `names`"):
        metric.update({"kl_prio": 1.0})


def test_latent_usage_equals_the_oracle():
    generator = torch.Generator().manual_seed(0)
    posterior, router = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    metric = LatentUsage(4)
    metric.update(posterior[:2], router[:2])
    metric.update(posterior[2:], router[2:])
    usage = metric.compute()
    mean = oracles.mixture(posterior.exp().tolist())
    assert usage["aggregate_posterior"].tolist() == pytest.approx(mean)
    assert usage["aggregate_router"].tolist() == pytest.approx(oracles.mixture(router.exp().tolist()))
    assert usage["usage_perplexity"].item() == pytest.approx(math.exp(oracles.entropy(mean)))
    entropies = [oracles.entropy(row) for row in router.exp().tolist()]
    assert usage["router_entropy"].item() == pytest.approx(sum(entropies) / 9)
    _, axes = metric.plot()
    assert [bar.get_height() for bar in axes.patches[:4]] == pytest.approx(mean)


def test_collapsed_latents_are_dead():
    collapsed = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).log()
    metric = LatentUsage(3)
    metric.update(collapsed, collapsed)
    usage = metric.compute()
    assert usage["dead_latents"].item() == 2
    assert usage["usage_perplexity"].item() == 1.0
    assert usage["posterior_entropy"].item() == 0.0


def test_weighted_means_are_means_over_examples():
    metric = WeightedMeans(["per_example", "mean", "unseen"])
    metric.update({"per_example": torch.tensor([1.0, 2.0, 6.0]), "mean": 3.0}, weight=3)
    metric.update({"per_example": torch.tensor([7.0]), "mean": torch.tensor(7.0)}, weight=1)
    result = metric.compute()
    assert result["per_example"].item() == result["mean"].item() == 4.0
    assert math.isnan(result["unseen"])
    tokens = WeightedMeans(["value"])
    tokens.update({"value": torch.tensor([1.0, 5.0])}, weight=torch.tensor([3.0, 1.0]))
    tokens.update({"value": torch.tensor(8.0)}, weight=torch.tensor([2.0, 2.0]))
    assert tokens.compute()["value"].item() == pytest.approx((3 + 5 + 4 * 8) / 8)


def test_results_outlive_a_reset_until_the_next_update():
    metric = WeightedMeans(["a"])
    metric.update({"a": 2.0})
    metric.compute()
    metric.reset()
    assert metric.latest()["a"].item() == 2.0
    metric.update({"a": 6.0})
    assert metric.latest()["a"].item() == 6.0
