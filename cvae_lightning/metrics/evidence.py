"""Likelihood of the latent-variable model beside that of the entangled model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics, check_shape
from cvae_lightning.metrics.figures import Axes, Figure, bars


class Evidence(SumStatistics):
    """Negative log marginal likelihood per token, and the entangled model's on the same tokens.

    `compute()` returns `marginal_nll` and `baseline_nll` in nats per token, and `ratio`, marginal over baseline: below
    1 the latent-variable model explains the data better. nan where nothing was seen; records without a baseline count
    in `marginal_nll` only.

    Args:
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = Evidence()
        >>> metric.update(torch.tensor([-2.0, -4.0]), torch.tensor([3.0, 9.0]), torch.tensor([4, 8]))
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'marginal_nll': 0.5, 'baseline_nll': 1.0, 'ratio': 0.5}
    """

    higher_is_better = False
    nll: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("nll", 2)  # marginal, baseline
        self.add_sum("tokens", 2, dtype=torch.int64)

    def update(self, log_evidence: Tensor, baseline_nll: Tensor | None, tokens: Tensor) -> None:
        """Add B records.

        Args:
            log_evidence: [B] log p(y|x), in nats.
            baseline_nll: [B] NLL of y under the entangled model, summed over its tokens, in nats; None if unknown.
            tokens: [B] number of supervised tokens.
        """
        check_shape("log_evidence", log_evidence, "B")
        check_shape("tokens", tokens, log_evidence.shape[0])
        nll, counts = -log_evidence.detach().double().sum(), tokens.sum()
        if baseline_nll is None:
            baseline, baseline_counts = torch.zeros_like(nll), torch.zeros_like(counts)
        else:
            check_shape("baseline_nll", baseline_nll, log_evidence.shape[0])
            baseline, baseline_counts = baseline_nll.detach().double().sum(), counts
        self.nll = self.nll + torch.stack([nll, baseline])
        self.tokens = self.tokens + torch.stack([counts, baseline_counts])

    def result(self) -> dict[str, Tensor]:
        """Divide by the numbers of tokens."""
        marginal, baseline = self.nll / self.tokens
        return {"marginal_nll": marginal, "baseline_nll": baseline, "ratio": marginal / baseline}

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw both costs per token."""
        latest = self.latest()
        values = {"entangled model": latest["baseline_nll"], "marginal over latents": latest["marginal_nll"]}
        title = f"Negative log-likelihood: ratio = {float(latest['ratio']):.3f}"
        return bars(values, title=title, label="nats per token", axes=ax)
