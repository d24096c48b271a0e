import math
import random

import oracles
import pytest
import torch

from cvae_lightning.metrics import ControlledAlignment, LocalStrategyCoverage


@pytest.mark.parametrize(("num_latents", "num_strategies"), [(3, 3), (2, 4), (4, 2)])
def test_matrix_and_matching_equal_loops(num_latents, num_strategies):
    numbers = random.Random(0)
    metric = ControlledAlignment(num_latents, num_strategies)
    shares = [[[] for _ in range(num_strategies)] for _ in range(num_latents)]
    for _ in range(5):
        latent = [numbers.randrange(num_latents) for _ in range(7)]
        follows = [[numbers.random() < 0.4 for _ in range(num_strategies)] for _ in latent]
        metric.update(torch.tensor(latent), torch.tensor(follows))
        for k, row in zip(latent, follows, strict=True):
            for s, member in enumerate(row):
                shares[k][s].append(1 / sum(row) if member else 0.0)
    expected = [[sum(cell) / len(cell) for cell in row] for row in shares]
    result = metric.compute()
    torch.testing.assert_close(result["matrix"], torch.tensor(expected, dtype=torch.float64))
    best = oracles.best_one_to_one(expected) / min(num_latents, num_strategies)
    assert result["one_to_one"].item() == pytest.approx(best)


def test_degenerate_generations():
    metric = ControlledAlignment(2, 2)
    metric.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2).bool())
    assert math.isnan(metric.compute()["one_to_one"])
    metric.update(torch.tensor([0, 0]), torch.tensor([[True, False], [False, False]]))  # the second follows nothing
    assert metric.compute()["matrix"].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    _, axes = metric.plot()
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.00", "0.00", "0.00"]


def maximum_matching(edges):
    """Size of the largest matching, by augmenting paths."""
    partner = {}

    def augment(row, visited):
        for column, connected in enumerate(edges[row]):
            if connected and column not in visited:
                visited.add(column)
                if column not in partner or augment(partner[column], visited):
                    partner[column] = row
                    return True
        return False

    return sum(augment(row, set()) for row in range(len(edges)))


def test_coverage_equals_an_augmenting_path_matching():
    numbers = random.Random(1)
    metric, coverages = LocalStrategyCoverage(), []
    for _ in range(40):
        latents, strategies = numbers.randint(1, 5), numbers.randint(1, 5)
        groups = [numbers.choice([3, 7, 20]) for _ in range(strategies)]
        follows = [[numbers.random() < 0.4 for _ in groups] for _ in range(latents)]
        names = sorted(set(groups))
        edges = [[any(f and g == name for f, g in zip(row, groups, strict=True)) for name in names] for row in follows]
        coverages.append(maximum_matching(edges) / len(names))
        metric.update(torch.tensor(follows), torch.tensor(groups))
    result = metric.compute()
    assert result["mean"].item() == pytest.approx(sum(coverages) / 40)
    assert result["full_rate"].item() == pytest.approx(coverages.count(1.0) / 40)
    assert result["num_inputs"].item() == 40
    _, axes = metric.plot()
    assert axes.get_title() == "Strategies reached per input (n = 40)"


def test_strategies_with_equal_traces_count_once():
    follows = torch.tensor([[True, True, False], [False, False, True]])
    alike, distinct = LocalStrategyCoverage(), LocalStrategyCoverage()
    alike.update(follows, torch.tensor([0, 0, 1]))
    distinct.update(follows, torch.tensor([0, 1, 2]))
    assert alike.compute()["full_rate"].item() == 1.0
    assert distinct.compute()["mean"].item() == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"groups must have shape \[3\]"):
        alike.update(follows, torch.tensor([0, 0]))
