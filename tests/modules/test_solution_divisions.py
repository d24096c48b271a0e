"""What a division of solutions tells, and its code length."""

import math

import numpy as np
import pytest
import torch
from planted import K, centred, planted, swapped_on_one_side, swapping, unlike_kinds
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_mutual_info_score

from cvae_lightning.modules.solution_divisions import (
    Folds,
    code_length,
    holds,
    in_all_views,
    information,
    merge,
    refine,
    repeats,
    tells,
)


def test_information_is_the_mean_entropy_of_the_labels_of_an_input():
    _, truth = planted()
    shares = torch.nn.functional.one_hot(truth, K).double().unflatten(0, (24, 9)).mean(1)
    entropy = sum(-float(p) * math.log(float(p)) for row in shares for p in row if p > 0) / 24
    assert information(truth.numpy(), 9) == pytest.approx(entropy)
    assert information(np.arange(24).repeat(9) % K, 9) == pytest.approx(0)


def test_labels_that_swap_with_the_input_do_not_hold_for_unlike_inputs():
    """They divide every input as evenly and can be read off the points, if inputs of their kind are known."""
    points, kind, truth, swapped = swapping()
    assert information(swapped, 9) == pytest.approx(information(truth, 9))
    known, unlike = (Folds(points, np.repeat(groups, 9)) for groups in (np.arange(64) % 2, kind))
    assert code_length(known, swapped, K) < 0.1
    assert code_length(unlike, swapped, K) < code_length(unlike, truth, K) + 1e-3  # the direction is the same one
    points[np.repeat(kind, 9) == 1] *= -1  # and here it is not
    turned = Folds(points, np.repeat(kind, 9))
    assert code_length(turned, swapped, K) > 1


def test_a_fold_is_judged_by_the_others_alone():
    """Against a discriminant fitted by hand; its own labels change nothing."""
    features, truth = planted()
    points = centred(features).double().numpy()
    fold, labels = np.repeat(np.arange(24) % 3, 9), truth.numpy()
    out = fold == 1
    found = Folds(points, fold).log_probs(labels, K)
    x, z = points[~out], labels[~out]
    means = np.stack([x[z == k].mean(0) for k in range(K)])
    scatter = (x - means[z]).T @ (x - means[z])
    covariance = (0.95 * scatter + 0.05 * np.diag(np.diag(scatter)) + 1e-9 * np.trace(scatter) * np.eye(8)) / len(x)
    shares = np.bincount(z) / len(z)
    logits = np.stack(
        [multivariate_normal.logpdf(points[out], means[k], covariance) + np.log(shares[k]) for k in range(K)], -1
    )
    logits -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logits.max(
        -1, keepdims=True
    )
    np.testing.assert_allclose(found[out], logits, rtol=1e-4, atol=1e-6)
    changed = np.where(out, (labels + 1) % K, labels)
    np.testing.assert_allclose(Folds(points, fold).log_probs(changed, K)[out], found[out], rtol=1e-6)
    assert np.allclose(np.exp(found).sum(-1), 1)
    assert Folds(points, fold).log_probs(np.where(out, 1, 0), K) is None  # the others know one label only


def test_merging_joins_what_never_meets_in_an_input():
    """Two ways of solving, each in two parts that belong to different inputs."""
    halves = torch.arange(8).repeat_interleave(6) % 2
    ways = torch.arange(6).repeat(8) % 2
    merged = merge((2 * halves + ways).numpy(), 2, 6)
    assert adjusted_mutual_info_score(ways, merged) == pytest.approx(1)
    assert np.array_equal(merge(ways.numpy(), 2, 6), ways.numpy())


def test_refining_mends_single_labels_and_leaves_too_few_alone():
    features, truth = planted()
    folds = Folds(centred(features).double().numpy(), np.repeat(np.arange(24) % 2, 9))
    noisy = truth.clone()
    noisy[::11] = (noisy[::11] + 1) % K
    assert np.array_equal(refine(folds, noisy.numpy(), K), truth.numpy())
    few = np.where(np.arange(len(truth)) == 0, 1, 0)
    assert np.array_equal(refine(folds, few, K), few)
    assert code_length(folds, few, K) == pytest.approx(math.log(K))  # the other fold does not know the 1
    assert code_length(folds, 0 * few, K) == pytest.approx(0, abs=1e-3)


def test_the_code_lengths_in_several_views_count_by_their_geometric_mean():
    torch.manual_seed(0)
    _, truth = planted()
    clear, fold = np.eye(K)[truth.numpy()], np.arange(24).repeat(9) % 2
    views = [Folds(clear + noise * torch.randn(len(truth), K).numpy(), fold) for noise in (0.3, 3.0)]
    lengths = [code_length(view, truth.numpy(), K) for view in views]
    assert lengths[0] < 0.1 < 0.9 < lengths[1]
    assert in_all_views(views, truth.numpy(), K) == pytest.approx(math.sqrt(lengths[0] * lengths[1]))


def test_what_a_division_tells_is_that_of_the_worst_environment():
    features, kind, truth = unlike_kinds()
    points = centred(features).double().numpy()
    mixed, by_kind = ([Folds(points, groups.repeat(9))] for groups in (np.arange(64) // 8, kind))
    told = [tells(folds, truth.numpy(), K, 9) for folds in ([mixed], [by_kind], [mixed, by_kind], [by_kind, mixed])]
    assert told[0] > 0.9
    assert told[1] < 0.5
    assert told[1] == pytest.approx(information(truth.numpy(), 9) - code_length(by_kind[0], truth.numpy(), K))
    assert told[2:] == [told[1]] * 2


@pytest.mark.parametrize(("wrong", "repeated"), [(1, True), (40, False)])
def test_divisions_that_differ_in_few_places_repeat_each_other(wrong, repeated):
    _, truth = planted()
    other = (K - 1 - truth).numpy()  # names play no part
    other[:wrong] = (other[:wrong] + 1) % K
    assert repeats(truth.numpy(), [np.zeros(len(truth), dtype=np.int64), other]) == repeated
    assert not repeats(truth.numpy(), [])


def test_what_holds_for_one_half_of_the_inputs_holds_for_the_other():
    """Labels that swap two ways for some inputs are known in every group from the others, but not from all unlike."""
    points, groups, truth, swapped = swapped_on_one_side()
    every = [[Folds(points, np.repeat(groups, 8))]]
    assert tells(every, swapped, 2, 8) == pytest.approx(tells(every, truth, 2, 8), abs=0.06)
    noise = np.random.default_rng(0).standard_normal(points.shape)
    unlike, mixed = ([Folds(view, np.repeat(side, 8)) for view in (noise, points)] for side in (groups % 2, groups < 3))
    assert holds([unlike], truth, 2, 8) > 0.6  # by the view that shows it best
    assert holds([unlike], swapped, 2, 8) < 0
    assert holds([mixed], swapped, 2, 8) > 0.6
    unlike, mixed = unlike[1:], mixed[1:]
    of_mixed, of_unlike = (holds([halving], swapped, 2, 8) for halving in (mixed, unlike))
    assert holds(9 * [mixed] + [unlike], swapped, 2, 8) == pytest.approx((of_mixed + of_unlike) / 2)  # two worst of ten
    assert holds(8 * [mixed] + 2 * [unlike], swapped, 2, 8) == pytest.approx(of_unlike)
