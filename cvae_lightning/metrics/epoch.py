"""What the metrics of an evaluation epoch have in common, whatever the latent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cvae_lightning.metrics.evidence import Evidence
from cvae_lightning.metrics.reconstruction import ReconstructionRatio
from cvae_lightning.metrics.weighted_means import WeightedMeans
from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs


class EpochMetrics(nn.Module):
    """Evidence, reconstruction ratio and raw terms; a subclass adds what belongs to its latent."""

    def __init__(self) -> None:
        super().__init__()
        self.evidence = Evidence()
        self.reconstruction = ReconstructionRatio(1.0)  # nats per token; divided by c_base when read
        self.means: WeightedMeans | None = None

    def add_costs(
        self, outputs: DiscreteOutputs | ContinuousOutputs, log_evidence: Tensor, expected_nll: Tensor
    ) -> Tensor:
        """Add log p(y|x) and E_q[-log p(y|x,z)] of a batch, [B] nats each; return its numbers of tokens, [B]."""
        tokens = outputs.y_mask.sum(-1)
        baseline = None if outputs.baseline_nll is None else outputs.baseline_nll.sum(-1)
        self.evidence.update(log_evidence, baseline, tokens)
        self.reconstruction.update(expected_nll, tokens)
        return tokens

    def add_scalars(
        self, terms: Mapping[str, Tensor], extra: Mapping[str, Tensor], more: Mapping[str, Tensor], size: int
    ) -> None:
        """Add raw terms and the losses' diagnostics, [] each, and ``more``, [B] each, of a batch of ``size``."""
        scalars = {**terms, **{f"diagnostics/{key}": value for key, value in extra.items()}, **more}
        if self.means is None:
            self.means = WeightedMeans(list(scalars)).to(self.evidence.device)
        self.means.update(scalars, weight=size)

    def costs_and_scalars(self, c_base: float | None) -> dict[str, Tensor]:
        """Return the epoch's means, its evidence beside the entangled model's, and the reconstruction ratio."""
        result = dict(self.means.compute()) if self.means is not None else {}
        evidence = self.evidence.compute()
        result["marginal_nll"] = evidence["marginal_nll"]
        if not torch.isnan(evidence["baseline_nll"]):
            result |= {"baseline_nll": evidence["baseline_nll"], "marginal_nll_ratio": evidence["ratio"]}
        if c_base is not None:
            result["rho_recon"] = self.reconstruction.compute() / c_base
        return result

    def reset(self) -> None:
        """Start anew."""
        for part in self.children():
            part.reset()  # type: ignore[operator]

    def on_device(self, result: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return results as fp32 on the device of the metrics."""
        return {key: value.to(self.evidence.device, torch.float32) for key, value in result.items()}
