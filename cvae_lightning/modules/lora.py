"""LoRA: the size and the place of low-rank adapters."""

from __future__ import annotations

from typing import Any

from cvae_lightning.backbones.adaptation import add_low_rank
from cvae_lightning.spec import HasSpec


class LoRA(HasSpec):
    """Low-rank adapters W + alpha / rank B A beside linear maps W, which stay as they are.

    B starts at zero, so that the adapted model starts as the entangled one. Source: Hu et al. 2022, arXiv 2106.09685;
    on all maps rather than some of those of attention, as Dettmers et al. 2023, arXiv 2305.14314, found needed.

    Args:
        rank: of the update, at least 1.
        alpha: the update is scaled by alpha / rank; > 0.
        dropout: of what the adapters read; in 0 .. 1.
        target_modules: names of the linear maps, as ``[q_proj, v_proj]``; null = all of attention and MLP, whatever the
            family calls them (GPT-2: c_attn, c_proj, c_fc; Llama, Qwen and Gemma: q_proj, k_proj, v_proj, o_proj,
            gate_proj, up_proj, down_proj), and never the head.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, target_modules: list[str] | None = None
    ) -> None:
        if rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {rank}")
        if alpha <= 0:
            raise ValueError(f"lora.alpha must be positive, got {alpha}")
        if not 0 <= dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, got {dropout}")
        if target_modules is not None and not target_modules:
            raise ValueError("lora.target_modules is empty: name linear maps, or give null for all of them")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = target_modules

    def add_to(self, lm: Any) -> None:
        """Put the adapters into a causal LM, in place, and freeze all the rest of it."""
        add_low_rank(lm, self.rank, self.alpha, self.dropout, self.target_modules)
