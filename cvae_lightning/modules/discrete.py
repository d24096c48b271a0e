"""SharedDiscreteCVAE: K latents as tokens of one shared model, enumerated exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from cvae_lightning.backbones.adaptation import Adaptation, scatter_rows
from cvae_lightning.backbones.branch_activations import ActivationsMode, BranchActivations
from cvae_lightning.backbones.branches import BranchMethod, BranchOutput, run_branches
from cvae_lightning.backbones.causal_lm import evaluating, has_dropout, head_of
from cvae_lightning.backbones.conditioning import LatentNorms, check_norm_branches
from cvae_lightning.backbones.posterior import Pooling, PosteriorNetwork
from cvae_lightning.functional import exact_posterior
from cvae_lightning.losses import LossCallback
from cvae_lightning.metrics.discrete import DiscreteMetrics
from cvae_lightning.modules.base import Outputs
from cvae_lightning.modules.discrete_use import DiscreteUse
from cvae_lightning.modules.language_model import token_stats
from cvae_lightning.modules.lora import LoRA
from cvae_lightning.modules.seeding import LatentSeeding
from cvae_lightning.outputs import DiscreteOutputs, PairBatch


class SharedDiscreteCVAE(DiscreteUse):
    """A conditional VAE whose latent is one of K tokens of a shared causal language model.

    Generative process: z ~ p(z|x), the next-token distribution at ``<z>`` restricted to the K latent tokens;
    y ~ p(y|x,z), the continuation of ``<x> x </x> <z> z_k </z> <y>``. Inference: q(z|x,y), a posterior network that
    reads the z-free record, or the exact posterior q* ~ p(z|x) exp(-sum_t nll_t(z) / temperature) over the enumerated
    latents, which the network then learns by distillation.

    One token is a narrow way into the model. ``prefix_length`` m puts m learned tokens of the latent into the slot, of
    which the first routes: ``<z> z_k z_k.1 ... z_k.(m-1) </z> <y>``. ``norm_dim`` lets a learned vector of the latent
    scale and shift every normalisation layer besides, from the slot on and as the identity at the start. The latent's
    token stays in the slot then too: the router needs it as a label, and leaving it out would only take something away.

    | symbol | variable | shape |
    |---|---|---|
    | log p(z|x) | ``router_log_probs`` | [B, K] |
    | log q(z|x,y) | ``posterior_log_probs``, ``amortized_log_probs`` | [B, K] |
    | -log p(y_t|x,z_k,y_<t) | ``token_nll`` | [B, K, T] |

    Args:
        entangled: the entangled model: an artifact folder, or any Hugging Face causal LM folder or hub name. (A
            checkpoint carries the description of its own model here.)
        losses: terms of the objective by log name; null switches one off.
        num_latents: K, at least 2.
        posterior: what weighs the objective: ``exact`` (enumerated) or ``amortized`` (the posterior network).
        posterior_temperature: beta of the exact posterior and of the free energy; > 0; below 1 sharpens.
        pooling: of the posterior network over the y-region.
        baseline: whose NLL weighs tokens: the ``frozen`` entangled model or the current backbone (``dynamic``).
        c_base: nats per token of the entangled model; ``auto`` reads the artifact, else measures it before training.
        latent_token_std: noise of the latent rows at the start, in units of the embedding's standard deviation.
        branch_method: how the K branches share the prefix: ``cache`` (keys and values), ``grouped`` (one call, also
            under gradient checkpointing), ``packed`` (the same without copies of keys, on a GPU), ``repeat`` (not at
            all); ``auto`` takes the first of cache, grouped and repeat that suits the model.
        num_latent_chunk: latents run at a time, to bound memory; null = all.
        max_length: longest generator prompt in tokens; null = unlimited.
        on_overflow: what happens to a longer record: ``error``, or ``skip`` it and say how many.
        padding_side: side on which x is padded.
        dropout: of generator and posterior; 0 is right for an inter-latent divergence.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate_fraction: share of the peak at which the cosine decay ends.
        weight_decay: of matrices.
        baseline_cache: keep the frozen baseline's NLL on disk, so that the entangled model is run once per record: true
            (below ``trainer.default_root_dir``, in runs that save checkpoints), false, or a folder.
        prefix_length: m, tokens of a latent in the slot; y stands m + 2 tokens later than in the entangled model's
            record, so train that with a ``max_gap`` of at least m + 2.
        norm_dim: size of the vector of a latent that conditions the norm layers; 0 = none. Not under gradient
            checkpointing, nor with branches ``grouped`` or ``packed``. ``load_export`` attaches the norms to an
            exported folder again.
        seeding: where the latents start: at clusters of the entangled model's own solutions; null = at random.
        adaptation: what is trained of the language models of generator and posterior: ``full`` = everything; ``lora`` =
            low-rank adapters and the rows of marker and latent tokens (needs peft); ``frozen`` = those rows alone. With
            the last two, generator, posterior and entangled model are one set of weights in memory. All else (norms,
            vectors of the latents, the posterior's head) is trained with each of them.
        lora: size and place of the adapters; null = ``LoRA()``.
        keep_frozen: keep in checkpoints what ``lora`` and ``frozen`` leave untrained; else a checkpoint names the
            entangled model and the hash of its weights, and needs it.
        branch_activations: what the backward pass has of the branches: ``kept`` = all of it; ``again`` = nothing, and
            it reads those branches again that have a gradient, one or two of K where the posterior is sharp: less
            memory, and less time too. ``num_latent_chunk`` (else two) of them are read at a time; hooks on the language
            model run again with them. Not with dropout, nor with branches ``grouped``, ``packed`` or ``repeat``.
            ``auto`` = on a CPU what takes less time; on an accelerator ``kept``.

    Raises:
        ValueError: for fewer than two latents, a temperature <= 0, a length or size out of range, or an entangled model
            that cannot be read.
    """

    def __init__(
        self,
        entangled: str | dict[str, str],
        losses: dict[str, LossCallback | None],
        num_latents: int = 4,
        posterior: Literal["exact", "amortized"] = "exact",
        posterior_temperature: float = 0.3,
        pooling: Pooling = "mean",
        baseline: Literal["frozen", "dynamic"] = "frozen",
        c_base: float | Literal["auto"] = "auto",
        latent_token_std: float = 1.0,
        branch_method: BranchMethod = "auto",
        num_latent_chunk: int | None = None,
        max_length: int | None = None,
        on_overflow: Literal["error", "skip"] = "error",
        padding_side: Literal["left", "right"] = "left",
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        warmup_steps: int = 30,
        final_learning_rate_fraction: float = 0.05,
        weight_decay: float = 0.0,
        baseline_cache: bool | str = True,
        prefix_length: int = 1,
        norm_dim: int = 0,
        seeding: LatentSeeding | None = None,
        adaptation: Adaptation = "full",
        lora: LoRA | None = None,
        keep_frozen: bool = False,
        branch_activations: ActivationsMode = "auto",
    ) -> None:
        if num_latents < 2:
            raise ValueError(f"num_latents must be at least 2 for z to mean anything, got {num_latents}")
        if posterior_temperature <= 0:
            raise ValueError(f"posterior_temperature must be positive, got {posterior_temperature}")
        if norm_dim < 0:
            raise ValueError(f"norm_dim must be at least 0 (0 = no conditioned norms), got {norm_dim}")
        if norm_dim:
            check_norm_branches(branch_method)
        if branch_activations == "again" and (branch_method not in ("auto", "cache") or dropout):
            raise ValueError(
                "branch_activations=again takes branch_method cache (or auto) and dropout 0, got "
                f"{branch_method} and {dropout}"
            )
        super().__init__(
            entangled,
            losses,
            num_latents,
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
        self.num_latents = num_latents
        self.posterior_kind = posterior
        self.posterior_temperature = posterior_temperature
        self.branch_method: BranchMethod = branch_method
        self.num_latent_chunk = num_latent_chunk
        self.branch_activations = BranchActivations(branch_activations)
        self._prepare_latent_rows(latent_token_std)
        self.posterior_network = PosteriorNetwork(self.posterior_backbone(), num_latents, pooling)
        if norm_dim:
            self.latent_vectors = nn.Embedding(num_latents, norm_dim)
        self.norms = LatentNorms(self.lm, norm_dim) if norm_dim else None  # after the copy of lm
        self.metrics = DiscreteMetrics(num_latents)
        self.seeding = seeding
        if seeding is not None:
            if not self.uses_posterior_network:
                raise ValueError(
                    "seeding teaches the posterior network, and nothing keeps it up to date: add a "
                    "PosteriorDistillationLoss, or set posterior to amortized"
                )
            self.register_buffer("seeded", torch.tensor(False))
            self.register_buffer("seed_counts", torch.zeros(num_latents, dtype=torch.int64))  # precision keeps integers
            self.register_buffer("seed_ways", torch.zeros(num_latents, dtype=torch.int64))
            self.seeded: Tensor
            self.seed_counts: Tensor
            self.seed_ways: Tensor
        self._is_seeded = False  # as the buffer: no step asks a device for it

    @property
    def uses_posterior_network(self) -> bool:
        """Whether the posterior network weighs the objective or some loss reads it; otherwise it is not run."""
        asked = (loss.requires for _, loss in self._named_losses())
        return self.posterior_kind == "amortized" or any("amortized_log_probs" in fields for fields in asked)

    def _prepare_latent_rows(self, std: float) -> None:
        known = self.lm.get_input_embeddings().weight.shape[0]
        self.add_rows(std)
        rows = self.template.all_latent_ids
        source = sorted({*range(min(known, len(self.template)))} - {*rows})
        scatter_rows(self.lm, rows, source, std)

    # The stages. Override one of them to change it.

    def compute_outputs(self, batch: PairBatch, fields: frozenset[str]) -> DiscreteOutputs:
        """Return what losses and metrics read, in the order of the mathematics."""
        branches = self.encode(batch)
        router_log_probs = self.router(branches)
        token_nll, inter_latent_jsd = self.generator(branches, batch, "inter_latent_jsd" in fields)
        amortized_log_probs = self.amortized_posterior(batch) if self.uses_posterior_network else None
        posterior_log_probs = self.posterior(batch, router_log_probs, token_nll, amortized_log_probs)
        return DiscreteOutputs(
            router_log_probs=router_log_probs,
            posterior_log_probs=posterior_log_probs,
            amortized_log_probs=amortized_log_probs,
            token_nll=token_nll,
            y_mask=batch.y_mask,
            temperature=token_nll.new_tensor(self.posterior_temperature),
            c_base=None if self.c_base is None else token_nll.new_tensor(self.c_base),
            baseline_nll=self.baseline_nll(batch) if "baseline_nll" in fields else None,
            inter_latent_jsd=inter_latent_jsd,
            **self._seeds(),
        )

    def encode(self, batch: PairBatch) -> BranchOutput:
        """Run the shared prefix ``<bos> <x> x </x> <z>`` and the K branches behind it."""
        size, sections = len(batch), self.latent_sections()
        y_ids = batch.y_ids[:, None, :-1].expand(-1, self.num_latents, -1)
        suffix_ids = torch.cat([sections.expand(size, -1, -1), y_ids], -1)  # [B, K, m + 1 + T]
        suffix_mask = torch.cat([batch.y_mask.new_ones(size, sections.shape[1]), batch.y_mask[:, :-1]], -1)
        return run_branches(
            self.lm,
            *self._with_z(batch),
            suffix_ids,
            suffix_mask,
            self.branch_method,
            self.num_latent_chunk,
            self.norms,
            None if self.norms is None else self.latent_vectors.weight.expand(size, -1, -1),
            self.branch_activations,
        )

    def router(self, branches: BranchOutput) -> Tensor:
        """Return log p(z_k|x), [B, K]: the logits at ``<z>`` restricted to the latent tokens."""
        rows = torch.tensor(self.template.latent_ids, device=branches.router_hidden.device)
        return head_of(self.lm).logits(branches.router_hidden, rows).log_softmax(-1)

    def generator(self, branches: BranchOutput, batch: PairBatch, need_jsd: bool) -> tuple[Tensor, Tensor | None]:
        """Return -log p(y_t|x,z_k,y_<t), [B, K, T], and the inter-latent JSD, [B, T], if asked for."""
        return token_stats(branches.hidden[:, :, self.template.prefix_length + 1 :], head_of(self.lm), batch, need_jsd)

    def amortized_posterior(self, batch: PairBatch) -> Tensor:
        """Return log q_xi(z_k|x,y), [B, K], from the posterior network."""
        return self.posterior_network(*self._z_free(batch)).log_softmax(-1)

    def posterior(
        self, batch: PairBatch, router_log_probs: Tensor, token_nll: Tensor, amortized_log_probs: Tensor | None
    ) -> Tensor:
        """Return log q(z_k|x,y), [B, K], that weighs the objective.

        The exact posterior takes its values from a pass without dropout, where there is dropout (Shen et al. 2019,
        arXiv 1902.07816), and its gradient from the pass at hand. In the first steps of a seeded run the posterior
        network has its share in it.
        """
        if self.posterior_kind == "amortized":
            assert amortized_log_probs is not None
            return amortized_log_probs
        log_q = exact_posterior(router_log_probs, token_nll.sum(-1), self.posterior_temperature)
        if self.lm.training and has_dropout(self.lm):
            with torch.no_grad(), evaluating(self.lm):
                branches = self.encode(batch)
                clean_nll, _ = self.generator(branches, batch, need_jsd=False)
                clean = exact_posterior(self.router(branches), clean_nll.sum(-1), self.posterior_temperature)
            # normalised behind the exchange of values: the gradient is then that of a softmax at the clean values
            log_q = (log_q + (clean - log_q).detach()).log_softmax(-1)
        if (share := self.seed_share) > 0 and amortized_log_probs is not None:
            log_q = (share * amortized_log_probs.detach() + (1 - share) * log_q).log_softmax(-1)
        return log_q

    @property
    def seed_share(self) -> float:
        """Share of the seeded posterior network in the exact posterior; 0 outside the first steps of training."""
        if self.seeding is None or not (self.training and self._is_seeded):
            return 0.0
        return self.seeding.share(self.global_step)

    @property
    def seed_shares(self) -> Tensor | None:
        """[K] shares of the latents among the seeds, with one more for each; None without a seeding."""
        if self.seeding is None:
            return None
        counts = self.seed_counts.float() + 1
        return counts / counts.sum()

    def _seeds(self) -> dict[str, Tensor | None]:
        return {"seed_shares": self.seed_shares, "seed_ways": None if self.seeding is None else self.seed_ways}

    def on_train_start(self) -> None:
        """Let the seeding say where the latents start, before the first step, unless a checkpoint has said it."""
        if self.seeding is not None and self.global_step == 0 and not bool(self.seeded):
            counts = self.seeding.start(self)
            if counts is not None:
                self.seeded.fill_(True)
                self.seed_counts.copy_(counts)
                self.seed_ways.copy_(self.seeding.ways)
        self._is_seeded = self.seeding is not None and bool(self.seeded)
        wanted = [name for name, loss in self._named_losses() if getattr(loss, "prior", None) in ("seeds", "ways")]
        if wanted and self.seeding is not None and not self.seed_counts.any():
            rank_zero_warn(f"{', '.join(wanted)}: there are no seeds to take the prior from, and it is uniform")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next step decides by, so that a run which is resumed goes on as it would have."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["branch_share"] = self.branch_activations.share

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what was trained with a seeding where the config has none, and the other way round."""
        super().on_load_checkpoint(checkpoint)
        self.branch_activations.share = checkpoint.get("branch_share", 1.0)
        state = checkpoint.get("state_dict", {})
        none = torch.zeros(self.num_latents, dtype=torch.int64)
        for name, value in {"seeded": torch.tensor(False), "seed_counts": none, "seed_ways": none.clone()}.items():
            if self.seeding is None:
                state.pop(name, None)  # a strategy that divides the model has it loaded
            else:
                state.setdefault(name, value)

    # Metrics.

    def setup(self, stage: str) -> None:
        """Size the alignment table by the data's strategies; leave a posterior network that nothing trains alone."""
        super().setup(stage)
        self.posterior_network.requires_grad_(self.uses_posterior_network)
        self.freeze_entangled()
        names = getattr(getattr(self.trainer, "datamodule", None), "strategy_names", None) or []
        self.metrics.set_strategies(len(names))

    def update_metrics(
        self, batch: PairBatch, outputs: Outputs, terms: Mapping[str, Tensor], extra: Mapping[str, Tensor]
    ) -> None:
        """Accumulate one evaluation batch."""
        probs = getattr(getattr(self.trainer, "datamodule", None), "strategy_probs", None)
        true_probs = None
        if probs is not None:  # in fp32, the usual default, which bf16-true changes; every device has it
            true_probs = torch.tensor([probs(x) for x in batch.x], dtype=torch.float32, device=batch.index.device)
        self.metrics.update(cast(DiscreteOutputs, outputs), batch.strategy, terms, extra, true_probs)

    def aggregate_outputs(self) -> DiscreteOutputs:
        """Return one example whose router and posterior are the means over the split."""
        usage = self.metrics.usage.compute()
        router, posterior = (usage[f"aggregate_{part}"].float().log()[None] for part in ("router", "posterior"))
        none = router.new_zeros(1, self.num_latents, 0)
        temperature = router.new_tensor(self.posterior_temperature)
        return DiscreteOutputs(router, posterior, none, none[:, 0].bool(), temperature, **self._seeds())

    def compute_metrics(self) -> dict[str, Tensor]:
        """Return the metrics of the split by log key."""
        return self.metrics.compute_and_reset(self.c_base)
