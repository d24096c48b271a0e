"""Clusters of solutions, and which of them are one way of solving."""

import numpy as np
import pytest
import torch
from planted import K, centred, planted, swapped_on_one_side, unlike_kinds
from sklearn.metrics import adjusted_mutual_info_score

from cvae_lightning.modules import solution_clusters
from cvae_lightning.modules.input_groups import SIDES, environments_of, sides_of
from cvae_lightning.modules.solution_clusters import cluster, combine, decide, fewer, latents_of, spread

pytestmark = pytest.mark.usefixtures("few_divisions")


def test_planted_clusters_are_found_and_only_behind_the_offsets():
    features, truth = planted()
    found = cluster({"hidden": centred(features)}, K, 9, seed=0)
    assert adjusted_mutual_info_score(truth, found.labels) > 0.95
    assert found.points.shape == (len(truth), 2)
    uncentred = cluster({"hidden": features.flatten(1)}, K, 9, seed=0)
    assert adjusted_mutual_info_score(truth, uncentred.labels) < 0.1


def test_what_tells_most_about_the_solution_wins():
    """Clusters that belong to inputs, even if they are the clearer ones, say nothing about y given x."""
    features, truth = planted()
    telling = centred(features)
    of_inputs = 50 * torch.nn.functional.one_hot(torch.arange(24) % K, 8).float().repeat_interleave(9, 0)
    of_inputs = of_inputs + 0.01 * torch.randn(of_inputs.shape)
    for views in ({"attention": telling, "hidden": of_inputs}, {"hidden": telling, "attention": of_inputs}):
        found = cluster(combine(views), K, 9, seed=0)
        assert adjusted_mutual_info_score(truth, found.labels) > 0.95


def test_noise_divides_evenly_but_not_in_every_view_alike():
    torch.manual_seed(3)
    views = {"attention": torch.randn(24 * 9, 8), "hidden": torch.randn(24 * 9, 8)}
    features, _ = planted()
    points = centred(features)
    ways = {"attention": points, "hidden": points.flip(-1)}
    told = [cluster(combine(found), K, 9, seed=0).information for found in (views, ways)]
    assert told[0] < 0.7 * told[1]
    assert cluster({"hidden": views["hidden"][:9]}, K, 9, seed=0).labels.shape == (9,)  # one input has no halves


def test_inputs_are_grouped_by_their_features_and_by_the_tokens_at_their_ends():
    kinds = np.arange(40) % 4
    inputs = 10 * torch.eye(4)[torch.from_numpy(kinds)] + 0.1 * torch.randn(40, 4)
    tokens = [[7, int(i % 2), *([5] * int(i % 3)), 9 + int(i == 0)] for i in range(40)]
    found = environments_of(inputs, tokens, seed=0)
    assert any(adjusted_mutual_info_score(groups, np.arange(40) % 2) == pytest.approx(1) for groups in found[1:])
    assert max(groups.max() for groups in found) < 20
    assert all(len(np.unique(groups)) > 1 for groups in found)  # the first token and the rare last one group nothing
    assert adjusted_mutual_info_score(found[0], kinds) > 0.6
    assert [groups.tolist() for groups in environments_of(inputs[:3], tokens[:3], 0)] == [[0, 1, 2]]


@pytest.mark.parametrize("count", [K, K + 1, 2 * K])
def test_more_latents_than_ways_share_them(count):
    """A way looks different from one input to another, but in each of them it is one."""
    _, truth = planted(inputs=64)
    looks = 5 * torch.eye(8)[:K] + torch.randn(64, K, 8)
    features = looks[torch.arange(64).repeat_interleave(9), truth][:, None]
    found = cluster({"hidden": centred(features)}, count, 9, seed=0)
    assert found.labels.unique().tolist() == list(range(K))
    assert found.ways.unique().tolist() == list(range(K))
    assert found.ways[:K].tolist() == list(range(K))
    assert len(found.ways) == count
    assert adjusted_mutual_info_score(truth, found.labels) > 0.95


@pytest.mark.parametrize(
    ("merged", "anew", "best", "ways", "searched"),
    [
        ({4: 0.96, 3: 0.951, 2: 0.949}, {}, 1.0, 3, [2, 3]),
        ({4: 0.899, 3: 1.0, 2: 1.0}, {4: 1.0}, 1.0, None, []),
        ({4: 0.949, 3: 0.901, 2: 0.5}, {3: 0.949}, 1.0, None, [3, 4]),
        ({4: 0.92, 3: 0.901, 2: 0.5}, {3: 0.951}, 1.0, 3, [3]),
        ({4: 0.92, 3: 0.901, 2: 0.5}, {4: 1.2}, 1.0, 4, [3, 4]),
        ({4: 1.04, 3: 0.985, 2: 0.9}, {}, 1.0, 4, [3, 4]),  # 5 % of the most that was told
        ({4: -1.0, 3: -1.04, 2: 0.2}, {}, -1.0, 2, [2]),  # of its size, where it is negative
        ({4: -1.11, 3: 1.0, 2: 1.0}, {}, -1.0, None, []),
    ],
)
@pytest.mark.parametrize("better", ["merged", "refined"])
def test_the_fewest_clusters_that_tell_about_as_much(monkeypatch, merged, anew, best, ways, searched, better):
    """Merged ones, or ones from scratch where those that are merged tell almost as much."""
    start = np.arange(40) % 5
    monkeypatch.setattr(solution_clusters, "refine", lambda folds, labels, count: np.flip(labels))
    divisions = {count: solution_clusters.merge(start, count, 10) for count in range(2, 5)}
    scratch = {count: np.roll(labels, 1) for count, labels in divisions.items()}

    def tells(folds, labels, count, group):
        number = int(labels.max()) + 1
        if np.array_equal(labels, scratch[number]):
            return anew.get(number, -9.0)
        return merged[number] - (np.array_equal(labels, divisions[number]) != (better == "merged"))

    def search(number):
        asked.append(number)
        return 9.0, "attention", scratch[number]

    asked = []
    monkeypatch.setattr(solution_clusters, "tells", tells)
    found = fewer([[None]], (best, "hidden", start), search, 5, 10)
    assert asked == searched
    assert (found is None) == (ways is None)
    if found is not None:
        told, view, labels = found
        assert labels.max() + 1 == ways
        assert told == anew.get(ways, merged[ways])
        assert view == ("attention" if ways in anew else "hidden")


def test_a_rare_way_is_found():
    torch.manual_seed(2)
    truth = torch.multinomial(torch.tensor([0.48, 0.48, 0.04]), 128 * 9, replacement=True)
    means = 3 * torch.linalg.qr(torch.randn(8, K))[0].T
    features = (means[truth] + 0.2 * torch.randn(128 * 9, 8)).unflatten(0, (128, 9)) + 30 * torch.randn(128, 1, 8)
    found = cluster({"hidden": centred(features.flatten(0, 1)[:, None])}, K, 9, seed=0)
    assert found.ways.tolist() == list(range(K))
    assert adjusted_mutual_info_score(truth, found.labels) > 0.95


def test_every_environment_is_asked():
    features, kind, _ = unlike_kinds()
    views, mixed = {"hidden": centred(features)}, np.arange(64) // 8
    told = [cluster(views, K, 9, 0, groups).information for groups in ([mixed], [mixed, kind], [kind, mixed])]
    assert told[0] > 0.9
    assert max(told[1:]) < 0.5


def test_sides_are_groups_put_together():
    groups = [np.arange(120) % 5, np.arange(120) % 40 == 0, np.arange(120) % 20]
    found = sides_of(groups, seed=0)
    assert all(0.25 <= side.mean() <= 0.75 for side in found)
    few, many = found[:-SIDES], found[-SIDES:]  # of the second there is none, of the third there are half a million
    assert len(few) == 2**4 - 1 - 5  # without nobody, and without one group alone
    assert {tuple(side[:5]) for side in few} == {tuple(side[5:10]) for side in few}
    assert len({tuple(side) for side in [*few, *(1 - side for side in few)]}) == 2 * len(few)
    assert all(np.array_equal(side, np.tile(side[:20], 6)) for side in many)
    assert not np.array_equal(many, sides_of(groups, seed=1)[-SIDES:])
    assert sides_of([], seed=0) == []


@pytest.mark.parametrize(
    ("told", "held", "expected"),
    [
        ([1.0, 0.951, 0.94], [0.8, 0.833, 0.9], 1),
        ([1.0, 0.951, 0.94], [0.8, 0.83, 0.9], 0),  # no more than the first, or about as much
        ([1.0, 0.99, 0.98], [0.8, 0.833, 0.9], 2),
        ([1.0, 0.99, 0.98], [0.8, 0.7, 0.6], 0),
        ([-1.0, -1.04, -1.06], [-0.8, -0.7, 0.5], 1),
        ([1.0], [0.8], 0),
    ],
)
def test_of_divisions_that_tell_about_as_much_one_that_holds_clearly_better(monkeypatch, told, held, expected):
    labels = [np.array([i]) for i in range(3)]
    judged = [(value, "hidden", division) for value, division in zip(told, labels, strict=False)]
    monkeypatch.setattr(solution_clusters, "holds", lambda halves, division, count, group: held[int(division[0])])
    points = {"hidden": np.zeros((4, 2))}
    assert decide(judged, points, [np.arange(4) % 2], 2, 1, False) is judged[expected]
    assert decide(judged, points, [], 2, 1, False) is judged[0]


def test_ways_that_are_swapped_on_one_side_are_put_right():
    points, groups, truth, swapped = swapped_on_one_side()
    for first, second in ((truth, swapped), (swapped, truth)):
        judged = [(0.6, "hidden", first), (0.59, "hidden", second)]
        _, _, chosen = decide(judged, {"hidden": points}, sides_of([groups], seed=0), 2, 8, False)
        assert np.array_equal(chosen, truth)


@pytest.mark.parametrize(
    ("sizes", "count", "ways"),
    [
        ([10, 70, 20], 3, [0, 1, 2]),
        ([10, 70, 20], 7, [0, 1, 2, 1, 1, 1, 2]),
        ([5, 5], 5, [0, 1, 0, 1, 0]),
        ([5, 0], 3, [0, 1, 0]),
    ],
)
def test_further_latents_are_for_the_ways_of_most_solutions(sizes, count, ways):
    assert latents_of(np.array(sizes), count).tolist() == ways


def test_clusters_are_those_of_the_seed():
    torch.manual_seed(0)
    points = torch.randn(40, 5)
    torch.manual_seed(1)
    found = cluster({"hidden": points}, K, 4, seed=1)
    torch.manual_seed(1)
    again = cluster({"hidden": points}, K, 4, seed=1)
    assert torch.equal(found.labels, again.labels)
    assert found.labels.dtype == torch.int64
    assert found.labels.unique().tolist() == list(range(K))


@pytest.mark.parametrize(("kinds", "count", "enough"), [(1, 2, False), (2, 3, False), (3, 3, True)])
def test_fewer_different_points_than_clusters_are_none(kinds, count, enough):
    torch.manual_seed(0)
    points = torch.randn(kinds, 6)[torch.arange(30) % kinds]
    assert (cluster({"hidden": points}, count, 3, seed=0) is not None) == enough


@pytest.mark.parametrize(
    ("solutions", "labels", "undecided"),
    [
        ("aabbccdd", [0, 0, 1, 1, 2, 2, 3, 3], {}),
        ("aabbccdd", [0, 0, 0, 0, 2, 2, 1, 1], {0: [0, 3]}),
        ("abababcc", [2, 2, 2, 2, 2, 2, 0, 0], {2: [1, 2, 3]}),
        ("aabbccde", [0, 0, 0, 0, 2, 2, 1, 3], {0: [0, 1, 3]}),  # d and e may be accidents
        ("aabccddd", [0, 0, 0, 1, 1, 2, 2, 2], {}),  # b may be one
        ("aabbccdd", [0, 0, 0, 0, 0, 0, 0, 0], {0: [0, 1, 2, 3]}),
        ("aabbccddee", [0, 0, 0, 0, 1, 1, 2, 2, 2, 2], {}),  # more ways than clusters
        ("abcdefgh", [0, 0, 0, 0, 1, 1, 1, 2], {}),  # no solution twice
    ],
)
def test_ways_that_share_a_cluster_are_left_undecided_while_another_has_none(solutions, labels, undecided):
    shares = torch.nn.functional.one_hot(torch.tensor(labels), 4).float()
    found = spread(shares, list(solutions), len(labels))
    assert shares.max(-1).values.tolist() == [1.0] * len(labels)
    for row, label in zip(found, labels, strict=True):
        among = undecided.get(label, [label])
        assert row[among].tolist() == pytest.approx([1 / len(among)] * len(among))
        assert float(row.sum()) == pytest.approx(1)


def test_inputs_are_left_undecided_one_by_one():
    decided, shared = [0, 0, 1, 1], [2, 2, 2, 2]
    shares = torch.nn.functional.one_hot(torch.tensor(decided + shared), 3).float()
    found = spread(shares, [*"aabb", *"aabb"], 4)
    assert found[:4].argmax(-1).tolist() == decided
    assert found[:4].max(-1).values.tolist() == [1.0] * 4
    torch.testing.assert_close(found[4:], torch.full((4, 3), 1 / 3))
