"""The data contract: records, batches and step outputs as frozen dataclasses with shapes.

Symbols: B batch, K latents, T supervised y-tokens, P prefix tokens, D latent dimensions. Costs are in nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNLABELLED = -1
"""Value of ``strategy`` where a record has no ground-truth label."""


@dataclass(frozen=True, slots=True)
class Record:
    """One solved problem: input ``x``, solution ``y`` and, for metrics only, the strategy that ``y`` follows.

    Args:
        x: the input text.
        y: the solution text.
        strategy: index into the data module's ``strategy_names``, or ``UNLABELLED``. Never seen by training.
        index: position in its split; keys caches and removes the duplicates that distributed samplers add.
    """

    x: str
    y: str
    strategy: int = UNLABELLED
    index: int = 0


class _TensorFields:
    """Moves every tensor field of a dataclass at once."""

    def _map(self, fn: Any) -> Any:
        changes = {
            f.name: fn(value)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy whose tensors went through ``Tensor.to(*args, **kwargs)``."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def detach(self) -> Any:
        """Return a copy whose tensors are detached from the graph."""
        return self._map(Tensor.detach)

    def pin_memory(self) -> Any:
        """Return a copy whose tensors lie in pinned memory (called by ``DataLoader(pin_memory=True)``)."""
        return self._map(Tensor.pin_memory)


@dataclass  # not frozen: a trainer of precision bf16-true converts batches field by field
class PairBatch(_TensorFields):
    """A batch of records as token ids, cut where the latent section goes in.

    The z-free record is ``prefix + <y> + y_ids``; the generator prompt of latent k is
    ``prefix + <z> z_k </z> <y> + y_ids``. ``y_ids`` are the supervised tokens: y, ``</y>`` and ``<eos>``.

    Shape:
        prefix_ids, prefix_mask: [B, P] ``<bos> <x> x </x>``; bool mask, True counts; padded on the template's side.
        y_ids, y_mask: [B, T]; padded on the right.
        index, strategy: [B] int64; ``strategy`` is ``UNLABELLED`` (-1) where unknown.
        x, y: B texts each.
    """

    prefix_ids: Tensor
    prefix_mask: Tensor
    y_ids: Tensor
    y_mask: Tensor
    index: Tensor
    strategy: Tensor
    x: tuple[str, ...]
    y: tuple[str, ...]

    def __len__(self) -> int:
        return self.index.shape[0]


@dataclass(frozen=True)
class DiscreteOutputs(_TensorFields):
    """What one step of a discrete CVAE computed: all that losses and metrics may read.

    Optional fields are None unless some loss names them in ``requires`` (or an evaluation needs them).

    Shape:
        router_log_probs: [B, K] log p(z_k|x).
        posterior_log_probs: [B, K] log q(z_k|x,y) that weighs the objective, exact or amortized.
        token_nll: [B, K, T] -log p(y_t|x,z_k,y_<t), 0 where masked.
        y_mask: [B, T] bool, True counts.
        temperature: [] beta of the exact posterior q* ~ p(z|x) exp(-sum_t nll_t / beta).
        amortized_log_probs: [B, K] log q_xi(z_k|x,y) from the posterior network.
        c_base: [] mean NLL per token of the entangled model on the validation split; None if unknown.
        baseline_nll: [B, T] -log p_ref(y_t|x,y_<t), detached.
        inter_latent_jsd: [B, T] JSD of the K next-token distributions.
        seed_shares: [K] shares of the latents, as they are seeded, among the entangled model's solutions; they sum to
            1. Uniform until there are seeds, None without a seeding.
        seed_ways: [K] int64, the way of solving that each latent was seeded with. All 0 until there are seeds,
            None without a seeding.
    """

    router_log_probs: Tensor
    posterior_log_probs: Tensor
    token_nll: Tensor
    y_mask: Tensor
    temperature: Tensor
    amortized_log_probs: Tensor | None = None
    c_base: Tensor | None = None
    baseline_nll: Tensor | None = None
    inter_latent_jsd: Tensor | None = None
    seed_shares: Tensor | None = None
    seed_ways: Tensor | None = None

    @property
    def sequence_nll(self) -> Tensor:
        """[B, K] summed NLL of y under each latent, in nats."""
        return self.token_nll.sum(-1)

    @property
    def num_tokens(self) -> Tensor:
        """[B] number of supervised tokens, at least 1."""
        return self.y_mask.sum(-1).clamp_min(1)


@dataclass(frozen=True)
class ContinuousOutputs(_TensorFields):
    """What one step of a continuous CVAE computed; S samples take the place of the K latents.

    Shape:
        prior_mean, prior_logvar: [B, D] router p(z|x) = N(mean, exp(logvar)).
        posterior_mean, posterior_logvar: [B, D] q(z|x,y).
        token_nll: [B, S, T] under the S samples, 0 where masked.
        y_mask: [B, T] bool, True counts.
        c_base: [] mean NLL per token of the entangled model; None if unknown.
        baseline_nll: [B, T], detached.
        inter_latent_jsd: [B, T] JSD among the generators of latents drawn from the batch's posteriors.
        temperature: [] beta of the free energy.
        latents: [B, S, D] the samples themselves.
        sample_log_weights: [B, S] log of p(z_s|x) exp(-sum_t nll_t(z_s) / beta) / (S r(z_s)) for samples of a proposal
            r; None where the samples are the posterior's own and count alike.
        num_posterior_samples: how many of the samples, the first ones, come from q; None = all.
        log_evidence: [B] importance-weighted estimate of log p(y|x), in nats.
        log_evidence_error: [B] its standard error.
    """

    prior_mean: Tensor
    prior_logvar: Tensor
    posterior_mean: Tensor
    posterior_logvar: Tensor
    token_nll: Tensor
    y_mask: Tensor
    c_base: Tensor | None = None
    baseline_nll: Tensor | None = None
    inter_latent_jsd: Tensor | None = None
    temperature: Tensor | None = None
    latents: Tensor | None = None
    sample_log_weights: Tensor | None = None
    num_posterior_samples: int | None = None
    log_evidence: Tensor | None = None
    log_evidence_error: Tensor | None = None

    @property
    def sequence_nll(self) -> Tensor:
        """[B, S] summed NLL of y under each sample, in nats."""
        return self.token_nll.sum(-1)

    @property
    def posterior_sequence_nll(self) -> Tensor:
        """[B, S'] summed NLL of y under the samples of q alone, which come first."""
        return self.sequence_nll[:, : self.num_posterior_samples]

    @property
    def num_tokens(self) -> Tensor:
        """[B] number of supervised tokens, at least 1."""
        return self.y_mask.sum(-1).clamp_min(1)


def require(outputs: DiscreteOutputs | ContinuousOutputs, field: str) -> Tensor:
    """Return an optional field, or raise a ValueError that says how to make it available."""
    value = getattr(outputs, field, None)
    if not isinstance(value, torch.Tensor):
        hint = (
            "train from an entangled artifact that holds baseline.json, or set model.c_base"
            if field in ("c_base", "baseline_nll")
            else f"add {field!r} to the loss's `requires`"
        )
        raise ValueError(f"this term reads outputs.{field}, which was not computed: {hint}")
    return value
