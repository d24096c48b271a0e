"""The K branches of an enumerated latent behind one shared prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cvae_lightning.backbones.branch_activations import BranchActivations, BranchCall, read_again
from cvae_lightning.backbones.branch_choice import choose_branch_method
from cvae_lightning.backbones.branch_inputs import BranchInputs, BranchOutput
from cvae_lightning.backbones.causal_lm import decoder_of
from cvae_lightning.backbones.conditioning import LatentNorms, check_norm_branches
from cvae_lightning.backbones.grouped_attention import (
    ContinuedBranches,
    attended_by_branches,
    attention_arguments,
    number_of_parts,
    run_grouped,
    run_packed,
    supports_grouped,
)
from cvae_lightning.backbones.kv_cache import copied

__all__ = ["BranchInputs", "BranchMethod", "BranchOutput", "run_branches"]

BranchMethod = Literal["auto", "cache", "grouped", "packed", "repeat"]


def run_branches(
    lm: Any,
    prefix_ids: Tensor,
    prefix_mask: Tensor,
    suffix: Tensor,
    suffix_mask: Tensor,
    method: BranchMethod = "auto",
    num_latent_chunk: int | None = None,
    norms: LatentNorms | None = None,
    z: Tensor | None = None,
    activations: BranchActivations | None = None,
) -> BranchOutput:
    """Read the prefix and, behind it, K suffixes.

    Args:
        lm: a Hugging Face causal LM.
        prefix_ids, prefix_mask: [B, P]; bool mask, True counts; padded on either side.
        suffix: [B, K, S] token ids, or [B, K, S, D] input embeddings where a latent is a vector.
        suffix_mask: [B, S], shared by the branches, padded on the right.
        method: ``cache`` reads the prefix once and copies its keys and values to the branches; ``grouped`` reads prefix
            and branches as one sequence in one call, also under gradient checkpointing; ``packed`` does so by
            FlexAttention, which copies no keys (long prompts on a GPU); ``repeat`` reads the prefix K times, works for
            every family, and is the reference; ``auto`` takes ``cache``, ``grouped`` or ``repeat``, the first that the
            family supports and that agrees with ``repeat`` on the first batch.
        num_latent_chunk: number of latents run at a time; the activations of one such chunk are kept, those of the
            others are made again in the backward pass. None = all at once.
        norms, z: conditioned norms of ``lm`` and, [B, K, D], what conditions them in every branch; None = none.
        activations: whether those of the branches are kept for the backward pass, or made again in it of the branches
            that have a gradient; None = kept.

    Raises:
        ValueError: if the model does not support the method, or activations cannot be made again as was asked for, or
            ``num_latent_chunk`` is below 1.
    """
    if norms is not None:
        check_norm_branches(method)
    inputs = BranchInputs.of(prefix_ids, prefix_mask, suffix, suffix_mask, norms, z)
    if num_latent_chunk is not None and num_latent_chunk < 1:
        raise ValueError(f"num_latent_chunk must be at least 1, or None for all at once, got {num_latent_chunk}")
    size = min(num_latent_chunk or inputs.num_latents, inputs.num_latents)
    if method == "auto":
        method = choose_branch_method(lm, inputs, METHODS)  # type: ignore[assignment]
    if activations is not None and activations.again(lm, inputs, method):
        tokens, vectors = inputs.looked_up(decoder_of(lm))
        prefix, cache = _read_prefix(lm, vectors, tokens)
        call, tensors = BranchCall.of(_continue, lm, vectors, cache, num_latent_chunk)
        if activations.suits(call, tensors):
            return BranchOutput(read_again(call, tensors, activations), prefix[:, -1])
    output = _run_kept(lm, inputs, method, size)
    if activations is not None:
        activations.watch(output.hidden)
    return output


def _run_kept(lm: Any, inputs: BranchInputs, method: str, size: int) -> BranchOutput:
    if size == inputs.num_latents:
        return METHODS[method](lm, inputs)
    chunks = [slice(start, start + size) for start in range(0, inputs.num_latents, size)]
    if method == "cache":
        prefix, cache = _read_prefix(lm, inputs, inputs.prefix_like_suffix(decoder_of(lm)))
        router_hidden = prefix[:, -1]
        hidden = [_again(_continue, lm, inputs.latents(chunk), cache) for chunk in chunks]
    else:
        outputs = [_again(_fields, METHODS[method], lm, inputs.latents(chunk)) for chunk in chunks]
        hidden, router_hidden = [output[0] for output in outputs], outputs[0][1]
    return BranchOutput(torch.cat(hidden, 1), router_hidden)


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function and keep none of its activations for the backward pass, which calls it again."""
    return checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)


def _fields(method: Callable[[Any, BranchInputs], BranchOutput], lm: Any, inputs: BranchInputs) -> tuple[Tensor, ...]:
    output = method(lm, inputs)
    return output.hidden, output.router_hidden


def run_repeated(lm: Any, inputs: BranchInputs) -> BranchOutput:
    """Read prefix and suffix of every branch: right for every family."""
    decoder, latents = decoder_of(lm), inputs.num_latents
    prefix = inputs.prefix_like_suffix(decoder)[:, None].expand(-1, latents, *(-1,) * (inputs.suffix.ndim - 2))
    positions = torch.cat([inputs.prefix_positions, inputs.suffix_positions], -1).repeat_interleave(latents, 0)
    with inputs.conditioning():
        output = decoder(
            **inputs.named(torch.cat([prefix, inputs.suffix], 2).flatten(0, 1)),
            attention_mask=inputs.branch_mask,
            position_ids=positions,
            use_cache=False,
        )
    hidden = output.last_hidden_state.unflatten(0, (-1, latents))  # [B, K, P + S, D]
    return BranchOutput(hidden[:, :, inputs.width :], hidden[:, 0, inputs.width - 1])


def run_cached(lm: Any, inputs: BranchInputs) -> BranchOutput:
    """Read the prefix once and continue it K times from its keys and values."""
    tokens, inputs = inputs.looked_up(decoder_of(lm))
    prefix, cache = _read_prefix(lm, inputs, tokens)
    return BranchOutput(_continue(lm, inputs, cache), prefix[:, -1])


def _read_prefix(lm: Any, inputs: BranchInputs, tokens: Tensor) -> tuple[Tensor, Any]:
    """Return the hidden states [B, P, D] of the prefix, given as ids or vectors, and the cache with its keys."""
    from transformers import DynamicCache

    output = decoder_of(lm)(
        **inputs.named(tokens),
        attention_mask=inputs.prefix_mask.long(),
        position_ids=inputs.prefix_positions,
        past_key_values=DynamicCache(config=lm.config),
        use_cache=True,
    )
    cache = output.past_key_values
    if cache is None or cache.get_seq_length() != inputs.width:
        raise ValueError(
            "this model did not keep the prefix in its cache (gradient checkpointing?): use branch_method=grouped or "
            "repeat"
        )
    return output.last_hidden_state, cache


def _continue(lm: Any, inputs: BranchInputs, cache: Any) -> Tensor:
    """Return the hidden states [B, K, S, D] of the branches; the cache of the prefix stays as it is."""
    branch_cache = copied(cache)
    branch_cache.batch_repeat_interleave(inputs.num_latents)  # differentiable
    attention = {"attention_mask": inputs.branch_mask}
    if number_of_parts(inputs.suffix.shape[2]) > 1 and supports_grouped(lm):
        attention = attention_arguments(lm, ContinuedBranches(), attended_by_branches(inputs))  # fewer scores
    with inputs.conditioning():
        output = decoder_of(lm)(
            **inputs.named(inputs.suffix.flatten(0, 1)),
            **attention,
            position_ids=inputs.suffix_positions.repeat_interleave(inputs.num_latents, 0),
            past_key_values=branch_cache,
            use_cache=True,
        )
    return output.last_hidden_state.unflatten(0, (-1, inputs.num_latents))


METHODS: dict[str, Callable[[Any, BranchInputs], BranchOutput]] = {
    "cache": run_cached,
    "grouped": run_grouped,
    "packed": run_packed,
    "repeat": run_repeated,
}
