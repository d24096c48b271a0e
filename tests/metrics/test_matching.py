import math

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from cvae_lightning.metrics.matching import best_matching, clustering_scores

TABLES = st.integers(1, 4).flatmap(
    lambda columns: st.lists(st.lists(st.integers(0, 9), min_size=columns, max_size=columns), min_size=1, max_size=5)
)


def labels(table):
    pairs = [(k, s) for k, row in enumerate(table) for s, count in enumerate(row) for _ in range(count)]
    return [k for k, _ in pairs], [s for _, s in pairs]


@given(TABLES)
def test_every_score_equals_sklearn(table):
    latents, strategies = labels(table)
    scores = clustering_scores(np.array(table))
    if not latents:
        assert all(math.isnan(value) for value in scores.values())
        return
    expected = {
        "ami": sklearn_metrics.adjusted_mutual_info_score(strategies, latents),
        "nmi": sklearn_metrics.normalized_mutual_info_score(strategies, latents),
        "homogeneity": sklearn_metrics.homogeneity_score(strategies, latents),
        "completeness": sklearn_metrics.completeness_score(strategies, latents),
        "v_measure": sklearn_metrics.v_measure_score(strategies, latents),
        "purity": sum(max(row) for row in table) / len(latents),
        "one_to_one": oracles.best_one_to_one(table) / len(latents),
    }
    assert scores == pytest.approx(expected, abs=1e-9)


@given(TABLES, st.randoms(use_true_random=False))
def test_renaming_latents_and_strategies_changes_nothing(table, random):
    rows = random.sample(table, len(table))
    order = random.sample(range(len(table[0])), len(table[0]))
    renamed = [[row[column] for column in order] for row in rows]
    first, second = clustering_scores(np.array(table)), clustering_scores(np.array(renamed))
    assert second == pytest.approx(first, abs=1e-9, nan_ok=True)


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5))
def test_best_matching_equals_brute_force(matrix):
    rows, columns = best_matching(np.array(matrix))
    assert len(set(rows)) == len(set(columns)) == min(len(matrix), 3)
    assert np.array(matrix)[rows, columns].sum() == pytest.approx(oracles.best_one_to_one(matrix))


def test_known_tables():
    perfect = clustering_scores(np.diag([3, 5, 2])[[2, 0, 1]])
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0))
    collapsed = clustering_scores(np.array([[5, 5], [0, 0]]))
    assert (collapsed["one_to_one"], collapsed["ami"], collapsed["nmi"], collapsed["homogeneity"]) == (0.5, 0, 0, 0)
    assert collapsed["completeness"] == 1.0
    split = clustering_scores(np.array([[5, 0], [5, 0], [0, 5], [0, 5]]))  # two latents for every strategy
    assert (split["one_to_one"], split["purity"]) == (0.5, 1.0)
    assert (split["homogeneity"], split["completeness"]) == pytest.approx((1.0, 0.5))
