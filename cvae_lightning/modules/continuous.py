"""ContinuousCVAE: a Gaussian latent behind the same language model, estimated by samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.adaptation import Adaptation
from cvae_lightning.backbones.branches import BranchMethod, BranchOutput, run_branches
from cvae_lightning.backbones.causal_lm import has_dropout, head_of
from cvae_lightning.backbones.conditioning import Injection, LatentNorms, LatentPrefix, check_norm_branches
from cvae_lightning.backbones.posterior import Pooling, PosteriorNetwork
from cvae_lightning.functional import gaussian_sample, importance_weighted_evidence, soft_bound
from cvae_lightning.losses import LossCallback
from cvae_lightning.metrics.continuous import ContinuousMetrics
from cvae_lightning.modules.base import Outputs
from cvae_lightning.modules.gaussian_use import GaussianUse
from cvae_lightning.modules.language_model import token_stats
from cvae_lightning.modules.lora import LoRA
from cvae_lightning.outputs import ContinuousOutputs, PairBatch


class ContinuousCVAE(GaussianUse):
    """A conditional VAE whose latent is a Gaussian vector of a causal language model.

    Generative process: z ~ p(z|x) = N(mu_phi(x), diag sigma_phi^2(x)), a linear head on the hidden state at ``<z>``;
    y ~ p(y|x,z), the continuation of ``<x> x </x> <z> z </z> <y>``, where z stands as projected vectors (``prefix``),
    or shifts and scales every normalisation layer (``norm``), or both. Inference: q(z|x,y) = N(mu_xi, diag sigma_xi^2)
    from a posterior network that reads the z-free record.

    | symbol | variable | shape |
    |---|---|---|
    | p(z|x) | ``prior_mean``, ``prior_logvar`` | [B, D] |
    | q(z|x,y) | ``posterior_mean``, ``posterior_logvar`` | [B, D] |
    | -log p(y_t|x,z_s,y_<t), z_s ~ q | ``token_nll`` | [B, S, T] |

    Args:
        entangled: the entangled model: an artifact folder, or any Hugging Face causal LM folder or hub name. (A
            checkpoint carries the description of its own model here.)
        losses: terms of the objective by log name; null switches one off.
        latent_dim: D, at least 1.
        num_samples: posterior samples per example in training.
        num_router_samples: samples from the router beside them, with ``importance``.
        num_eval_samples: samples from the posterior at evaluation, and as many again from the router for the
            importance-weighted evidence.
        num_divergence_latents: latents drawn from the batch's posteriors whose generators are compared, where a loss
            or an evaluation reads ``inter_latent_jsd``; at least 2.
        posterior: how the objective is estimated: ``reparameterized`` samples of q that count alike (the ELBO), or
            ``importance``-weighted ones of q and router, from which q is learned by distillation.
        posterior_temperature: beta of the free energy, per sequence in nats; > 0; below 1 pays for information in z.
        injection: how z reaches the generator: ``prefix`` vectors, the ``norm`` layers, or ``both``.
        prefix_length: vectors in the latent slot; with ``norm`` alone, constant ones.
        prefix_hidden: width of a hidden layer between z and the vectors; 0 = linear.
        posterior_initial_logvar: log-variance of the posterior at the start; below 0 lets the first signal through.
        logvar_bounds: lowest and highest log-variance of router and posterior, approached smoothly.
        pooling: of the posterior network over the y-region.
        baseline: whose NLL weighs tokens: the ``frozen`` entangled model or the current backbone (``dynamic``).
        c_base: nats per token of the entangled model; ``auto`` reads the artifact, else measures it before training.
        branch_method: how the samples' branches are run: ``auto``, ``cache``, ``grouped`` or ``packed`` (not with
            ``norm``) or ``repeat``.
        max_length: longest generator prompt in tokens; null = unlimited.
        on_overflow: what happens to a longer record: ``error``, or ``skip`` it and say how many.
        padding_side: side on which x is padded.
        dropout: of generator and posterior.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate_fraction: share of the peak at which the cosine decay ends.
        weight_decay: of matrices.
        baseline_cache: keep the frozen baseline's NLL on disk: true (below ``trainer.default_root_dir``), false, or a
            folder.
        adaptation: what is trained of the language models of generator and posterior: ``full`` = everything; ``lora`` =
            low-rank adapters and the rows of marker tokens (needs peft); ``frozen`` = those rows alone. With the last
            two, generator, posterior and entangled model are one set of weights in memory. All else (router, prefix,
            norms, the posterior's head) is trained with each of them.
        lora: size and place of the adapters; null = ``LoRA()``.
        keep_frozen: keep in checkpoints what ``lora`` and ``frozen`` leave untrained; else a checkpoint names the
            entangled model and the hash of its weights, and needs it.

    Raises:
        ValueError: for a number below its least value, or an entangled model that cannot be read.
    """

    def __init__(
        self,
        entangled: str | dict[str, str],
        losses: dict[str, LossCallback | None],
        latent_dim: int = 4,
        num_samples: int = 1,
        num_router_samples: int = 4,
        num_eval_samples: int = 8,
        num_divergence_latents: int = 4,
        posterior: Literal["importance", "reparameterized"] = "importance",
        posterior_temperature: float = 0.3,
        injection: Injection = "prefix",
        prefix_length: int = 1,
        prefix_hidden: int = 0,
        posterior_initial_logvar: float = -2.0,
        logvar_bounds: tuple[float, float] = (-8.0, 4.0),
        pooling: Pooling = "mean",
        baseline: Literal["frozen", "dynamic"] = "frozen",
        c_base: float | Literal["auto"] = "auto",
        branch_method: BranchMethod = "auto",
        max_length: int | None = None,
        on_overflow: Literal["error", "skip"] = "error",
        padding_side: Literal["left", "right"] = "left",
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 30,
        final_learning_rate_fraction: float = 0.05,
        weight_decay: float = 0.0,
        baseline_cache: bool | str = True,
        adaptation: Adaptation = "full",
        lora: LoRA | None = None,
        keep_frozen: bool = False,
    ) -> None:
        for name, value, least in (
            ("latent_dim", latent_dim, 1),
            ("num_samples", num_samples, 1),
            ("num_router_samples", num_router_samples, 1),
            ("num_eval_samples", num_eval_samples, 1),
            ("num_divergence_latents", num_divergence_latents, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if posterior_temperature <= 0:
            raise ValueError(f"posterior_temperature must be positive, got {posterior_temperature}")
        if posterior not in ("importance", "reparameterized"):
            raise ValueError(f"posterior must be 'importance' or 'reparameterized', got {posterior!r}")
        if injection not in ("prefix", "norm", "both"):
            raise ValueError(f"injection must be 'prefix', 'norm' or 'both', got {injection!r}")
        if injection != "prefix":
            check_norm_branches(branch_method)
        low, high = logvar_bounds
        if not low < posterior_initial_logvar < high or not low < 0 < high:
            raise ValueError(
                f"logvar_bounds must enclose 0 and posterior_initial_logvar, got {list(logvar_bounds)} and "
                f"{posterior_initial_logvar}"
            )
        super().__init__(
            entangled,
            losses,
            0,
            baseline,
            c_base,
            max_length,
            on_overflow,
            padding_side,
            dropout,
            learning_rate,
            warmup_steps,
            final_learning_rate_fraction,
            weight_decay,
            baseline_cache,
            prefix_length,
            adaptation,
            lora,
            keep_frozen,
        )
        self.latent_dim = latent_dim
        self.num_samples = num_samples
        self.num_router_samples = num_router_samples
        self.num_eval_samples = num_eval_samples
        self.num_divergence_latents = num_divergence_latents
        self.posterior_kind = posterior
        self.posterior_temperature = posterior_temperature
        self.injection = injection
        self.logvar_bounds = (float(low), float(high))
        self.branch_method: BranchMethod = branch_method
        self.add_rows(1.0)
        self.posterior_network = PosteriorNetwork(self.posterior_backbone(), 2 * latent_dim, pooling)
        with torch.no_grad():
            self.posterior_network.project.bias[latent_dim:] = posterior_initial_logvar
        self.prefix = LatentPrefix(self.lm, latent_dim, prefix_length, prefix_hidden)
        self.router_head = nn.Linear(self.prefix.width, 2 * latent_dim)
        nn.init.zeros_(self.router_head.weight)  # p(z|x) starts at N(0, I) for every x
        nn.init.zeros_(self.router_head.bias)
        self.norms = LatentNorms(self.lm, latent_dim) if injection != "prefix" else None  # after the copy of lm
        self.metrics = ContinuousMetrics(latent_dim)

    # The stages. Override one of them to change it.

    def compute_outputs(self, batch: PairBatch, fields: frozenset[str]) -> ContinuousOutputs:
        """Return what losses and metrics read, in the order of the mathematics."""
        evaluate, weighted = "log_evidence" in fields, self.posterior_kind == "importance"
        samples = self.num_eval_samples if evaluate else self.num_samples
        q = self.posterior(batch)
        own = gaussian_sample(*q, samples)  # [B, S, D]
        groups = {"own": own.detach() if weighted else own}
        if evaluate or weighted:
            with torch.no_grad():
                proposed = self.router(self.read_prompt(batch))
                groups["router"] = gaussian_sample(*proposed, samples if evaluate else self.num_router_samples, True)
        if "inter_latent_jsd" in fields:
            each = -(-self.num_divergence_latents // len(batch))  # samples of an example: a small batch needs more
            groups["compared"] = self.divergence_latents(own if each <= samples else gaussian_sample(*q, each))
        branches = self.encode(batch, torch.cat(list(groups.values()), 1))
        parts = branches.hidden.split([group.shape[1] for group in groups.values()], 1)
        hidden = dict(zip(groups, parts, strict=True))
        p = self.router(branches.router_hidden)
        nll = {name: self.generator(hidden[name], batch)[0] for name in groups if name != "compared"}
        latents, token_nll = groups["own"], nll["own"]
        log_weights = log_evidence = log_evidence_error = None
        if "router" in groups:
            both = torch.cat([groups["own"], groups["router"]], 1)
            noisy = self.lm.training and has_dropout(self.lm)  # else both passes find the same router
            log_ratio = self.log_ratio(both, p, q, samples, proposed if noisy else None)
            both_nll = torch.cat([nll["own"], nll["router"]], 1)
            if evaluate:
                log_evidence, log_evidence_error = importance_weighted_evidence(log_ratio - both_nll.sum(-1))
            if weighted:
                latents, token_nll = both, both_nll
                log_weights = log_ratio - both_nll.sum(-1) / self.posterior_temperature
                log_weights = log_weights - math.log(both.shape[1])
        return ContinuousOutputs(
            prior_mean=p[0],
            prior_logvar=p[1],
            posterior_mean=q[0],
            posterior_logvar=q[1],
            token_nll=token_nll,
            y_mask=batch.y_mask,
            c_base=None if self.c_base is None else token_nll.new_tensor(self.c_base),
            baseline_nll=self.baseline_nll(batch) if "baseline_nll" in fields else None,
            inter_latent_jsd=self.generator(hidden["compared"], batch, True)[1] if "compared" in hidden else None,
            temperature=token_nll.new_tensor(self.posterior_temperature),
            latents=latents,
            sample_log_weights=log_weights,
            num_posterior_samples=samples,
            log_evidence=log_evidence,
            log_evidence_error=log_evidence_error,
        )

    def required_fields(self, stage: str) -> frozenset[str]:
        """Return the optional output fields to compute; at evaluation the importance-weighted evidence too."""
        return super().required_fields(stage) | ({"log_evidence"} if stage != "train" else set())

    def posterior(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z|x,y), [B, D] each, from the posterior network."""
        return self._gaussian(self.posterior_network(*self._z_free(batch)))

    def divergence_latents(self, latents: Tensor) -> Tensor:
        """Return M latents from the posteriors of as many different examples of this process, [B, M, D]."""
        size, wanted = len(latents), self.num_divergence_latents
        chosen = torch.randperm(size, device=latents.device).repeat(-(-wanted // size))[:wanted]
        sample = torch.arange(wanted, device=latents.device) // size % latents.shape[1]
        return latents[chosen, sample].expand(size, -1, -1)

    def encode(self, batch: PairBatch, latents: Tensor) -> BranchOutput:
        """Run the shared prefix ``<bos> <x> x </x> <z>`` and a branch behind it for each latent [B, S, D]."""
        size, count = latents.shape[:2]
        tail = torch.cat([self._section_end(size), batch.y_ids[:, :-1]], -1)  # </z> <y> y
        tail = self.lm.get_input_embeddings()(tail)[:, None].expand(-1, count, -1, -1)
        vectors = self.latent_vectors(latents).to(tail.dtype)  # [B, S, m, E]
        on = batch.y_mask.new_ones(size, vectors.shape[2] + 2)
        mask = torch.cat([on, batch.y_mask[:, :-1]], -1)
        prefix_ids, prefix_mask = self._with_z(batch)
        suffix = torch.cat([vectors, tail], 2)
        return run_branches(
            self.lm, prefix_ids, prefix_mask, suffix, mask, self.branch_method, None, self.norms, latents
        )

    def latent_vectors(self, latents: Tensor) -> Tensor:
        """Return what stands in the latent slot, [..., m, E]."""
        return self.prefix(latents if self.injection != "norm" else torch.zeros_like(latents))

    def router(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of p(z|x), [B, D] each, from hidden states [B, E] at ``<z>``."""
        return self._gaussian(self.router_head(hidden.to(self.router_head.weight.dtype)).float())

    def generator(self, hidden: Tensor, batch: PairBatch, need_jsd: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return -log p(y_t|x,z_s,y_<t), [B, S, T], and the inter-latent JSD, [B, T], if asked for."""
        return token_stats(hidden[:, :, self.prefix.length + 1 :], head_of(self.lm), batch, need_jsd)

    def read_prompt(self, batch: PairBatch) -> Tensor:
        """Return the hidden state at ``<z>``, [B, E], without running a branch."""
        ids, mask = self._with_z(batch)
        return run_branches(self.lm, ids, mask, ids[:, None, :0], mask[:, :0], "repeat").router_hidden

    def _gaussian(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = numbers.chunk(2, -1)
        return mean, soft_bound(logvar, *self.logvar_bounds)

    def _section_end(self, size: int) -> Tensor:
        ids = [self.template.marker_ids[token] for token in ("</z>", "<y>")]
        return torch.tensor(ids, device=self.device).expand(size, -1)

    # Metrics.

    def update_metrics(
        self, batch: PairBatch, outputs: Outputs, terms: Mapping[str, Tensor], extra: Mapping[str, Tensor]
    ) -> None:
        """Accumulate one evaluation batch."""
        self.metrics.update(cast(ContinuousOutputs, outputs), batch, terms, extra)

    def aggregate_outputs(self) -> ContinuousOutputs:
        """Return one example whose Gaussians have the moments of the split's aggregate router and posterior."""
        moments = self.metrics.moments.by_dimension()
        router = moments["router_mean"], moments["router_variance"]
        spread = moments["posterior_mean_variance"] + moments["posterior_variance"]
        parts = [*router, moments["posterior_mean_mean"], spread]
        prior_mean, prior_variance, mean, variance = (part.float()[None] for part in parts)
        none = mean.new_zeros(1, 1, 0)
        return ContinuousOutputs(prior_mean, prior_variance.log(), mean, variance.log(), none, none[:, 0].bool())

    def compute_metrics(self) -> dict[str, Tensor]:
        """Return the metrics of the split by log key."""
        result = self.metrics.compute_and_reset(self.c_base)
        return result | {"diagnostics/num_eval_samples": torch.tensor(2.0 * self.num_eval_samples, device=self.device)}
