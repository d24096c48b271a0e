"""What the ways of running K branches behind one prefix have in common: their inputs, positions and results."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.backbones.conditioning import LatentNorms


@dataclass(frozen=True)
class BranchOutput:
    """Hidden states of the branches and of the position that routes.

    Shape:
        hidden: [B, K, S, D] at every suffix token. router_hidden: [B, D] at the last prefix token.
    """

    hidden: Tensor
    router_hidden: Tensor


def padded_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prefixes and their mask, [B, P] each, with padding behind them moved to the left.

    Between a prefix and what follows it, windows and recurrent states would see it.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    shift = (mask * (place + 1)).argmax(-1, keepdim=True) + 1  # [B, 1]; P where padded on the left
    source = (place + shift) % max(1, ids.shape[1])
    return ids.gather(1, source), mask.gather(1, source)


@dataclass(frozen=True)
class BranchInputs:
    """One prefix per example and K suffixes behind it; positions count real tokens, so padding changes nothing.

    Shape:
        prefix_ids, prefix_mask: [B, P]; bool mask, True counts; padded on the left.
        suffix: [B, K, S] token ids, or [B, K, S, D] input embeddings where a latent is a vector.
        suffix_mask: [B, S], shared by the branches, padded on the right.
        z: [B, K, D], what conditions the ``norms`` of the model in every branch; None without norms.
    """

    prefix_ids: Tensor
    prefix_mask: Tensor
    suffix: Tensor
    suffix_mask: Tensor
    norms: LatentNorms | None = None
    z: Tensor | None = None

    @classmethod
    def of(cls, prefix_ids: Tensor, prefix_mask: Tensor, *others: Any) -> BranchInputs:
        """Take prefixes that are padded on either side."""
        return cls(*padded_left(prefix_ids, prefix_mask), *others)

    @property
    def num_latents(self) -> int:
        """K, the number of branches."""
        return self.suffix.shape[1]

    @property
    def width(self) -> int:
        """P, the padded length of the prefix."""
        return self.prefix_ids.shape[1]

    @property
    def embedded(self) -> bool:
        """Whether the suffixes are vectors."""
        return self.suffix.is_floating_point()

    @cached_property
    def prefix_positions(self) -> Tensor:
        """[B, P]."""
        return (self.prefix_mask.long().cumsum(-1) - 1).clamp_min(0)

    @cached_property
    def suffix_positions(self) -> Tensor:
        """[B, S]; they restart behind the prefix in every branch."""
        steps = torch.arange(self.suffix.shape[2], device=self.prefix_mask.device)
        return self.prefix_mask.sum(-1, keepdim=True) + steps

    @cached_property
    def branch_mask(self) -> Tensor:
        """[B * K, P + S] int64: which tokens of prefix and branch count."""
        mask = torch.cat([self.prefix_mask, self.suffix_mask], -1).long()
        return mask.repeat_interleave(self.num_latents, 0)

    def named(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return token ids or vectors under the keyword by which a decoder takes them."""
        return {"inputs_embeds" if self.embedded else "input_ids": tokens}

    def prefix_like_suffix(self, decoder: Any) -> Tensor:
        """Return the prefix as token ids, or as vectors where the suffixes are vectors."""
        return decoder.get_input_embeddings()(self.prefix_ids) if self.embedded else self.prefix_ids

    def looked_up(self, decoder: Any) -> tuple[Tensor, BranchInputs]:
        """Return the prefix as vectors [B, P, D], and these inputs with vectors as suffixes.

        All ids are looked up at once: each lookup costs a gradient of the size of the whole table.
        """
        if self.embedded:
            return self.prefix_like_suffix(decoder), self
        vectors = decoder.get_input_embeddings()(torch.cat([self.prefix_ids, self.suffix.flatten(1)], 1))
        suffix = vectors[:, self.width :].unflatten(1, self.suffix.shape[1:])
        return vectors[:, : self.width], replace(self, suffix=suffix)

    def conditioning(self) -> AbstractContextManager[None]:
        """Within this context every branch [B * K] is conditioned on its latent, where there are norms for it."""
        if self.norms is None or self.z is None:
            return nullcontext()
        return self.norms.given(self.z.flatten(0, 1), self.width)

    def latents(self, part: slice) -> BranchInputs:
        """Return the inputs of some of the latents."""
        return replace(self, suffix=self.suffix[:, part], z=None if self.z is None else self.z[:, part])

    def rows(self, index: Tensor) -> BranchInputs:
        """Return the inputs of some of the examples."""
        names = ("prefix_ids", "prefix_mask", "suffix", "suffix_mask", *(() if self.z is None else ("z",)))
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def branches(self, b: Tensor, k: Tensor) -> BranchInputs:
        """Return the inputs of the branches (b, k), [N] each, as N examples of one latent."""
        masks = {name: getattr(self, name)[b] for name in ("prefix_ids", "prefix_mask", "suffix_mask")}
        z = None if self.z is None else _pick(self.z, b, k)
        return replace(self, suffix=_pick(self.suffix, b, k), z=z, **masks)


def _pick(values: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """Return values[b, k] of values [B, K, ...] as [N, 1, ...]; the gradient of one index is the quicker one."""
    return values.flatten(0, 1).index_select(0, b * values.shape[1] + k)[:, None]
