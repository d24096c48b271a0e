"""What a trained Gaussian latent is used for: routing, inference and generation from texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from cvae_lightning.backbones.causal_lm import evaluating
from cvae_lightning.backbones.conditioning import LatentNorms, LatentPrefix
from cvae_lightning.modules.base import CVAEModule
from cvae_lightning.outputs import PairBatch, Record


class GaussianUse(CVAEModule):
    """The part of a continuous CVAE that takes and gives texts."""

    latent_dim: int
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

    @torch.no_grad()
    def route(self, x: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of p(z|x) for texts x, [len(x), D] each, on the CPU."""
        batch = self.template.collate([Record(text, "") for text in x]).to(self.device)
        with evaluating(self):
            mean, logvar = self.router(self.read_prompt(batch))
        return mean.cpu(), logvar.cpu()

    @torch.no_grad()
    def infer(self, x: Sequence[str], y: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z|x,y) for solved problems, [len(x), D] each, on the CPU."""
        batch = self.template.collate([Record(*pair) for pair in zip(x, y, strict=True)]).to(self.device)
        with evaluating(self):
            mean, logvar = self.posterior(batch)
        return mean.cpu(), logvar.cpu()

    def generate(self, x: Sequence[str], z: Tensor | Literal["router", "mean"] = "router", **options: Any) -> list[str]:
        """Return one y per x.

        Args:
            x: inputs.
            z: latents [len(x), D], one latent [D] for all, ``router`` to sample from p(z|x), or ``mean`` of p(z|x).
            options: ``do_sample``, ``temperature``, ``max_new_tokens``, ``generator_seed``, ``batch_size``.

        Raises:
            ValueError: if the latents have another shape.
        """
        if not len(x):
            return []
        latents = self._latents(x, z, options.get("generator_seed")).to(self.device)
        m = self.template.marker_ids
        section = [m["<z>"], *[m["</z>"]] * (self.prefix.length + 1)]  # placeholders for the vectors, then </z>

        def embed(ids: Tensor, rows: slice) -> Tensor:
            embedded = self.lm.get_input_embeddings()(ids)
            vectors = self.latent_vectors(latents[rows]).to(embedded.dtype)
            end = embedded.shape[1] - 2
            if self.norms is not None:
                self.norms.condition(latents[rows], end - vectors.shape[1])
            return torch.cat([embedded[:, : end - vectors.shape[1]], vectors, embedded[:, end:]], 1)

        with torch.no_grad(), nullcontext() if self.norms is None else self.norms.given(None):
            return self.generate_from(x, [section] * len(x), embed=embed, shrink=self.norms is None, **options)

    def _latents(self, x: Sequence[str], z: Tensor | str, seed: int | None) -> Tensor:
        if isinstance(z, str):
            if z not in ("router", "mean"):
                raise ValueError(f"z must be a tensor of latents, 'router' or 'mean', got {z!r}")
            mean, logvar = self.route(x)
            if z == "mean":
                return mean
            source = None if seed is None else torch.Generator().manual_seed(seed)
            return mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=source)
        latents = z.expand(len(x), -1) if z.ndim == 1 else z
        if latents.shape != (len(x), self.latent_dim):
            raise ValueError(f"z must have shape [{len(x)}, {self.latent_dim}], got {list(z.shape)}")
        return latents.float()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per record: x, the router's Gaussian, a z drawn from it, and the greedy y under that z.

        The draw is a function of the record's index. (The router's mean is no good z where its mass lies around it.)
        """
        x, indices = list(batch.x), batch.index.tolist()
        mean, logvar = self.route(x)
        draws = [torch.randn(self.latent_dim, generator=torch.Generator().manual_seed(i)) for i in indices]
        z = mean + (0.5 * logvar).exp() * torch.stack(draws)
        columns = {"z": z, "router_mean": mean, "router_logvar": logvar}
        rows = zip(indices, x, self.generate(x, z), strict=True)
        return [
            {"index": i, "x": a}
            | {name: [round(v, 6) for v in values[n].tolist()] for name, values in columns.items()}
            | {"y": y}
            for n, (i, a, y) in enumerate(rows)
        ]
