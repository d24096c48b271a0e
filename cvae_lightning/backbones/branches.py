"""The K branches of an enumerated latent behind one shared prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cvae_lightning.backbones.causal_lm import decoder_of

BranchMethod = Literal["cache", "repeat"]


@dataclass(frozen=True)
class BranchOutput:
    """Hidden states of the branches and of the position that routes.

    Shape:
        hidden: [B, K, S, D] at every suffix token. router_hidden: [B, D] at the last prefix token.
    """

    hidden: Tensor
    router_hidden: Tensor


def run_branches(
    lm: Any,
    prefix_ids: Tensor,
    prefix_mask: Tensor,
    suffix: Tensor,
    suffix_mask: Tensor,
    method: BranchMethod = "cache",
) -> BranchOutput:
    """Read the prefix and, behind it, K suffixes.

    Positions count real tokens, so padding on either side of the prefix changes nothing.

    Args:
        lm: a Hugging Face causal LM.
        prefix_ids, prefix_mask: [B, P]; bool mask, True counts.
        suffix: [B, K, S] token ids, or [B, K, S, D] input embeddings where a latent is a vector.
        suffix_mask: [B, S], shared by the branches, padded on the right.
        method: ``cache`` reads the prefix once and copies its keys and values to the branches; ``repeat`` reads it K
            times, works for every family, and is the reference.
    """
    batch, num_latents, length = suffix.shape[:3]
    embedded = suffix.is_floating_point()
    width = prefix_ids.shape[1]
    last = (prefix_mask * torch.arange(1, width + 1, device=prefix_mask.device)).argmax(-1)
    rows = torch.arange(batch, device=last.device)
    prefix_positions = (prefix_mask.long().cumsum(-1) - 1).clamp_min(0)
    suffix_positions = prefix_mask.sum(-1, keepdim=True) + torch.arange(length, device=last.device)  # [B, S]
    mask = torch.cat([prefix_mask, suffix_mask], -1).long().repeat_interleave(num_latents, 0)  # [B*K, P+S]
    decoder = decoder_of(lm)

    if method == "repeat":
        prefix = decoder.get_input_embeddings()(prefix_ids) if embedded else prefix_ids
        tokens = torch.cat([prefix[:, None].expand(-1, num_latents, *prefix.shape[1:]), suffix], 2).flatten(0, 1)
        positions = torch.cat([prefix_positions, suffix_positions], -1).repeat_interleave(num_latents, 0)
        hidden = decoder(
            **{"inputs_embeds" if embedded else "input_ids": tokens},
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        hidden = hidden.unflatten(0, (batch, num_latents))  # [B, K, P+S, D]
        return BranchOutput(hidden[:, :, width:], hidden[rows, 0, last])

    from transformers import DynamicCache

    prefix = decoder(
        input_ids=prefix_ids,
        attention_mask=prefix_mask.long(),
        position_ids=prefix_positions,
        past_key_values=DynamicCache(config=lm.config),
        use_cache=True,
    )
    cache = prefix.past_key_values
    if cache is None or cache.get_seq_length() != width:
        raise ValueError("this model did not keep the prefix in its cache (gradient checkpointing?): use method=repeat")
    cache.batch_repeat_interleave(num_latents)  # differentiable
    hidden = decoder(
        **{"inputs_embeds" if embedded else "input_ids": suffix.flatten(0, 1)},
        attention_mask=mask,
        position_ids=suffix_positions.repeat_interleave(num_latents, 0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return BranchOutput(hidden.unflatten(0, (batch, num_latents)), prefix.last_hidden_state[rows, last])
