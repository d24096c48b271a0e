"""Latent moments, kept points, probes and clusters."""

import pytest
import torch
from processes import run_in_processes

from cvae_lightning.metrics.continuous import ContinuousMetrics, LatentMoments
from cvae_lightning.metrics.points import LatentPoints
from cvae_lightning.metrics.probe import Clusters, cluster, linear_probe_accuracy
from cvae_lightning.outputs import ContinuousOutputs, PairBatch


def parts(n=7, d=3):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=g) for _ in range(4)]


def test_moments_are_those_of_all_batches_together():
    metric = LatentMoments(3)
    for rows in (slice(0, 5), slice(5, 7)):
        metric.update(*(part[rows] for part in parts()))
    found = metric.compute()
    mean_q, logvar_q, mean_p, logvar_p = (part.double() for part in parts())
    torch.testing.assert_close(found["posterior_mean_variance"], mean_q.var(0, correction=0))
    torch.testing.assert_close(found["posterior_variance"], logvar_q.exp().mean(0))
    torch.testing.assert_close(found["router_mean"], mean_p.mean(0))
    expected = (logvar_p.exp() + mean_p.square()).mean(0) - mean_p.mean(0).square()
    torch.testing.assert_close(found["router_variance"], expected)
    figure, _ = metric.plot()
    assert "active" in figure.axes[0].get_title()


@pytest.mark.parametrize(("scale", "active"), [(0.0, 0), (0.05, 0), (0.2, 2)])
def test_active_units_move_by_more_than_delta(scale, active):
    metric = LatentMoments(2, delta=0.01)
    mean = scale * torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    metric.update(mean, torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2))
    assert int(metric.compute()["active_units"]) == active


def test_two_processes_equal_one(tmp_path):
    def work(rank):
        metric, points = LatentMoments(3), LatentPoints(3)
        rows = (slice(0, 5), slice(4, 7))[rank]  # record 4 on both
        mine = [part[rows] for part in parts()]
        metric.update(*mine)
        points.update(mine[0], mine[2], torch.arange(7)[rows], torch.arange(7)[rows])
        return {"sums": metric.compute()["router_mean"], **points.compute()}

    overlap = [torch.cat([part[:5], part[4:]]) for part in parts()]
    for result in run_in_processes(work, tmp_path):
        torch.testing.assert_close(result["sums"], overlap[2].double().mean(0))
        torch.testing.assert_close(result["posterior_mean"], parts()[0])
        torch.testing.assert_close(result["router_mean"], parts()[2])
        assert result["index"].tolist() == list(range(7))


def test_the_standard_error_of_two_processes_is_that_of_one(tmp_path):
    def error(rows):
        n, metrics = len(rows), ContinuousMetrics(2)
        masks = torch.ones(n, 3, dtype=torch.bool)
        outputs = ContinuousOutputs(
            *torch.zeros(4, n, 2),
            torch.ones(n, 4, 3),
            masks,
            log_evidence=-masks.sum(-1).float(),
            log_evidence_error=0.1 * torch.tensor(rows),
        )
        batch = PairBatch(masks.long(), masks, masks.long(), masks, torch.arange(n), torch.zeros(n).long(), (), ())
        metrics.update(outputs, batch, {"loss": torch.tensor(1.0)}, {})
        return metrics.compute_and_reset(None)["marginal_nll_standard_error"]

    rows = [1.0, 3.0, 2.0, 5.0, 4.0]
    expected = 0.1 * sum(row**2 for row in rows) ** 0.5 / (3 * len(rows))
    assert float(error(rows)) == pytest.approx(expected, rel=1e-5)
    for found in run_in_processes(lambda rank: error((rows[:2], rows[2:])[rank]), tmp_path):
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_points_are_bounded_reset_and_empty():
    points = LatentPoints(1, max_points=3)
    for start in (0, 2, 4):
        index = torch.arange(start, start + 2)
        points.update(index[:, None].float(), torch.zeros(2, 1), index, index)
    assert points.compute()["posterior_mean"].flatten().tolist() == [0.0, 1.0, 2.0]
    points.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert points.compute()["posterior_mean"].shape == (0, 1)
    with pytest.raises(ValueError, match="posterior_mean must have shape"):
        points.update(torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))


CORNERS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])


def four_clusters(noise, n=400):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (n,), generator=g)
    return CORNERS[labels] + noise * torch.randn(n, 2, generator=g), labels


def test_probe_on_perfect_absent_and_partial_information():
    points, labels = four_clusters(0.1)
    assert linear_probe_accuracy(points, labels) == 1.0
    assert linear_probe_accuracy(torch.randn(400, 2, generator=torch.Generator().manual_seed(1)), labels) < 0.35
    assert linear_probe_accuracy(points, labels, shuffle_seed=0) < 0.35
    for order in (labels.argsort(), labels.argsort().reshape(4, -1).T.flatten()):  # by strategy, or nearly in turn
        assert linear_probe_accuracy(points[order], labels[order]) == 1.0
    assert 0.4 < linear_probe_accuracy(points[:, :1], labels) < 0.6  # one coordinate tells two pairs apart
    unknown = labels.clone()
    unknown[::3] = -1
    assert linear_probe_accuracy(points, unknown) == 1.0


@pytest.mark.parametrize("labels", [torch.zeros(40).long(), -torch.ones(40).long()])
def test_probe_without_something_to_tell_is_nan(labels):
    value = linear_probe_accuracy(torch.randn(40, 2), labels)
    assert value != value


@pytest.mark.parametrize("method", ["kmeans", "gaussian_mixture"])
def test_clusters_find_the_corners_whatever_the_order_of_the_points(method):
    points, labels = four_clusters(0.15)
    found = cluster(points, 4, method)
    corner = torch.cdist(found.centroids, CORNERS).argmin(-1)
    torch.testing.assert_close(found.centroids, CORNERS[corner], atol=0.06, rtol=0)
    assert torch.equal(corner[found.assignment], labels)
    assert found.centroids[:, 0].tolist() == sorted(found.centroids[:, 0].tolist())
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    again = cluster(points[order], 4, method)
    torch.testing.assert_close(again.centroids, found.centroids, atol=1e-3, rtol=0)
    assert torch.equal(again.assignment, found.assignment[order])
    distances, separation = found.separation(points)
    assert float(distances[0, 3]) == pytest.approx(8**0.5, abs=0.1)
    assert separation == pytest.approx(2 / 0.15, rel=0.1)


def test_clusters_of_one_dimension_and_bad_numbers():
    found = cluster(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), 2)
    assert isinstance(found, Clusters)
    assert found.assignment.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="num_clusters"):
        cluster(torch.zeros(3, 1), 4)
    with pytest.raises(ValueError, match="clusterer"):
        cluster(torch.randn(8, 1), 2, "spectral")
