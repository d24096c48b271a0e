"""The posterior network q(z|x,y): a backbone of its own, a pooling head and a projection."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.causal_lm import decoder_of, read_hidden

Pooling = Literal["mean", "last", "attention"]


class PosteriorNetwork(nn.Module):
    """Reads the z-free record and pools its y-region into ``size`` numbers per example.

    Args:
        lm: a causal LM of its own, usually a copy of the entangled one; only its decoder is kept.
        size: number of outputs: K logits, or 2 D for a Gaussian.
        pooling: ``mean`` over the y-region, its ``last`` token, or ``attention`` with one learned query.
    """

    def __init__(self, lm: Any, size: int, pooling: Pooling = "mean") -> None:
        super().__init__()
        if pooling not in ("mean", "last", "attention"):
            raise ValueError(f"pooling must be 'mean', 'last' or 'attention', got {pooling!r}")
        self.backbone = decoder_of(lm)
        self.pooling = pooling
        width = lm.get_input_embeddings().weight.shape[1]
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(width)) if pooling == "attention" else None
        self.project = nn.Linear(width, size)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, ids: Tensor, mask: Tensor, region: Tensor) -> Tensor:
        """Return [B, size] in fp32.

        Args:
            ids, mask: [B, L] the z-free record. region: [B, L] bool, the y-tokens; at least one in every row.
        """
        hidden = read_hidden(self.backbone, ids, mask)  # [B, L, D]
        if self.pooling == "last":
            position = (region * torch.arange(1, region.shape[1] + 1, device=region.device)).argmax(-1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), position]
        else:
            score = hidden.new_zeros(region.shape) if self.query is None else hidden @ self.query.to(hidden.dtype)
            share = score.float().masked_fill(~region, float("-inf")).softmax(-1)
            pooled = (share.to(hidden.dtype)[..., None] * hidden).sum(1)
        return self.project(self.norm(pooled.to(self.norm.weight.dtype))).float()
