import math

import pytest
import torch

from cvae_lightning.metrics import StrategyAlignment


def test_counts_and_scores_over_several_updates():
    metric = StrategyAlignment(num_latents=3, num_strategies=2)
    metric.update(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 1, 0, -1]))
    metric.update(torch.tensor([1, 0]), torch.tensor([0, 0]))
    scores = metric.compute()
    assert metric.contingency.tolist() == [[1, 2], [2, 0], [0, 0]]
    assert metric.contingency.dtype == torch.int64
    assert scores["one_to_one"].item() == pytest.approx(4 / 5)
    assert scores["purity"].item() == pytest.approx(4 / 5)
    assert (scores["num_labelled"].item(), scores["num_unlabelled"].item()) == (5, 1)


@pytest.mark.parametrize(
    ("latents", "num_latents", "purity"),
    [
        ([2, 2, 0, 0, 1, 1], 3, 1.0),  # perfect, under other names
        ([1, 1, 1, 1, 1, 1], 3, 1 / 3),  # one latent for all
        ([0, 1, 2, 3, 4, 5], 6, 1.0),  # two latents for every strategy
        ([0, 1, 0, 1, 0, 1], 2, 1 / 3),  # independent of the strategy: chance
        ([0, 0, 0, 0, 1, 1], 2, 2 / 3),  # two strategies share a latent
    ],
)
def test_purity_is_the_share_of_each_latents_commonest_strategy(latents, num_latents, purity):
    metric = StrategyAlignment(num_latents, 3)
    metric.update(torch.tensor(latents), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert metric.compute()["purity"].item() == pytest.approx(purity)


def test_without_labels_every_score_is_nan():
    metric = StrategyAlignment(2, 2)
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([-1, -1, -1]))
    metric.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    scores = metric.compute()
    assert (scores.pop("num_labelled").item(), scores.pop("num_unlabelled").item()) == (0, 3)
    assert all(math.isnan(value) for value in scores.values())
    metric.plot()


def test_contingency_and_figure_outlive_a_reset():
    metric = StrategyAlignment(2, 2)
    metric.update(torch.tensor([0, 1]), torch.tensor([1, 0]))
    metric.compute()
    metric.reset()
    assert metric.contingency.tolist() == [[0, 1], [1, 0]]
    _, axes = metric.plot(strategy_names=["bubble", "merge"], latent_names=["first", "second"])
    assert [text.get_text() for text in axes.texts] == ["0.00\n(0)", "1.00\n(1)", "1.00\n(1)", "0.00\n(0)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bubble", "merge"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    metric.update(torch.tensor([0]), torch.tensor([0]))
    assert metric.contingency.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("latents", "strategies", "message"),
    [
        ([0, 2], [0, 0], r"latents must lie in 0\.\.1, got 0\.\.2"),
        ([0, 1], [0, 3], r"strategies must lie in -1\.\.2, got 0\.\.3"),
        ([0, 1], [0, -2], r"strategies must lie in -1\.\.2"),
        ([0, 1], [0], r"strategies must have shape \[2\]"),
    ],
)
def test_labels_out_of_range_are_refused(latents, strategies, message):
    metric = StrategyAlignment(2, 3)
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(latents), torch.tensor(strategies))
    with pytest.raises(ValueError, match="num_latents must be at least 1"):
        StrategyAlignment(0, 3)
