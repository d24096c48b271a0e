"""Batched generation behind a prompt, with positions that count real tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvae_lightning.backbones.branch_choice import attends_only
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
    branches: Tensor | None = None,
    shrink: bool = True,
) -> Tensor:
    """Continue left-padded prompts until every row holds ``end_id``.

    Rows that have ended leave the batch once they are a quarter of it, unless ``shrink`` is off.

    Args:
        lm: a Hugging Face causal LM.
        ids: [N, L] prompts, padded on the left; or [N, L, D] their input embeddings.
        mask: [N, L] True at real tokens.
        end_id: the token that ends a row; what follows it in a row has no meaning.
        max_new_tokens: longest continuation.
        do_sample: draw from the model instead of taking the most probable token.
        temperature: divides the logits when sampling; > 0.
        generator: source of randomness for sampling.
        banned: [M] ids never to be produced (markers, latent tokens).
        branches: [K, S] ids; every prompt is continued behind each of these, and read only once.
        shrink: let ended rows leave; off where something outside keeps one value per row, as conditioned norms do.

    Returns:
        [N, at most max_new_tokens] new token ids; [N * K, ...] with branches, those of a prompt in a row.
    """
    from transformers import DynamicCache

    decoder, head, sharing = decoder_of(lm), head_of(lm), attends_only(lm)
    cache: Any = DynamicCache(config=lm.config)
    mask = mask.long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    if branches is not None:
        tail = branches.repeat(len(mask), 1)  # [N * K, S]
        seen = mask.repeat_interleave(len(branches), 0)
        mask = torch.cat([seen, torch.ones_like(tail)], -1)
        behind = (mask.cumsum(-1) - 1).clamp_min(0)
        if sharing:
            prompt = {"input_ids": ids, "attention_mask": seen[:: len(branches)], "position_ids": positions}
            decoder(**prompt, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(branches))
            ids, positions = tail, behind[:, -tail.shape[1] :]
        else:
            ids, positions = torch.cat([ids.repeat_interleave(len(branches), 0), tail], -1), behind
    rows = torch.arange(len(mask), device=mask.device)  # those that still run
    result = mask.new_full((len(mask), max_new_tokens), end_id)
    for step in range(max_new_tokens):
        output = decoder(
            **{"inputs_embeds" if ids.is_floating_point() else "input_ids": ids},
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = head.logits(output.last_hidden_state[:, -1])  # [rows, V]
        if banned is not None:
            logits[:, banned] = float("-inf")
        if do_sample:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            ids = logits.argmax(-1, keepdim=True)
        result[rows, step] = ids[:, 0]
        running = (result[rows, : step + 1] != end_id).all(-1)
        left = int(running.sum())
        if left == 0:
            return result[:, : step + 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        positions = positions[:, -1:] + 1
        if shrink and sharing and left <= 0.75 * len(rows):
            index = running.nonzero()[:, 0]
            cache.batch_select_indices(index)
            rows, ids, mask, positions = (t[index] for t in (rows, ids, mask, positions))
    return result
