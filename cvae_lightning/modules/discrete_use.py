"""What a trained discrete latent is used for: routing and generation from texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.branches import BranchOutput, run_branches
from cvae_lightning.backbones.causal_lm import evaluating
from cvae_lightning.backbones.conditioning import LatentNorms
from cvae_lightning.modules.base import CVAEModule
from cvae_lightning.outputs import PairBatch


class DiscreteUse(CVAEModule):
    """The part of a discrete CVAE that takes and gives texts."""

    num_latents: int
    latent_vectors: nn.Embedding
    norms: LatentNorms | None

    @abstractmethod
    def router(self, branches: BranchOutput) -> Tensor:
        """Return log p(z_k|x), [B, K]."""

    def latent_sections(self) -> Tensor:
        """Return what stands behind ``<z>`` in every branch, ``z_k </z> <y>``, [K, m + 2] ids."""
        end = [self.template.marker_ids[token] for token in ("</z>", "<y>")]
        return torch.tensor([row + end for row in self.template.latent_prefixes], device=self.device)

    @torch.no_grad()
    def route(self, x: Sequence[str]) -> Tensor:
        """Return log p(z_k|x) for texts x, [len(x), K], on the CPU."""
        ids, mask = (t.to(self.device) for t in self.template.prefixes(x))
        z = torch.full_like(ids[:, :1], self.template.marker_ids["<z>"])
        ids, mask = torch.cat([ids, z], -1), torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
        with evaluating(self):
            hidden = run_branches(self.lm, ids, mask, ids[:, None, :0], mask[:, :0], "repeat").router_hidden
        return self.router(BranchOutput(hidden[:, None, None], hidden)).cpu()

    def generate(
        self, x: Sequence[str], z: int | Sequence[int] | Literal["router", "argmax"] = "router", **options: Any
    ) -> list[str]:
        """Return one y per x.

        Args:
            x: inputs.
            z: a latent for all x, one latent per x, ``router`` to sample z from p(z|x), or ``argmax`` of p(z|x).
            options: ``do_sample``, ``temperature``, ``max_new_tokens``, ``generator_seed``, ``batch_size``.

        Raises:
            ValueError: if a latent is not in 0 .. K-1, or their number differs from that of x.
        """
        if not len(x):
            return []
        if isinstance(z, str):
            if z not in ("router", "argmax"):
                raise ValueError(f"z must be a latent, a list of latents, 'router' or 'argmax', got {z!r}")
            log_probs = self.route(x)
            seed = options.get("generator_seed")
            source = None if seed is None else torch.Generator().manual_seed(seed)
            drawn = log_probs.argmax(-1) if z == "argmax" else torch.multinomial(log_probs.exp(), 1, generator=source)
            latents = drawn.flatten().tolist()
        else:
            latents = [z] * len(x) if isinstance(z, int) else list(z)
        if len(latents) != len(x) or not all(0 <= k < self.num_latents for k in latents):
            raise ValueError(f"z must name latents 0 .. {self.num_latents - 1}, one for all or one per x, got {z!r}")
        m, prefixes = self.template.marker_ids, self.template.latent_prefixes
        section = [[m["<z>"], *prefixes[k], m["</z>"]] for k in latents]
        return self._generate(x, section, torch.tensor(latents)[:, None], self.template.section_length - 1, **options)

    def generate_all(self, x: Sequence[str], **options: Any) -> list[list[str]]:
        """Return, for each x, one y under every latent; each x is read once for all of them.

        Args:
            x: inputs.
            options: as for :meth:`generate`; ``batch_size`` counts y.
        """
        section = [[self.template.marker_ids["<z>"]]] * len(x)
        latents = torch.arange(self.num_latents).expand(len(x), -1)
        ys = self._generate(x, section, latents, 0, branches=self.latent_sections(), **options)
        return [ys[i : i + self.num_latents] for i in range(0, len(ys), self.num_latents)]

    def _generate(
        self, x: Sequence[str], section: list[list[int]], latents: Tensor, conditioned: int, **options: Any
    ) -> list[str]:
        """Continue each x behind its section, with norms that see the latents [len(x), branches of an x].

        They are conditioned from the last ``conditioned`` tokens of the prompt on.
        """
        norms = self.norms
        if norms is None:
            return self.generate_from(x, section, **options)

        def condition(ids: Tensor, rows: slice) -> Tensor:
            vectors = self.latent_vectors(latents[rows].flatten().to(self.device))
            norms.condition(vectors, ids.shape[1] - conditioned)
            return ids

        with torch.no_grad(), norms.given(None):
            return self.generate_from(x, section, embed=condition, shrink=False, **options)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per record: x, the argmax latent, p(z|x) and the greedy y under that latent."""
        x = list(batch.x)
        probs = self.route(x).exp()
        z = probs.argmax(-1).tolist()
        ys = self.generate(x, z)
        return [
            {"index": i, "x": a, "z": k, "router": [round(p, 6) for p in row], "y": b}
            for i, a, k, row, b in zip(batch.index.tolist(), x, z, probs.tolist(), ys, strict=True)
        ]
