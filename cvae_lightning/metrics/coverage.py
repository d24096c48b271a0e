"""How many of the strategies of one input the latents reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.metrics.base import SumStatistics, check_shape
from cvae_lightning.metrics.figures import Axes, Figure, bars
from cvae_lightning.metrics.matching import best_matching


class LocalStrategyCoverage(SumStatistics):
    """Share of the distinguishable strategies of each input that different latents produce.

    Strategies whose traces coincide on an input are one group there. The coverage of an input is the size of the
    maximum bipartite matching between the latents and the groups that their outputs follow, over the number of groups.
    `compute()` returns `mean` coverage, `full_rate` (share of inputs with coverage 1) and `num_inputs`; nan without
    inputs. With K latents and more than K groups the coverage stays below 1.

    Args:
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> metric = LocalStrategyCoverage()
        >>> follows = torch.tensor([[True, True, False], [False, False, False]])
        >>> metric.update(follows, groups=torch.tensor([0, 0, 1]))
        >>> metric.compute()["mean"].item()
        0.5
    """

    higher_is_better = True
    coverage: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("coverage")
        self.add_sum("counts", 2, dtype=torch.int64)  # inputs, inputs with full coverage

    def update(self, compatible: Tensor, groups: Tensor) -> None:
        """Add one input.

        Args:
            compatible: [K, S] bool, True where the output under latent k is the trace of strategy s.
            groups: [S] any integer; strategies with equal traces on this input have the same number.
        """
        check_shape("compatible", compatible, "K", "S")
        check_shape("groups", groups, compatible.shape[1])
        reached = [compatible[:, groups == group].any(1) for group in groups.unique()]
        edges = torch.stack(reached, dim=1).cpu().numpy()  # [K, groups]
        matched = int(edges[best_matching(edges)].sum())
        self.coverage = self.coverage + matched / edges.shape[1]
        self.counts = self.counts + torch.tensor([1, matched == edges.shape[1]], device=self.counts.device)

    def result(self) -> dict[str, Tensor]:
        """Divide the sums by the number of inputs."""
        inputs, full = self.counts
        return {"mean": self.coverage / inputs, "full_rate": full.double() / inputs, "num_inputs": inputs}

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw mean coverage and full-coverage rate."""
        latest = self.latest()
        values = {"mean coverage": latest["mean"], "full coverage rate": latest["full_rate"]}
        title = f"Strategies reached per input (n = {int(latest['num_inputs'])})"
        return bars(values, title=title, label="share", limit=1.0, axes=ax)
