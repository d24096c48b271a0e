"""What a trained Gaussian latent is used for: routing, inference, scoring and generation from texts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from cvae_lightning.backbones.branches import BranchOutput
from cvae_lightning.backbones.causal_lm import evaluating
from cvae_lightning.backbones.conditioning import LatentNorms, LatentPrefix
from cvae_lightning.backbones.generation import expansion
from cvae_lightning.functional import gaussian_log_prob, gaussian_sample, importance_weighted_evidence
from cvae_lightning.modules.text_use import TextUse, check_texts, latent_source, record_seeds, rounded
from cvae_lightning.outputs import PairBatch
from cvae_lightning.template import Text


class GaussianUse(TextUse):
    """The part of a continuous CVAE that takes and gives texts."""

    latent_dim: int
    num_eval_samples: int
    prefix: LatentPrefix
    norms: LatentNorms | None

    @abstractmethod
    def posterior(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z|x,y), [B, D] each."""

    @abstractmethod
    def router(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of p(z|x), [B, D] each, from hidden states [B, E] at ``<z>``."""

    @abstractmethod
    def read_prompt(self, batch: PairBatch) -> Tensor:
        """Return the hidden state at ``<z>``, [B, E]."""

    @abstractmethod
    def latent_vectors(self, latents: Tensor) -> Tensor:
        """Return what stands in the latent slot, [..., m, E]."""

    @abstractmethod
    def encode(self, batch: PairBatch, latents: Tensor) -> BranchOutput:
        """Run the shared prefix ``<bos> <x> x </x> <z>`` and a branch behind it for each latent [B, S, D]."""

    @abstractmethod
    def generator(self, hidden: Tensor, batch: PairBatch, need_jsd: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return -log p(y_t|x,z_s,y_<t), [B, S, T], and the inter-latent JSD, [B, T], if asked for."""

    @staticmethod
    def log_ratio(
        z: Tensor,
        p: tuple[Tensor, Tensor],
        q: tuple[Tensor, Tensor],
        own: int,
        proposed: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return log p(z|x) - log r(z), [B, S], for samples of which ``own`` come from q and the others from p.

        The proposal r is the mixture of q and p in these shares, and is held fixed. So the ratio is bounded, and its
        mean has a small variance even where q misses a mode (Hesterberg 1995, defensive mixtures; Veach & Guibas 1995,
        the balance heuristic). Where dropout gives p anew in every pass, ``proposed`` is the p of the others' pass.
        """
        log_p, log_q = (gaussian_log_prob(z, mean[:, None], logvar[:, None]) for mean, logvar in (p, q))
        log_other = log_p if proposed is None else gaussian_log_prob(z, *(part[:, None] for part in proposed))
        share = own / z.shape[1]
        return log_p - torch.logaddexp(log_q + math.log(share), log_other + math.log1p(-share)).detach()

    @torch.no_grad()
    def route(self, x: Sequence[Text], batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of p(z|x) for texts x, [len(x), D] each, on the CPU."""
        rows = [(torch.empty(0, self.latent_dim),) * 2]
        for batch in self.text_batches(x, None, batch_size):
            with evaluating(self):
                mean, logvar = self.router(self.read_prompt(batch))
            rows.append((mean.cpu(), logvar.cpu()))
        return torch.cat([mean for mean, _ in rows]), torch.cat([logvar for _, logvar in rows])

    @torch.no_grad()
    def infer(self, x: Sequence[Text], y: Sequence[Text], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z|x,y) for solved problems, [len(x), D] each, on the CPU."""
        rows = [(torch.empty(0, self.latent_dim),) * 2]
        for batch in self.text_batches(x, y, batch_size):
            with evaluating(self):
                mean, logvar = self.posterior(batch)
            rows.append((mean.cpu(), logvar.cpu()))
        return torch.cat([mean for mean, _ in rows]), torch.cat([logvar for _, logvar in rows])

    def log_evidence(
        self,
        x: Sequence[Text],
        y: Sequence[Text],
        num_samples: int | None = None,
        generator_seed: int = 0,
        batch_size: int = 16,
    ) -> Tensor:
        """Return an importance-weighted estimate of log p(y|x) for solved problems, [len(x)] nats, on the CPU.

        It is a lower bound in expectation, tighter with more samples. y counts with its end: ``</y>`` and ``<eos>``.

        Args:
            x: inputs, as texts or all as token ids.
            y: their solutions, likewise.
            num_samples: samples of z from the posterior, and as many from the router; None = ``num_eval_samples``.
            generator_seed: the samples of a record are a function of this seed and of its place among the records.
            batch_size: records at a time.

        Raises:
            ValueError: if ``num_samples`` is below 1.
        """
        samples = self.num_eval_samples if num_samples is None else num_samples
        if samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {samples}")
        rows, done = [torch.empty(0)], 0
        for batch in self.text_batches(x, y, batch_size):
            seeds = record_seeds(range(done, done + len(batch)), generator_seed)
            rows.append(self._evidence(batch, samples, seeds)["log_evidence"].cpu())
            done += len(batch)
        return torch.cat(rows)

    @torch.no_grad()
    def _evidence(
        self, batch: PairBatch, samples: int, seeds: Sequence[int], z: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the evidence of a batch with its error, [B] each, q, and log p(y|x,z) of one more z [B, D], if given.

        The samples of a row are drawn from its seed, on the CPU: whatever stands beside it, and on any device.
        """
        with evaluating(self):
            q, p = self.posterior(batch), self.router(self.read_prompt(batch))
            drawn = []
            with torch.random.fork_rng([]):
                for i, seed in enumerate(seeds):
                    torch.default_generator.manual_seed(seed)
                    for (mean, logvar), coupled in ((q, False), (p, True)):
                        one = mean[i : i + 1].cpu(), logvar[i : i + 1].cpu()
                        drawn.append(gaussian_sample(*one, samples, coupled))
            both = torch.cat(drawn, 1).unflatten(1, (len(batch), 2 * samples))[0].to(self.device)  # [B, 2 S, D]
            latents = both if z is None else torch.cat([both, z[:, None].to(both)], 1)
            nll = self.generator(self.encode(batch, latents).hidden, batch)[0].sum(-1)
        log_weights = self.log_ratio(both, p, q, samples) - nll[:, : 2 * samples]
        evidence, error = importance_weighted_evidence(log_weights)
        found = {"log_evidence": evidence, "log_evidence_error": error}
        found |= {"posterior_mean": q[0], "posterior_logvar": q[1]}
        return found if z is None else found | {"log_likelihood": -nll[:, -1]}

    def generate(
        self, x: Sequence[Text], z: Tensor | Literal["router", "mean"] = "router", **options: Any
    ) -> list[Any]:
        """Return one y per x; a list of them where several are asked for.

        Args:
            x: inputs, as texts or all as token ids; y is of the same kind.
            z: latents [len(x), D], one latent [D] for all, ``router`` to sample from p(z|x), or ``mean`` of p(z|x).
            options: ``generator_seed``, ``batch_size`` (rows of the model's batch), and those of transformers'
                ``GenerationConfig``: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``, ``num_beams``,
                ``repetition_penalty`` (of what y itself holds), ``num_return_sequences`` (a list of y in the place of
                each y) ... Greedy texts and plain samples are the fastest.

        Raises:
            ValueError: if the latents have another shape, or an option is wrong.
        """
        check_texts(x, "x")
        if not len(x):
            return []
        latents = self._latents(x, z, options.get("generator_seed")).to(self.device)
        m = self.template.marker_ids
        section = [m["<z>"], *[m["</z>"]] * (self.prefix.length + 1)]  # placeholders for the vectors, then </z>

        def embed(ids: Tensor, rows: Tensor) -> Tensor:
            embedded = self.lm.get_input_embeddings()(ids)
            vectors = self.latent_vectors(latents[rows]).to(embedded.dtype)
            end = embedded.shape[1] - 2
            if self.norms is not None:
                wide = latents[rows].repeat_interleave(expansion(options), 0)
                self.norms.condition(wide, end - vectors.shape[1])
            return torch.cat([embedded[:, : end - vectors.shape[1]], vectors, embedded[:, end:]], 1)

        with torch.no_grad(), nullcontext() if self.norms is None else self.norms.given(None):
            return self.generate_from(x, [section] * len(x), embed=embed, shrink=self.norms is None, **options)

    def _latents(self, x: Sequence[Text], z: Tensor | str, seed: int | None) -> Tensor:
        if isinstance(z, str):
            if z not in ("router", "mean"):
                raise ValueError(f"z must be a tensor of latents, 'router' or 'mean', got {z!r}")
            mean, logvar = self.route(x)
            if z == "mean":
                return mean
            return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=latent_source(seed))
        z = torch.as_tensor(z)
        latents = z.expand(len(x), -1) if z.ndim == 1 else z
        if latents.shape != (len(x), self.latent_dim):
            raise ValueError(f"z must have shape [{len(x)}, {self.latent_dim}], got {list(z.shape)}")
        return latents.float()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per record: x, the router's Gaussian, a z drawn from it, and the greedy y under that z.

        Where the record holds a solution, ``target`` is this solution, ``log_likelihood`` its log p(y|x,z),
        ``posterior_mean`` and ``posterior_logvar`` its q(z|x,y), and ``log_evidence`` an importance-weighted estimate
        of its log p(y|x) with its standard error, in nats; else they are None. Whatever is drawn is a function of the
        record's index. (The router's mean is no good z where its mass lies around it.)
        """
        x, indices = list(batch.x), batch.index.tolist()
        mean, logvar = self.route(x)
        draws = [torch.randn(self.latent_dim, generator=torch.Generator().manual_seed(i)) for i in indices]
        z = mean + (0.5 * logvar).exp() * torch.stack(draws)
        columns = {"z": z, "router_mean": mean, "router_logvar": logvar}
        rows = [
            {"index": i, "x": a} | {name: rounded(values[n]) for name, values in columns.items()} | {"y": y}
            for n, (i, a, y) in enumerate(zip(indices, x, self.generate(x, z), strict=True))
        ]
        known: dict[str, Tensor] = {}
        if any(batch.y):
            self.check_positions(batch)
            known = self._evidence(batch, self.num_eval_samples, record_seeds(indices), z)
        names = ("log_likelihood", "posterior_mean", "posterior_logvar", "log_evidence", "log_evidence_error")
        for n, (row, y) in enumerate(zip(rows, batch.y, strict=True)):
            row["target"] = y or None
            row |= {name: rounded(known[name][n]) if y else None for name in names}
        return rows
