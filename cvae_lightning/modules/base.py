"""CVAEModule: the step of every conditional VAE of the package, as named stages in the order of the mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.adaptation import Adaptation
from cvae_lightning.backbones.branch_inputs import padded_left
from cvae_lightning.backbones.causal_lm import set_dropout
from cvae_lightning.functional import global_batch_mean, local_batch, masked_token_mean
from cvae_lightning.losses import LossCallback
from cvae_lightning.metrics import LossContribution
from cvae_lightning.modules.compared import ComparedModule
from cvae_lightning.modules.lora import LoRA
from cvae_lightning.modules.silent_parts import SilentParts
from cvae_lightning.outputs import ContinuousOutputs, DiscreteOutputs, PairBatch
from cvae_lightning.template import PromptTemplate

Outputs = DiscreteOutputs | ContinuousOutputs


class CVAEModule(ComparedModule, ABC):
    """Router, generator and posterior around an entangled model, with pluggable losses.

    Subclasses say what the latent is; a user's subclass overrides one stage of :meth:`compute_outputs`, or
    :meth:`objective`.
    """

    def __init__(
        self,
        entangled: str | dict[str, str],
        losses: dict[str, LossCallback | None],
        num_latent_tokens: int,
        baseline: Literal["frozen", "dynamic"],
        c_base: float | str,
        max_length: int | None,
        on_overflow: Literal["error", "skip"],
        padding_side: Literal["left", "right"],
        dropout: float,
        learning_rate: float,
        warmup_steps: int,
        final_learning_rate_fraction: float,
        weight_decay: float,
        baseline_cache: bool | str = True,
        prefix_length: int = 1,
        adaptation: Adaptation = "full",
        lora: LoRA | None = None,
        keep_frozen: bool = False,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, final_learning_rate_fraction, weight_decay)
        self.losses = _loss_dict(losses)
        self.contributions = LossContribution(list(self.losses))
        lm, tokenizer = self.take_entangled(entangled, c_base, baseline, baseline_cache)
        self.template = PromptTemplate(
            tokenizer, num_latent_tokens, max_length, on_overflow, padding_side, prefix_length
        )
        set_dropout(lm, dropout)
        self.adapt(lm, adaptation, lora, keep_frozen)
        self.keep_longest_y()
        self._silent = SilentParts()

    # The line of the step: batch -> outputs -> terms -> objective -> log.

    def _step(self, batch: PairBatch, stage: str) -> tuple[Tensor, dict[str, Tensor], Outputs]:
        """Return (total, raw terms, outputs) of one batch."""
        outputs = self.compute_outputs(batch, self.required_fields(stage))
        terms = self.loss_terms(outputs)
        return self._silent.expected_by_ddp(self, self.objective(terms)), terms, outputs

    @abstractmethod
    def compute_outputs(self, batch: PairBatch, fields: frozenset[str]) -> Outputs:
        """Run router, generator and posterior; compute the optional ``fields`` that somebody reads."""

    def _with_z(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return the router prompts and their mask, [B, P + 1]; ``<z>`` stands behind the last real token."""
        mask = torch.cat([batch.prefix_mask, batch.prefix_mask.new_ones(len(batch), 1)], -1)
        ids = torch.cat([batch.prefix_ids, batch.prefix_ids[:, :1]], -1)
        z = self.template.marker_ids["<z>"]
        if self.template.padding_side == "left":
            ids = torch.cat([batch.prefix_ids, torch.full_like(batch.prefix_ids[:, :1], z)], -1)
            return ids, mask
        end = batch.prefix_mask.sum(-1, keepdim=True)
        position = torch.arange(mask.shape[1], device=mask.device)
        return torch.where(position == end, z, ids), position <= end

    def _z_free(self, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, mask and y-region of the z-free records, [B, P + 1 + T] each, padded around the record."""
        prefix_ids, prefix_mask = padded_left(batch.prefix_ids, batch.prefix_mask)
        y_open = torch.full_like(batch.y_ids[:, :1], self.template.marker_ids["<y>"])
        on, off = batch.y_mask.new_ones(len(batch), 1), torch.zeros_like(prefix_mask)
        ids = torch.cat([prefix_ids, y_open, batch.y_ids], -1)
        mask = torch.cat([prefix_mask, on, batch.y_mask], -1)
        return ids, mask, torch.cat([off, on, batch.y_mask], -1)

    def required_fields(self, stage: str) -> frozenset[str]:
        """Return the optional output fields to compute: what losses read, and at evaluation what metrics read too."""
        fields = frozenset().union(*(loss.requires for _, loss in self._named_losses()))
        if stage != "train":
            fields |= {"inter_latent_jsd"} | ({"baseline_nll"} if self.has_reference else set())
        return fields

    def loss_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return every raw term as a mean over the global batch; terms of weight 0 without gradient."""
        terms: dict[str, Tensor] = {}
        for name, loss in self._named_losses():
            with torch.set_grad_enabled(torch.is_grad_enabled() and loss.weight != 0):
                terms[name] = loss(outputs)
        rows = {name: value for name, value in terms.items() if value.ndim == 1}
        if rows:  # one reduction for all of them
            means = global_batch_mean(torch.stack(list(rows.values()), -1))
            terms |= {name: means[i] if rows[name].requires_grad else means[i].detach() for i, name in enumerate(rows)}
        return terms

    def objective(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return J = sum_i weight_i L_i over the terms whose weight is not 0."""
        weights = self.loss_weights()
        active = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
        if not active:
            raise ValueError("every loss has weight 0, so there is nothing to minimise: give at least one a weight")
        return torch.stack(active).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave parts that nothing reads as they are."""
        self._silent.drop_gradients()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the objective of a batch and log its raw terms, weights and contributions."""
        self.watch_length(batch)
        total, terms, outputs = self._step(batch, "train")
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        weights = self.loss_weights()
        weighted = {name: (weights[name] * term).abs() for name, term in self.last_terms.items()}
        scale = torch.stack(list(weighted.values())).sum().clamp_min(1e-12)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch))
        self.log_dict(
            {f"train/{name}": term for name, term in self.last_terms.items()}
            | {f"train/loss_contrib/fraction_abs/{name}": part / scale for name, part in weighted.items()}
            | self._prefixed("train/weight/", weights)
            | self._prefixed("train/diagnostics/", self.diagnostics(outputs)),
            batch_size=len(batch),
        )
        return total

    @torch.no_grad()
    def diagnostics(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the diagnostics of all losses, and the inter-latent JSD where it was computed."""
        found = {key: value for _, loss in self._named_losses() for key, value in loss.diagnostics(outputs).items()}
        if outputs.inter_latent_jsd is not None and "inter_latent_jsd/weighted_mean" not in found:
            rows = masked_token_mean(outputs.inter_latent_jsd, outputs.y_mask, outputs.baseline_nll)
            found["inter_latent_jsd/weighted_mean"] = rows.mean()
        return found

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Accumulate every metric of the split."""
        self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Accumulate every metric of the split."""
        self._evaluation_step(batch, batch_idx, "test")

    def _evaluation_step(self, batch: PairBatch, batch_idx: int, stage: str) -> None:
        self.watch_length(batch)
        with local_batch():  # ranks may hold different numbers of batches
            _, terms, outputs = self._step(batch, stage)
            extra = self.diagnostics(outputs)
        self.update_metrics(batch, outputs, terms, extra)
        if batch_idx == 0:
            self.last_outputs = {"batch": batch, "outputs": outputs}

    @abstractmethod
    def update_metrics(
        self, batch: PairBatch, outputs: Outputs, terms: Mapping[str, Tensor], extra: Mapping[str, Tensor]
    ) -> None:
        """Accumulate one evaluation batch."""

    @abstractmethod
    def compute_metrics(self) -> dict[str, Tensor]:
        """Return the metrics of the split by log key (without stage), and reset them."""

    @abstractmethod
    def aggregate_outputs(self) -> Outputs:
        """Return outputs of one example, B = 1, whose distributions are the aggregates of the split so far."""

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_evaluation("val/")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the split."""
        self._log_evaluation("test/")

    def _log_evaluation(self, prefix: str) -> None:
        """Log the split's metrics; batch statistics are those of the whole split, however it was cut into batches."""
        self.share_longest_y()
        aggregate = self.aggregate_outputs()
        with local_batch():
            statistics = {name: loss(aggregate) for name, loss in self._named_losses() if loss.of_marginals}
        result = self.compute_metrics() | statistics
        weighted = {name: weight * result[name] for name, weight in self.loss_weights().items()}
        self.contributions.update(weighted)
        result["loss"] = torch.stack(list(weighted.values())).sum()
        result |= self._prefixed("loss_contrib/fraction_abs/", self.contributions.compute())
        self.contributions.reset()
        self.log_dict(self._prefixed(prefix, {k: v.float() for k, v in result.items()}), sync_dist=True)

    # Small things.

    def loss_weights(self) -> dict[str, float]:
        """Return the current weight of every term."""
        return {name: loss.weight for name, loss in self._named_losses()}

    def _named_losses(self) -> list[tuple[str, LossCallback]]:
        return list(self.losses.items())  # type: ignore[arg-type]

    @staticmethod
    def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + key: value for key, value in values.items()}


LOGGED = ("loss", "elbo", "marginal_nll", "marginal_nll_ratio", "baseline_nll", "rho_recon")
"""What evaluations log by these names, beside the losses."""


def _loss_dict(losses: dict[str, LossCallback | None]) -> nn.ModuleDict:
    chosen = {name: loss for name, loss in losses.items() if loss is not None}
    if not chosen:
        raise ValueError("`losses` is empty: name at least one loss")
    for name, loss in chosen.items():
        if not isinstance(loss, LossCallback):
            raise ValueError(f"losses[{name!r}] must be a LossCallback, got {type(loss).__name__}")
        if "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{name!r} cannot name a loss: choose a name without dots that is no method of a dict")
        if name in LOGGED:
            raise ValueError(f"{name!r} cannot name a loss, as a metric is logged by that name: call it {name}_loss")
    return nn.ModuleDict(chosen)
