"""An attention function that knows of branches: in one sequence with their prefix, or continued from a cache.

The sequence is ``prefix, branch 1, ..., branch K``. Prefix tokens attend to the prefix, the tokens of a branch to
the prefix and to their own branch. No score between two branches is computed, and few of later tokens.
Source: the grouping of Liu et al. 2025 (arXiv 2506.05433), for the branches of one latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.backbones.branch_inputs import BranchInputs, BranchOutput
from cvae_lightning.backbones.causal_lm import decoder_of

NAME = "latent_branches"
"""Name of the attention function; without branches it is SDPA, so a model may keep it."""
QUERIES = 192
"""Queries that attend at a time, about."""


def number_of_parts(length: int) -> int:
    """Return in how many parts of about ``QUERIES`` so many queries attend; one when compiled, for any length."""
    return 1 if torch.compiler.is_compiling() else max(1, round(length / QUERIES))


def attended_by_branches(inputs: BranchInputs) -> Tensor:
    """Return what the branches attend to, [B * K, 1, S, P + S]; every query sees at least itself."""
    prefix = inputs.prefix_mask[:, None].expand(-1, inputs.suffix_mask.shape[1], -1)
    mask = torch.cat([prefix, _causal(inputs.suffix_mask)], -1)
    return mask.repeat_interleave(inputs.num_latents, 0)[:, None]


def _causal(mask: Tensor) -> Tensor:
    """Return what the tokens of a mask [B, L] attend to among themselves, [B, L, L]."""
    causal = torch.ones(2 * [mask.shape[1]], dtype=torch.bool, device=mask.device).tril()
    return causal & mask[:, None] | causal & causal.t()


def attend_in_parts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return SDPA of queries that belong to the last of the keys, some queries at a time, which see no later key.

    Under a mask the kernels compute every score, those of later keys too: half of all where a branch is long.

    Shape:
        query: [B, heads, L, d]; key, value: [B, heads or fewer, P + L, d]; mask: [B, 1, L, P + L] -> [B, L, heads, d].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    count = number_of_parts(length)
    if count == 1:
        return sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)[0]
    if (groups := query.shape[1] // key.shape[1]) > 1:  # once, not in every part; without the module it is not repeated
        key, value, module = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), None
    first, size, found = key.shape[2] - length, -(-length // count), []
    for start in range(0, length, size):
        rows, seen = slice(start, start + size), slice(first + start + size)
        part = mask[:, :, rows, seen]
        given = query[:, :, rows], key[:, :, seen], value[:, :, seen]
        found.append(sdpa_attention_forward(module, *given, part, *args, **kwargs)[0])
    return torch.cat(found, 1)


@dataclass(frozen=True)
class Branches:
    """Where the branches of a packed sequence lie, and what may be attended to.

    Shape:
        prefix_mask: [B, 1, P, P]. branch_mask: [B * K, 1, S, P + S]. Bool, True is attended to.
    """

    num_latents: int
    prefix_mask: Tensor
    branch_mask: Tensor

    @classmethod
    def of(cls, inputs: BranchInputs) -> Branches:
        """Build the masks."""
        return cls(inputs.num_latents, _causal(inputs.prefix_mask)[:, None], attended_by_branches(inputs))

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend once within the prefix and once from the branches, which get copies of the prefix's keys and values.

        Shape:
            query, key, value: [B, heads, P + K * S, d] -> [B, P + K * S, heads, d].
        """
        latents, width, length = self.num_latents, self.prefix_mask.shape[-1], self.branch_mask.shape[-2]

        def own(states: Tensor) -> Tensor:  # -> [B, K, heads, S, d]
            return states[:, :, width:].unflatten(2, (latents, length)).transpose(1, 2)

        def with_prefix(states: Tensor) -> Tensor:  # -> [B * K, heads, P + S, d]
            shared = states[:, None, :, :width].expand(-1, latents, -1, -1, -1)
            return torch.cat([shared, own(states)], 3).flatten(0, 1)

        shared = (states[:, :, :width] for states in (query, key, value))
        before = attend_in_parts(module, *shared, self.prefix_mask, *args, **kwargs)  # [B, P, heads, d]
        queries = own(query).flatten(0, 1)
        behind = attend_in_parts(  # [B * K, S, heads, d]
            module, queries, with_prefix(key), with_prefix(value), self.branch_mask, *args, **kwargs
        )
        return torch.cat([before, behind.unflatten(0, (-1, latents)).flatten(1, 2)], 1), None


@dataclass(frozen=True)
class ContinuedBranches:
    """Branches in the rows of a batch, behind the keys and values of the prefix that a cache holds.

    The attention mask [B * K, 1, S, P + S] says the rest: a model that knows nothing of branches goes by it too.
    """

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend to prefix and branch, [B * K, heads, S, d] -> [B * K, S, heads, d]."""
        assert mask is not None
        return attend_in_parts(module, query, key, value, mask, *args, **kwargs), None


@dataclass(frozen=True)
class PackedBranches:
    """As :class:`Branches`, by one mask in blocks of 128 x 128: FlexAttention skips most of them and copies no key.

    Source: Dong et al. 2024 (arXiv 2412.05496).
    """

    mask: Any

    @classmethod
    def of(cls, inputs: BranchInputs) -> PackedBranches:
        """Build the block mask; every query sees at least itself."""
        from torch.nn.attention.flex_attention import create_block_mask

        latents, (batch, length) = inputs.num_latents, inputs.suffix_mask.shape
        real = torch.cat([inputs.prefix_mask, inputs.suffix_mask.repeat(1, latents)], 1)
        of_branch = torch.arange(1, latents + 1, device=real.device).repeat_interleave(length)
        branch = torch.cat([of_branch.new_zeros(inputs.width), of_branch])  # 0 in the prefix

        def seen(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            shared = (branch[key] == 0) | (branch[key] == branch[query])
            return (real[b, key] & shared & (key <= query)) | (key == query)

        size, device = real.shape[1], real.device
        return cls(create_block_mask(seen, batch, None, size, size, device, _compile=device.type != "cpu"))

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend in one call, compiled on an accelerator; shapes as in :meth:`Branches.attend`.

        Raises:
            ValueError: with dropout, and for gradients on a CPU, both of which FlexAttention does not have.
        """
        if dropout:
            raise ValueError("branch_method=packed has no attention dropout: set it to 0, or use grouped")
        if query.device.type == "cpu" and query.requires_grad:
            raise ValueError("branch_method=packed trains on a GPU only: use auto, cache or grouped on a CPU")
        attention = _flex_attention(compiled=query.device.type != "cpu")
        mixed = attention(
            query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return mixed.transpose(1, 2).contiguous(), None


@cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def branch_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend within prefix and branches where ``branches`` is given, else as SDPA does.

    Raises:
        ValueError: if a model was given ``branches`` and does not hand them on to its attention.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    branches: Branches | ContinuedBranches | PackedBranches | None = kwargs.pop("branches", None)
    if branches is None:
        if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:
            raise ValueError(f"{type(module).__name__} is not told of branches: use branch_method=cache or repeat")
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    kwargs.pop("is_causal", None)
    return branches.attend(module, query, key, value, attention_mask, *args, **kwargs)


def supports_grouped(lm: Any) -> bool:
    """Return whether a model takes its attention function from the registry and attends to all that is before a token.

    Sliding windows, soft caps and attention sinks are no matter of this function and would be lost without an error.
    """
    config = lm.config.get_text_config()
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"} or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    )
    return bool(
        getattr(lm, "_supports_attention_backend", False)
        and config._attn_implementation in ("sdpa", NAME)
        and not sliding
        and not getattr(config, "attn_logit_softcapping", None)
    )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, branch_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_arguments(
    lm: Any, branches: Branches | ContinuedBranches | PackedBranches, mask: Tensor | None = None
) -> dict[str, Any]:
    """Return the arguments that tell a model of its branches, and set its attention function, once and for all.

    It stays, as recomputation under gradient checkpointing needs the function again.

    Args:
        lm: a causal LM for which :func:`supports_grouped` holds.
        branches: what its attention is to do.
        mask: of four dimensions; None = one that says nothing.
    """
    if lm.config._attn_implementation != NAME:
        _register()
        lm.set_attn_implementation(NAME)
    if mask is None:  # models take a mask of four dimensions as it is
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lm.get_input_embeddings().weight.device)
    return {"attention_mask": mask, "branches": branches}


def run_grouped(lm: Any, inputs: BranchInputs) -> BranchOutput:
    """Read prefix and branches in one call."""
    return _run(lm, inputs, Branches, "grouped")


def run_packed(lm: Any, inputs: BranchInputs) -> BranchOutput:
    """Read prefix and branches in one call by FlexAttention, which copies no keys: for long prompts on a GPU."""
    return _run(lm, inputs, PackedBranches, "packed")


def _run(lm: Any, inputs: BranchInputs, layout: type[Branches | PackedBranches], method: str) -> BranchOutput:
    if not supports_grouped(lm):
        raise ValueError(
            f"branch_method={method} needs SDPA attention over the whole prefix, which {type(lm).__name__} does not "
            "offer: use cache or repeat"
        )
    decoder = decoder_of(lm)
    tokens = torch.cat([inputs.prefix_like_suffix(decoder), inputs.suffix.flatten(1, 2)], 1)
    positions = torch.cat([inputs.prefix_positions, inputs.suffix_positions.repeat(1, inputs.num_latents)], -1)
    hidden = decoder(
        **inputs.named(tokens),
        **attention_arguments(lm, layout.of(inputs)),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    branches = hidden[:, inputs.width :].unflatten(1, (inputs.num_latents, -1))
    return BranchOutput(branches, hidden[:, inputs.width - 1])
