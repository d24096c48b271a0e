"""What a trained discrete latent is used for: routing, inference, scoring and generation from texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.branches import BranchOutput, run_branches
from cvae_lightning.backbones.causal_lm import evaluating
from cvae_lightning.backbones.conditioning import LatentNorms
from cvae_lightning.backbones.generation import expansion
from cvae_lightning.functional import exact_posterior, log_marginal_likelihood
from cvae_lightning.modules.text_use import TextUse, batched, check_texts, latent_source, rounded
from cvae_lightning.outputs import PairBatch
from cvae_lightning.template import Text

PosteriorKind = Literal["exact", "amortized"]


class DiscreteUse(TextUse):
    """The part of a discrete CVAE that takes and gives texts."""

    num_latents: int
    posterior_kind: PosteriorKind
    posterior_temperature: float
    latent_vectors: nn.Embedding
    norms: LatentNorms | None

    @property
    @abstractmethod
    def uses_posterior_network(self) -> bool:
        """Whether training teaches the posterior network."""

    @abstractmethod
    def encode(self, batch: PairBatch) -> BranchOutput:
        """Run the shared prefix ``<bos> <x> x </x> <z>`` and the K branches behind it."""

    @abstractmethod
    def router(self, branches: BranchOutput) -> Tensor:
        """Return log p(z_k|x), [B, K]."""

    @abstractmethod
    def generator(self, branches: BranchOutput, batch: PairBatch, need_jsd: bool) -> tuple[Tensor, Tensor | None]:
        """Return -log p(y_t|x,z_k,y_<t), [B, K, T], and the inter-latent JSD, [B, T], if asked for."""

    @abstractmethod
    def amortized_posterior(self, batch: PairBatch) -> Tensor:
        """Return log q_xi(z_k|x,y), [B, K], from the posterior network."""

    def latent_sections(self) -> Tensor:
        """Return what stands behind ``<z>`` in every branch, ``z_k </z> <y>``, [K, m + 2] ids."""
        end = [self.template.marker_ids[token] for token in ("</z>", "<y>")]
        return torch.tensor([row + end for row in self.template.latent_prefixes], device=self.device)

    @torch.no_grad()
    def route(self, x: Sequence[Text], batch_size: int = 256) -> Tensor:
        """Return log p(z_k|x) for texts x, [len(x), K], on the CPU.

        Raises:
            ValueError: if an x is too long for the model.
        """
        check_texts(x, "x")
        rows = [torch.empty(0, self.num_latents)]
        for part in batched(x, batch_size):
            ids, mask = (t.to(self.device) for t in self.template.prefixes(part))
            z = torch.full_like(ids[:, :1], self.template.marker_ids["<z>"])
            ids, mask = torch.cat([ids, z], -1), torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
            self.check_room(part, mask.sum(-1))
            with evaluating(self):
                hidden = run_branches(self.lm, ids, mask, ids[:, None, :0], mask[:, :0], "repeat").router_hidden
            rows.append(self.router(BranchOutput(hidden[:, None, None], hidden)).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def infer(
        self,
        x: Sequence[Text],
        y: Sequence[Text],
        posterior: PosteriorKind | None = None,
        temperature: float | None = None,
        batch_size: int = 32,
    ) -> Tensor:
        """Return log q(z_k|x,y) for solved problems, [len(x), K], on the CPU.

        Args:
            x: inputs, as texts or all as token ids.
            y: their solutions, likewise.
            posterior: ``exact``, by scoring y under every latent, or ``amortized``, by the posterior network alone;
                None = what the module was trained with.
            temperature: beta of the exact posterior; None = the module's. 1 is Bayes' rule.
            batch_size: records at a time.

        Raises:
            ValueError: for another ``posterior``, a temperature that is not positive or has no effect, or a posterior
                network that nothing has trained.
        """
        kind = self.posterior_kind if posterior is None else posterior
        if kind not in ("exact", "amortized"):
            raise ValueError(f"posterior must be 'exact' or 'amortized', got {posterior!r}")
        if kind == "amortized" and temperature is not None:
            raise ValueError("temperature belongs to posterior='exact': the posterior network has its own, learned one")
        beta = self.posterior_temperature if temperature is None else temperature
        rows = [torch.empty(0, self.num_latents)]
        for batch in self.text_batches(x, y, batch_size):
            scores = self._scores(batch) if kind == "exact" else None
            rows.append(self._log_posterior(batch, scores, beta).cpu())
        return torch.cat(rows)

    def log_likelihood(self, x: Sequence[Text], y: Sequence[Text], batch_size: int = 32) -> Tensor:
        """Return log p(y|x,z_k) for solved problems, [len(x), K] nats, on the CPU."""
        rows = [-nll.cpu() for _, nll in self._scored(x, y, batch_size)]
        return torch.cat([torch.empty(0, self.num_latents), *rows])

    def log_evidence(self, x: Sequence[Text], y: Sequence[Text], batch_size: int = 32) -> Tensor:
        """Return log p(y|x) = log sum_k p(z_k|x) p(y|x,z_k) for solved problems, [len(x)] nats, on the CPU.

        It is exact, whatever the posterior and its temperature. y counts with its end: ``</y>`` and ``<eos>``.
        """
        rows = [log_marginal_likelihood(*scores).cpu() for scores in self._scored(x, y, batch_size)]
        return torch.cat([torch.empty(0), *rows])

    def generate(
        self,
        x: Sequence[Text],
        z: int | Sequence[int] | Literal["router", "argmax", "all"] = "router",
        **options: Any,
    ) -> list[Any]:
        """Return one y per x; a list of them where several are asked for.

        Args:
            x: inputs, as texts or all as token ids; y is of the same kind.
            z: a latent for all x, one latent per x, ``router`` to draw one z for each x from p(z|x), ``argmax`` of
                p(z|x), or ``all`` for a list of K y per x, as :meth:`generate_all`.
            options: ``generator_seed``, ``batch_size`` (rows of the model's batch), and those of transformers'
                ``GenerationConfig``: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``, ``num_beams``,
                ``repetition_penalty``, ``num_return_sequences`` (a list of y in the place of each y) ... Greedy texts
                and plain samples are the fastest.

        Raises:
            ValueError: if a latent is not in 0 .. K-1, their number differs from that of x, or an option is wrong.
        """
        check_texts(x, "x")
        if isinstance(z, str) and z == "all":
            return self.generate_all(x, **options)
        if not len(x):
            return []
        if isinstance(z, str):
            if z not in ("router", "argmax"):
                raise ValueError(f"z must be a latent, a list of latents, 'router', 'argmax' or 'all', got {z!r}")
            log_probs = self.route(x)
            source = latent_source(options.get("generator_seed"))
            drawn = log_probs.argmax(-1) if z == "argmax" else torch.multinomial(log_probs.exp(), 1, generator=source)
            latents = drawn.flatten().tolist()
        else:
            several: Any = z if isinstance(z, Sequence) or getattr(z, "ndim", 0) > 0 else [z] * len(x)
            try:
                latents = [index(k) for k in several]
            except TypeError as error:
                raise ValueError(f"z must be a latent or a list of latents, got {z!r:.80}") from error
        if len(latents) != len(x) or not all(0 <= k < self.num_latents for k in latents):
            raise ValueError(f"z must name latents 0 .. {self.num_latents - 1}, one for all or one per x, got {z!r}")
        m, prefixes = self.template.marker_ids, self.template.latent_prefixes
        section = [[m["<z>"], *prefixes[k], m["</z>"]] for k in latents]
        return self._generate(x, section, torch.tensor(latents)[:, None], self.template.section_length - 1, **options)

    def generate_all(self, x: Sequence[Text], **options: Any) -> list[list[Any]]:
        """Return, for each x, one y under every latent; each x is read once for all of them.

        Args:
            x: inputs, as texts or all as token ids; y is of the same kind.
            options: as for :meth:`generate`.
        """
        check_texts(x, "x")
        section = [[self.template.marker_ids["<z>"]]] * len(x)
        latents = torch.arange(self.num_latents).expand(len(x), -1)
        ys = self._generate(x, section, latents, 0, branches=self.latent_sections(), **options)
        return [ys[i : i + self.num_latents] for i in range(0, len(ys), self.num_latents)]

    def _generate(
        self, x: Sequence[Text], section: list[list[int]], latents: Tensor, conditioned: int, **options: Any
    ) -> list[Any]:
        """Continue each x behind its section, with norms that see the latents [len(x), branches of an x].

        They are conditioned from the last ``conditioned`` tokens of the prompt on.
        """
        norms = self.norms
        if norms is None:
            return self.generate_from(x, section, **options)

        def condition(ids: Tensor, rows: Tensor) -> Tensor:
            vectors = self.latent_vectors(latents[rows].flatten().to(self.device))
            norms.condition(vectors.repeat_interleave(expansion(options), 0), ids.shape[1] - conditioned)
            return ids

        with torch.no_grad(), norms.given(None):
            return self.generate_from(x, section, embed=condition, shrink=False, **options)

    @torch.no_grad()
    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per record: x, the argmax latent, p(z|x) and the greedy y under that latent.

        Where the record holds a solution, ``target`` is this solution, ``log_likelihood`` its log p(y|x,z_k) under
        every latent, ``posterior`` its q(z_k|x,y) and ``log_evidence`` its log p(y|x), in nats; else they are None.
        """
        x = list(batch.x)
        probs = self.route(x).exp()
        z = probs.argmax(-1).tolist()
        rows = [
            {"index": i, "x": a, "z": k, "router": rounded(row), "y": b}
            for i, a, k, row, b in zip(batch.index.tolist(), x, z, probs, self.generate(x, z), strict=True)
        ]
        known: dict[str, Any] = {}
        if any(batch.y):
            self.check_positions(batch)
            scores = self._scores(batch)
            q = self._log_posterior(batch, scores if self.posterior_kind == "exact" else None).exp()
            known = {"log_likelihood": -scores[1], "posterior": q, "log_evidence": log_marginal_likelihood(*scores)}
        for n, (row, y) in enumerate(zip(rows, batch.y, strict=True)):
            row["target"] = y or None
            for name in ("log_likelihood", "posterior", "log_evidence"):
                row[name] = rounded(known[name][n]) if y else None
        return rows

    def _scored(self, x: Sequence[Text], y: Sequence[Text], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._scores(batch) for batch in self.text_batches(x, y, batch_size))

    @torch.no_grad()
    def _scores(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return log p(z_k|x) and -log p(y|x,z_k), [B, K] each."""
        with evaluating(self):
            branches = self.encode(batch)
            return self.router(branches), self.generator(branches, batch, False)[0].sum(-1)

    def _log_posterior(
        self, batch: PairBatch, scores: tuple[Tensor, Tensor] | None, temperature: float | None = None
    ) -> Tensor:
        """Return log q(z_k|x,y), [B, K]: exact where the scores are given, else amortized."""
        if scores is not None:
            return exact_posterior(*scores, self.posterior_temperature if temperature is None else temperature)
        if not self.uses_posterior_network:
            raise ValueError(
                "the posterior network of this model was not trained: use posterior='exact', or train with "
                "PosteriorDistillationLoss"
            )
        with evaluating(self):
            return self.amortized_posterior(batch)
