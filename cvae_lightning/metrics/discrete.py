"""All metrics of a discrete CVAE, updated once per batch and read once per epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cvae_lightning.functional import categorical_kl, log_marginal_likelihood
from cvae_lightning.metrics.alignment import StrategyAlignment
from cvae_lightning.metrics.epoch import EpochMetrics
from cvae_lightning.metrics.router import ROUTER_SCORES, RouterCalibration
from cvae_lightning.metrics.usage import LatentUsage
from cvae_lightning.outputs import DiscreteOutputs

ALIGNMENT_KEYS = ("one_to_one", "ami", "nmi", "homogeneity", "purity")


class DiscreteMetrics(EpochMetrics):
    """Alignment, router calibration, usage, evidence, reconstruction ratio and raw terms of one evaluation epoch.

    Alignment takes the argmax of the posterior that weighs the objective; ``alignment_amortized`` takes that of the
    posterior network, which needs no enumeration.

    Args:
        num_latents: K.
    """

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.alignment: StrategyAlignment | None = None
        self.alignment_amortized: StrategyAlignment | None = None
        self.router_calibration: RouterCalibration | None = None
        self.usage = LatentUsage(num_latents)

    def set_strategies(self, num_strategies: int) -> None:
        """Count alignment against this many strategies, and score the router; 0 = the data has no labels."""
        if not num_strategies:
            self.alignment = self.alignment_amortized = self.router_calibration = None
        elif self.alignment is None or self.alignment.num_strategies != num_strategies:
            device = self.usage.device
            self.alignment = StrategyAlignment(self.num_latents, num_strategies).to(device)
            self.alignment_amortized = StrategyAlignment(self.num_latents, num_strategies).to(device)
            self.router_calibration = RouterCalibration(self.num_latents, num_strategies).to(device)

    def update(
        self,
        outputs: DiscreteOutputs,
        strategy: Tensor,
        terms: Mapping[str, Tensor],
        extra: Mapping[str, Tensor],
        true_probs: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            outputs: of the step.
            strategy: [B] labels, -1 where unknown.
            terms: raw terms, [] each. extra: diagnostics of the losses, [] each.
            true_probs: [B, S] the data's own p(s|x), where it is known.
        """
        sequence_nll, router = outputs.sequence_nll, outputs.router_log_probs
        log_evidence = log_marginal_likelihood(router, sequence_nll)
        q = outputs.posterior_log_probs if outputs.amortized_log_probs is None else outputs.amortized_log_probs
        elbo = -(q.exp() * sequence_nll).sum(-1) - categorical_kl(q, router)
        expected_nll = (outputs.posterior_log_probs.exp() * sequence_nll).sum(-1)
        tokens = self.add_costs(outputs, log_evidence, expected_nll)
        self.add_scalars(terms, extra, {"elbo": elbo}, len(tokens))
        self.usage.update(outputs.posterior_log_probs, router)
        if self.alignment is not None and self.alignment_amortized is not None:
            self.alignment.update(outputs.posterior_log_probs.argmax(-1), strategy)
            if outputs.amortized_log_probs is not None:
                self.alignment_amortized.update(q.argmax(-1), strategy)
        if self.router_calibration is not None:
            self.router_calibration.update(router, outputs.posterior_log_probs, strategy, true_probs)

    def compute_and_reset(self, c_base: float | None) -> dict[str, Tensor]:
        """Return the epoch's metrics by log key, without stage, and start anew."""
        result, usage = self.costs_and_scalars(c_base), self.usage.compute()
        result |= {
            "diagnostics/posterior_entropy": usage["posterior_entropy"],
            "diagnostics/router_entropy": usage["router_entropy"],
            "diagnostics/latent_usage_perplexity": usage["usage_perplexity"],
            "diagnostics/dead_latents": usage["dead_latents"],
        }
        for prefix, metric in (("alignment", self.alignment), ("alignment_amortized", self.alignment_amortized)):
            if metric is not None and metric.update_called:
                scores = metric.compute()
                if int(scores["num_labelled"]):
                    result |= {f"{prefix}/{key}": scores[key] for key in ALIGNMENT_KEYS}
        if self.router_calibration is not None and self.router_calibration.update_called:
            scores = self.router_calibration.compute()
            if int(scores["num_labelled"]):
                known = (key for key in ROUTER_SCORES if not torch.isnan(scores[key]))
                result |= {f"router/{key}": scores[key] for key in known}
        self.reset()
        return self.on_device(result)
