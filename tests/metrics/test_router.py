import math

import pytest
import torch
from processes import run_in_processes

from cvae_lightning.data.synthetic import StrategyFrequencies
from cvae_lightning.metrics import RouterCalibration
from cvae_lightning.metrics.router import calibration_error


def certain(latents, count):
    """Return log-probabilities [N, K] of one latent each."""
    return torch.nn.functional.one_hot(latents, count).double().log()


def scores(router, latents, strategies, num_strategies, true_probs=None):
    router = torch.tensor(router)
    metric = RouterCalibration(router.shape[1], num_strategies)
    metric.update(router.log(), certain(torch.tensor(latents), router.shape[1]), torch.tensor(strategies), true_probs)
    return {key: value.item() for key, value in metric.compute().items()}


def test_as_many_latents_as_strategies_are_matched_one_to_one():
    # Latent 2 is strategy 0, 0 is 1 and 1 is 2: the labels' probabilities are 0.7, 0.6, 0.1 and 0.5.
    router = [[0.2, 0.1, 0.7], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.25, 0.5, 0.25]]
    found = scores(router, [2, 0, 1, 1], [0, 1, 2, 2], 3)
    assert found["cross_entropy"] == pytest.approx(-math.log(0.7 * 0.6 * 0.1 * 0.5) / 4)
    assert found["num_labelled"] == 4
    assert math.isnan(found["true_cross_entropy"])
    assert math.isnan(found["expected_cross_entropy"])


def test_expected_cross_entropy_is_that_over_all_draws_of_the_labels():
    router, true = [[0.3, 0.7], [0.9, 0.1]], torch.tensor([[0.4, 0.6], [0.0, 1.0]])
    found = scores(router, [1, 0], [0, 1], 2, true)  # latent 1 is strategy 0
    by_hand = -(0.4 * math.log(0.7) + 0.6 * math.log(0.3) + math.log(0.9)) / 2
    assert found["expected_cross_entropy"] == pytest.approx(by_hand)
    assert found["true_cross_entropy"] == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / 2)
    sure = scores([[1.0, 0.0], [0.0, 1.0]], [0, 1], [0, 1], 2, torch.eye(2))
    assert sure["expected_cross_entropy"] == sure["true_cross_entropy"] == 0.0
    lost = scores([[0.5, 0.5]] * 2, [0, 1], [0, 1], 3, torch.full((2, 3), 1 / 3))  # nobody stands for strategy 2
    assert lost["expected_cross_entropy"] == math.inf
    assert lost["cross_entropy"] == pytest.approx(math.log(2))


def test_more_latents_share_a_strategy_and_an_unused_one_has_none():
    # Latents 0 and 2 are strategy 0, latent 1 is strategy 1; no record has latent 3, whose probability is lost.
    router = [[0.5, 0.2, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1], [0.3, 0.5, 0.1, 0.1]]
    found = scores(router, [0, 2, 1], [0, 0, 1], 2)
    assert found["cross_entropy"] == pytest.approx(-math.log(0.7 * 0.7 * 0.5) / 3)


def test_a_latent_that_never_has_the_most_stands_for_what_it_has_a_part_of():
    router = torch.tensor([[0.2, 0.2, 0.6]] * 2).log()
    metric = RouterCalibration(3, 2)
    posterior = torch.tensor([[0.55, 0.45, 0.0], [0.1, 0.1, 0.8]])
    metric.update(router, posterior.log(), torch.tensor([0, 1]))
    assert metric.compute()["cross_entropy"].item() == pytest.approx(-math.log(0.4 * 0.6) / 2)


def test_a_strategy_without_a_latent_costs_infinitely_much():
    assert scores([[0.5, 0.5]] * 3, [0, 1, 1], [0, 2, 1], 3)["cross_entropy"] == math.inf
    assert scores([[1.0, 0.0], [0.0, 1.0]], [0, 1], [1, 0], 2)["cross_entropy"] == 0.0


def test_router_that_knows_the_frequencies_reaches_the_true_entropy_and_is_calibrated():
    names = ("a", "b", "c", "d")
    frequencies = StrategyFrequencies.of("x_dependent", names)
    xs = [chr(97 + i % 4) + str(i) for i in range(6000)]
    true = torch.tensor([frequencies(x) for x in xs], dtype=torch.float64)
    labels = torch.multinomial(true, 1, generator=torch.Generator().manual_seed(0)).flatten()
    rename = torch.tensor([2, 0, 3, 1])
    latents, by_latent = rename[labels], torch.empty_like(true)
    by_latent[:, rename] = true

    def calibration_of(router):
        metric = RouterCalibration(4, 4)
        metric.update(router.log(), certain(latents, 4), labels, true)
        return {key: value.item() for key, value in metric.compute().items()}

    perfect = calibration_of(by_latent)
    entropy = -sum(p * math.log(p) for p in frequencies.weights)  # a rotation of the weights changes nothing
    assert perfect["true_cross_entropy"] == pytest.approx(entropy)
    assert perfect["expected_cross_entropy"] == pytest.approx(entropy)
    assert perfect["cross_entropy"] == pytest.approx(entropy, rel=0.02)
    assert perfect["calibration_error"] < 0.02
    blind = calibration_of(torch.full_like(true, 0.25))  # knows nothing of x, and says so
    assert blind["cross_entropy"] == pytest.approx(math.log(4))
    sure = calibration_of((0.97 * torch.nn.functional.one_hot(by_latent.argmax(-1), 4) + 0.01).double())
    assert sure["cross_entropy"] > entropy + 0.5
    assert sure["calibration_error"] == pytest.approx(0.98 - 8 / 15, abs=0.02)


def test_calibration_error_of_known_bins():
    # Ten bins of one record each: |1 - c| where right, |0 - c| where wrong.
    confidence = torch.tensor([0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95], dtype=torch.float64)
    correct = torch.tensor([False, True] * 5)
    by_hand = (0.50 + 0.45 + 0.60 + 0.35 + 0.70 + 0.25 + 0.80 + 0.15 + 0.90 + 0.05) / 10
    order = torch.tensor([3, 9, 0, 1, 8, 2, 7, 4, 6, 5])
    assert calibration_error(confidence, correct).item() == pytest.approx(by_hand)
    assert calibration_error(confidence[order], correct[order]).item() == pytest.approx(by_hand)
    # Two bins of mass 2: confidences 0.6 with accuracy 0.5, 0.9 with accuracy 1.
    found = calibration_error(torch.tensor([0.9, 0.5, 0.7, 0.9]), torch.tensor([True, True, False, True]), num_bins=2)
    assert found.item() == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)


def test_equal_confidences_are_one_bin_in_any_order():
    correct = torch.tensor([True, False] * 50)
    for order in (torch.arange(100), torch.argsort(correct.int(), stable=True)):
        found = calibration_error(torch.full((100,), 0.5), correct[order])
        assert found.item() == pytest.approx(0.0)


def test_records_without_label_count_for_nothing():
    router = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]).log()
    true = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    metric = RouterCalibration(2, 2)
    metric.update(router, certain(torch.tensor([0, 1, 0]), 2), torch.tensor([0, -1, 1]), true)
    metric.update(router[:1], certain(torch.tensor([0]), 2), torch.tensor([0]), true[:1])
    found = metric.compute()
    assert found["num_labelled"].item() == 3
    assert found["cross_entropy"].item() == pytest.approx(-math.log(0.9 * 0.9 * 0.5) / 3)
    assert found["true_cross_entropy"].item() == pytest.approx(math.log(2) / 3)
    metric.reset()
    metric.update(router, certain(torch.tensor([0, 1, 0]), 2), torch.tensor([-1, -1, -1]))
    nothing = metric.compute()
    assert nothing.pop("num_labelled").item() == 0
    assert all(math.isnan(value) for value in nothing.values())


def test_two_processes_with_uneven_data_equal_one(tmp_path):
    g = torch.Generator().manual_seed(0)
    router = torch.randn(37, 3, generator=g).mul(2).log_softmax(-1).double()
    router[5:20] = router[4]  # equal confidences on both processes
    latents, labels = torch.randint(3, (37,), generator=g), torch.randint(-1, 3, (37,), generator=g)
    labels[30:] = -1  # all that the second process sees last
    true = torch.rand(37, 3, generator=g).softmax(-1)

    def work(batches):
        metric = RouterCalibration(3, 3)
        for rows in batches:
            metric.update(router[rows], certain(latents[rows], 3), labels[rows], true[rows])
        return metric.compute()

    batches = ([slice(0, 1), slice(1, 4), slice(4, 11)], [slice(11, 30), slice(30, 37)])
    expected = work([*batches[0], *batches[1]])
    assert not torch.isnan(torch.stack(list(expected.values()))).any()
    for found in run_in_processes(lambda rank: work(batches[rank]), tmp_path):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_one_process_may_hold_no_label_at_all(tmp_path):
    router, latents = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log(), torch.tensor([0, 1])

    def work(rank):
        metric = RouterCalibration(2, 2)
        metric.update(router, certain(latents, 2), torch.tensor([[0, 1], [-1, -1]][rank]))
        return metric.compute()["cross_entropy"]

    for found in run_in_processes(work, tmp_path):
        assert found.item() == pytest.approx(-math.log(0.8 * 0.7) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_log_probs": torch.zeros(2, 3)}, r"router_log_probs must have shape \[B, 2\], got \[2, 3\]"),
        ({"posterior_log_probs": torch.zeros(2, 3)}, r"posterior_log_probs must have shape \[2, 2\], got \[2, 3\]"),
        ({"strategies": torch.zeros(3)}, r"strategies must have shape \[2\], got \[3\]"),
        ({"true_probs": torch.zeros(2, 2)}, r"true_probs must have shape \[2, 3\], got \[2, 2\]"),
        ({"strategies": torch.tensor([0, 3])}, r"strategies must lie in -1\.\.2, got 0\.\.3"),
    ],
)
def test_wrong_shapes_and_labels_are_refused(change, message):
    given = {key: torch.zeros(2, 2) for key in ("router_log_probs", "posterior_log_probs")}
    given |= {"strategies": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        RouterCalibration(2, 3).update(**given | change)
    with pytest.raises(ValueError, match="num_strategies must be at least 1, got 0"):
        RouterCalibration(2, 0)
