"""Batched generation behind a prompt, with positions that count real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.backbones.causal_lm import decoder_of, head_of


@torch.no_grad()
def generate_ids(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    end_id: int,
    max_new_tokens: int,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """Continue left-padded prompts until every row holds ``end_id``.

    Args:
        lm: a Hugging Face causal LM.
        ids, mask: [N, L] prompts, padded on the left.
        end_id: the token that ends a row; what follows it in a row has no meaning.
        max_new_tokens: longest continuation.
        do_sample: draw from the model instead of taking the most probable token.
        temperature: divides the logits when sampling; > 0.
        generator: source of randomness for sampling.
        banned: [M] ids never to be produced (markers, latent tokens).

    Returns:
        [N, at most max_new_tokens] new token ids.
    """
    from transformers import DynamicCache

    decoder, head = decoder_of(lm), head_of(lm)
    cache = DynamicCache(config=lm.config)
    mask = mask.long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    produced: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits = head.logits(output.last_hidden_state[:, -1])  # [N, V]
        if banned is not None:
            logits[:, banned] = float("-inf")
        if do_sample:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            ids = logits.argmax(-1, keepdim=True)
        produced.append(ids)
        finished |= ids[:, 0] == end_id
        if bool(finished.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        positions = positions[:, -1:] + 1
    return torch.cat(produced, -1) if produced else ids.new_zeros(len(ids), 0)
