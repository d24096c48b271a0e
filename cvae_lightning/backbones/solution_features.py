"""What a causal LM does while it writes a solution: its hidden states, and where it looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvae_lightning.backbones.branch_choice import attends_only
from cvae_lightning.backbones.causal_lm import decoder_of, evaluating, head_of
from cvae_lightning.functional import latent_token_stats
from cvae_lightning.template import PromptTemplate

MAX_LAYERS = 8
BUDGET = 2**30
"""Bytes that the hidden states and attention weights of the records read at a time may take, of all layers."""
SEGMENTS = 3
"""Parts of y, of equal length, that are averaged apart: procedures differ in their order."""
PLACES = 24
"""Parts of the prefix whose share of the attention is told apart; each a token where it has no more tokens."""
OFFSETS = 16
"""Tokens back from the one that looks, itself included, whose share of the attention is told apart."""


@torch.no_grad()
def solution_features(
    lm: Any, template: PromptTemplate, records: Sequence[Any], batch_size: int = 256
) -> dict[str, Tensor]:
    """Return views of every record, each at the tokens of y, averaged in two ways.

    ``hidden``: the hidden states, for up to 8 evenly spaced layers, embeddings and the last among them.
    ``attention``: the share of every head's attention that goes to each place of the prefix, and so many tokens back:
    what is read, whatever is written there. Families that do not only attend have no such view.

    Averaged over each third of y, as procedures differ in their order; and, under the names ``hidden, surprises`` and
    ``attention, surprises``, weighted by the model's own NLL of the token just read: where solutions part, y surprises.

    Args:
        lm: a causal LM.
        template: renders the z-free records.
        records: the ``Record``s; their x and y are read.
        batch_size: most records read at a time; long ones in a large model are read in smaller numbers.

    Returns:
        [N, layers, 3 D] and [N, layers, D] of the hidden states, [N, 1, 3 F] and [N, 1, F] of the attention with
        F = layers heads (24 + 16); fp32, on the CPU.
    """
    device = lm.get_input_embeddings().weight.device
    parts: dict[str, list[Tensor]] = {}
    with evaluating(lm), _readable_attention(lm) as readable:
        size = min(batch_size, max(1, BUDGET // _bytes_of_a_row(lm, template, records, readable)))
        for start in range(0, len(records), size):
            batch = template.collate(records[start : start + size]).to(device)
            y_open = torch.full_like(batch.y_ids[:, :1], template.marker_ids["<y>"])
            ids = torch.cat([batch.prefix_ids, y_open, batch.y_ids], -1)
            mask = torch.cat([batch.prefix_mask, torch.ones_like(batch.y_mask[:, :1]), batch.y_mask], -1)
            output = decoder_of(lm)(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0),
                output_hidden_states=True,
                output_attentions=readable,
                use_cache=False,
            )
            thirds, surprises = segment_weights(batch.y_mask), _surprise_weights(lm, output.last_hidden_state, batch)
            width = batch.y_ids.shape[1]
            hidden = torch.stack([h[:, -width:].float() for h in evenly(output.hidden_states)], 1)
            views = {
                "hidden": torch.einsum("bst,bltd->blsd", thirds, hidden).flatten(2),
                "hidden, surprises": torch.einsum("bt,bltd->bld", surprises, hidden),
            }
            if readable:
                looks = torch.cat([_looks(a.float(), batch) for a in evenly(output.attentions)], 1)  # [B, H, T, 40]
                views |= {
                    "attention": torch.einsum("bst,bhtp->bshp", thirds, looks).flatten(1)[:, None],
                    "attention, surprises": torch.einsum("bt,bhtp->bhp", surprises, looks).flatten(1)[:, None],
                }
            for name, view in views.items():
                parts.setdefault(name, []).append(view.cpu())
    return {name: torch.cat(views) for name, views in parts.items()}


def _bytes_of_a_row(lm: Any, template: PromptTemplate, records: Sequence[Any], readable: bool) -> int:
    """Return what the longest of the records takes, with the attention of every pair of tokens where that is read."""
    length = max(len(prefix) + 1 + len(y) for prefix, y in template.segments(records))
    config, width = lm.config.get_text_config(), lm.get_input_embeddings().weight.shape[1]
    looks = getattr(config, "num_attention_heads", 1) * length if readable else 0
    return 4 * getattr(config, "num_hidden_layers", 1) * length * (width + looks)


def _surprise_weights(lm: Any, hidden: Tensor, batch: Any) -> Tensor:
    """Return weights [B, T] in the proportions of the NLL of y, from hidden states [B, P + 1 + T, D]."""
    width = batch.y_ids.shape[1]
    targets = batch.y_ids.masked_fill(~batch.y_mask, -100)
    head = head_of(lm)
    nll, _ = latent_token_stats(
        hidden[:, None, -width - 1 : -1], head.weight, targets, bias=head.bias, scale=head.scale, softcap=head.softcap
    )
    return nll[:, 0] / nll[:, 0].sum(-1, keepdim=True).clamp_min(1e-6)


def segment_weights(mask: Tensor) -> Tensor:
    """Return weights [B, 3, T] that average over each third of the True places of ``mask`` [B, T]."""
    place = mask.long().cumsum(-1) - 1
    third = (place * SEGMENTS) // mask.sum(-1, keepdim=True).clamp_min(1)  # [B, T]
    member = (third[:, None] == torch.arange(SEGMENTS, device=mask.device)[:, None]) & mask[:, None]
    return member / member.sum(-1, keepdim=True).clamp_min(1)


def evenly(layers: Sequence[Tensor]) -> list[Tensor]:
    """Return up to 8 of the layers, evenly spaced, both ends among them."""
    return [layers[i] for i in torch.linspace(0, len(layers) - 1, min(len(layers), MAX_LAYERS)).round().long().tolist()]


def _looks(attention: Tensor, batch: Any) -> Tensor:
    """Return shares of attention [B, H, T, 40] at the tokens of y, from attention weights [B, H, L, L]."""
    prefix, tokens = batch.prefix_ids.shape[1], batch.y_ids.shape[1]
    queries = attention[:, :, -tokens:]
    mask = batch.prefix_mask
    place = ((mask.long().cumsum(-1) - 1).clamp_min(0) * PLACES) // mask.sum(-1, keepdim=True).clamp_min(PLACES)
    member = F.one_hot(place, PLACES).to(queries.dtype) * mask[..., None]  # [B, P, 24]
    query, offset = (torch.arange(n, device=mask.device) for n in (tokens, OFFSETS))
    index = prefix + 1 + query[:, None] - offset  # [T, 16]
    back = queries.gather(-1, index.clamp_min(0).expand(*queries.shape[:2], -1, -1)) * (index >= prefix)
    return torch.cat([torch.einsum("bhtp,bpc->bhtc", queries[..., :prefix], member), back], -1)


@contextmanager
def _readable_attention(lm: Any) -> Iterator[bool]:
    """Within this context attention weights can be asked for; False where the family does not only attend."""
    if not attends_only(lm):
        yield False
        return
    before = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    try:
        yield True
    finally:
        lm.set_attn_implementation(before)
