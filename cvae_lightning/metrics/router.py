"""How well the router knows p(s|x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import FixedPrecision, check_counts, check_range, check_shape
from cvae_lightning.metrics.matching import latent_strategies

NUM_BINS = 10
ROUTER_SCORES = ("cross_entropy", "expected_cross_entropy", "true_cross_entropy", "calibration_error")


class RouterCalibration(FixedPrecision):
    """The router as a predictor of the strategy: its cross-entropy and its calibration.

    p(s|x) is the router's probability of all latents that stand for strategy s in the same records, by what the
    posterior gives them: the best one-to-one matching where K = S, else every latent's commonest strategy. Latents that
    share a strategy share its records, and one of them may never have the most of any. `compute()` returns, in nats
    where not said,
    - `cross_entropy`: mean of -log p(s|x) over the labels s, which are one draw for each x;
    - `expected_cross_entropy`: mean of -sum_s p*(s|x) log p(s|x), the same without the chance of the draw, where the
      data knows its own p*(s|x), else nan;
    - `true_cross_entropy`: mean of H(p*(s|x)), the least that the one above can be, or nan;
    - `calibration_error`: sum over bins b of n_b / N |accuracy_b - confidence_b|, for the largest p(s|x) in 10 bins of
      equal mass; in [0, 1];
    - `num_labelled`.
    Scores are nan without labelled records. A strategy that no latent stands for makes its cross-entropy infinite.
    Where strategies write the same trace, y does not tell them apart: nothing then teaches the router to divide their
    probability as the labels do.
    Source: Guo et al. 2017, Eq. 3, arXiv 1706.04599; differs by bins of equal mass (Nguyen & O'Connor 2015, arXiv
    1508.05154), of which equal confidences share one, so that the order of the records is of no account.

    Keeps 2 K + S + 1 doubles per labelled record until it is reset, because the matching is known only at the end:
    meant for evaluation splits, which are small.

    Args:
        num_latents: K, at least 1.
        num_strategies: S, at least 1.
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = RouterCalibration(num_latents=2, num_strategies=2)
        >>> router = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
        >>> posterior = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
        >>> metric.update(router, posterior, torch.tensor([1, 0]))
        >>> scores = metric.compute()
        >>> round(scores["cross_entropy"].item(), 4), round(scores["calibration_error"].item(), 4)
        (0.6931, 0.0)
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, num_latents: int, num_strategies: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counts(num_latents=num_latents, num_strategies=num_strategies)
        self.num_latents, self.num_strategies = num_latents, num_strategies
        self.add_state("rows", [], dist_reduce_fx="cat")  # log p(z|x), p*(s|x), q(z|x,y), strategy

    def update(
        self,
        router_log_probs: Tensor,
        posterior_log_probs: Tensor,
        strategies: Tensor,
        true_probs: Tensor | None = None,
    ) -> None:
        """Add B records; those without a label are left out.

        Args:
            router_log_probs: [B, K] normalised log p(z|x).
            posterior_log_probs: [B, K] normalised log q(z|x,y).
            strategies: [B] index of each record's strategy, or -1 where unknown.
            true_probs: [B, S] the data's own p*(s|x); None = unknown.
        """
        check_shape("router_log_probs", router_log_probs, "B", self.num_latents)
        size = router_log_probs.shape[0]
        check_shape("posterior_log_probs", posterior_log_probs, size, self.num_latents)
        check_shape("strategies", strategies, size)
        check_range("strategies", strategies, -1, self.num_strategies)
        log_probs = router_log_probs.detach().double()
        if true_probs is None:
            true_probs = log_probs.new_full((size, self.num_strategies), torch.nan)
        check_shape("true_probs", true_probs, size, self.num_strategies)
        posterior = posterior_log_probs.detach().to(log_probs).exp()
        rows = torch.cat([log_probs, true_probs.to(log_probs), posterior, strategies[:, None]], -1)
        self.rows.append(rows[strategies >= 0])

    def compute(self) -> dict[str, Tensor]:
        """Match latents with strategies over all records, then score the router."""
        rows = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if not isinstance(rows, Tensor) or not len(rows):
            nan = torch.tensor(torch.nan, dtype=torch.float64)
            return {**dict.fromkeys(ROUTER_SCORES, nan), "num_labelled": torch.tensor(0)}
        sizes = [self.num_latents, self.num_strategies, self.num_latents, 1]
        router, true_probs, posterior, last = rows.split(sizes, -1)
        strategies = last[:, 0].long()
        table = rows.new_zeros(self.num_strategies, self.num_latents).index_add_(0, strategies, posterior).T
        stands_for = torch.from_numpy(latent_strategies(table.cpu().numpy())).to(rows.device)
        members = stands_for[:, None] == torch.arange(self.num_strategies, device=rows.device)  # [K, S]
        log_probs = (router[:, :, None] + members.double().log()).logsumexp(1)  # [N, S]
        confidence, predicted = log_probs.exp().max(-1)
        return {
            "cross_entropy": -log_probs.gather(1, strategies[:, None]).mean(),
            "expected_cross_entropy": -torch.where(true_probs == 0, 0.0, true_probs * log_probs).sum(-1).mean(),
            "true_cross_entropy": -torch.xlogy(true_probs, true_probs).sum(-1).mean(),
            "calibration_error": calibration_error(confidence, predicted == strategies),
            "num_labelled": torch.tensor(len(rows)),
        }


def calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Return the expected calibration error over bins of equal mass.

    sum_b n_b / N |accuracy_b - confidence_b|.  Bounds: 0, 1. Equal confidences share the bin of the first of them.

    Shape:
        confidence: [N] in [0, 1]; correct: [N] bool -> [] fp64.

    Example:
        >>> calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.75]), torch.tensor([True, True, False, False])).item()
        0.25
    """
    confidence = confidence.double()
    below = torch.searchsorted(confidence.sort().values, confidence)  # how many are smaller
    bins = below * num_bins // len(confidence)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    return gaps.index_add_(0, bins, correct.double() - confidence).abs().sum() / len(confidence)
