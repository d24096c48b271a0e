"""Which way of running the branches a model gets: what its family supports, checked once against the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from cvae_lightning.backbones.branch_inputs import BranchInputs, BranchOutput
from cvae_lightning.backbones.causal_lm import evaluating
from cvae_lightning.backbones.grouped_attention import supports_grouped
from cvae_lightning.functional.precision import without_autocast

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers whose state is keys and values alone."""

_CHOSEN: WeakKeyDictionary[nn.Module, dict[bool, str]] = WeakKeyDictionary()


def choose_branch_method(
    lm: Any, inputs: BranchInputs, methods: Mapping[str, Callable[[Any, BranchInputs], BranchOutput]]
) -> str:
    """Return the fastest method that a model supports and that agrees with ``repeat`` on these inputs.

    Some families take no notice of a cache or an attention function and give wrong numbers without an error, hence the
    check. It runs once per model, on two examples and two latents, without dropout, gradient or randomness.
    """
    checkpointing = _checkpoints(lm)
    chosen = _CHOSEN.setdefault(lm, {})
    if checkpointing not in chosen:
        candidates = candidate_methods(lm)
        if inputs.norms is not None:  # they need a row per branch
            candidates = [name for name in candidates if name != "grouped"]
        agreeing = (name for name in candidates if _agrees(lm, inputs, methods, name))
        chosen[checkpointing] = next(agreeing, "repeat")
        rank_zero_info(f"branches of {type(lm).__name__}: {chosen[checkpointing]}")
    return chosen[checkpointing]


def attends_only(lm: Any) -> bool:
    """Return whether keys and values are all that a model remembers: no layer has a recurrent state."""
    layers = set(getattr(lm.config.get_text_config(), "layer_types", None) or ())
    return layers <= ATTENTION_LAYERS and not getattr(lm, "_is_stateful", False)


def candidate_methods(lm: Any) -> list[str]:
    """Return the methods that share the prefix and that the model's family supports, the fastest first.

    A recurrent state has no keys and values to share; under gradient checkpointing there is no cache.
    """
    if not attends_only(lm):
        return []
    cache = [] if _checkpoints(lm) else ["cache"]
    return cache + (["grouped"] if supports_grouped(lm) else [])


def _checkpoints(lm: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in lm.modules())


def _agrees(lm: Any, inputs: BranchInputs, methods: Mapping[str, Any], name: str) -> bool:
    lengths = inputs.prefix_mask.sum(-1)
    rows = torch.stack([lengths.argmax(), lengths.argmin()])
    part = inputs.rows(rows).latents(slice(2))
    implementation = lm.config._attn_implementation
    with evaluating(lm), torch.no_grad(), without_autocast(part.prefix_ids.device):
        expected = methods["repeat"](lm, part)
        try:
            found = methods[name](lm, part)
        except Exception as error:  # what a foreign model raises is not known
            reason = f"it raises {type(error).__name__}"
        else:
            real = part.suffix_mask[:, None, :, None]
            pairs = [
                (found.hidden * real, expected.hidden * real),
                (found.router_hidden, expected.router_hidden),
            ]
            difference = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
            if difference < (1e-4 if expected.hidden.dtype in (torch.float32, torch.float64) else 5e-2):
                return True
            reason = f"its hidden states are off by {difference:.1e} relative to reading every branch on its own"
    if lm.config._attn_implementation != implementation:
        lm.set_attn_implementation(implementation)
    warnings.warn(f"{type(lm).__name__} does not work with branch_method={name}: {reason}", stacklevel=2)
    return False
