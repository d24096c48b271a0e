"""How a module writes texts, and how much room its language model has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cvae_lightning.backbones.causal_lm import evaluating, positions_of
from cvae_lightning.modules.sharding import Shardable
from cvae_lightning.outputs import PairBatch
from cvae_lightning.template import PromptTemplate, Text


class Generating(Shardable):
    """The part of a module that continues prompts; it remembers how long the y-regions were that it has seen."""

    lm: Any
    template: PromptTemplate
    longest_y: Tensor
    _longest_seen: int

    def generate_from(self, xs: Sequence[Text], section: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        """Continue ``<bos> <x> x </x> section <y>`` for each x; see :meth:`generate` of the subclasses.

        ``embed`` turns prompt ids [N, L] of these rows [N] of ``xs`` into input embeddings, where a latent is a vector;
        or returns them as they are, where it only tells the norms the latents of these rows.
        ``branches`` [K, S] are ids behind the section, instead of ``<y>``: K continuations in a row for each x.
        With ``num_return_sequences`` above 1 each of these is a list of texts.
        """
        from cvae_lightning.backbones.generation import check_options, expansion, generate_within

        batch_size: int = options.pop("batch_size", 256)
        limit: int | None = options.pop("max_new_tokens", None)
        embed: Callable[[Tensor, Tensor], Tensor] | None = options.pop("embed", None)
        branches: Tensor | None = options.pop("branches", None)
        seed: int | None = options.pop("generator_seed", None)
        shrink: bool = options.pop("shrink", True)
        options = {name: value for name, value in options.items() if value is not None}
        check_options(options | ({} if limit is None else {"max_new_tokens": limit}))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        wide, several = expansion(options), options.get("num_return_sequences") or 1
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        m = self.template.marker_ids
        banned = torch.tensor([m[t] for t in m if t != "</y>"] + self.template.all_latent_ids, device=self.device)
        behind = 0 if branches is None else branches.shape[1]
        texts: list[Any] = []
        write = self.template.decode if not len(xs) or isinstance(xs[0], str) else self.template.cut
        with evaluating(self):
            size = max(1, batch_size // (wide * (1 if branches is None else len(branches))))
            for start in range(0, len(xs), size):
                rows = slice(start, start + size)
                ids, mask = self.template.prefixes(xs[rows])
                tail = torch.tensor([[*part] if branches is not None else [*part, m["<y>"]] for part in section[rows]])
                ids, mask = torch.cat([ids, tail], -1), torch.cat([mask, torch.ones_like(tail, dtype=torch.bool)], -1)
                self.check_room(xs[rows], mask.sum(-1) + behind)
                produced = generate_within(
                    self.lm,
                    ids.to(self.device),
                    mask.to(self.device),
                    self.template.end_id,
                    limit or self.max_new_tokens,
                    self.positions,
                    embed,
                    start,
                    generator=generator,
                    banned=banned,
                    branches=branches,
                    shrink=shrink,
                    tokenizer=self.template.tokenizer,
                    **options,
                )
                texts += write(produced.cpu())
        return texts if several == 1 else [texts[i : i + several] for i in range(0, len(texts), several)]

    @property
    def max_new_tokens(self) -> int:
        """Longest y worth generating: a little above the longest that this module has seen."""
        return self.longest_seen + 8 if self.longest_seen else 256

    @property
    def longest_seen(self) -> int:
        """Tokens of the longest y-region that this module has seen, on this rank or before it was saved."""
        return max(int(self.longest_y), self._longest_seen)

    def watch_length(self, batch: PairBatch) -> None:
        """Remember the longest y-region seen; see also :meth:`check_positions`."""
        self.check_positions(batch)
        self._longest_seen = max(self._longest_seen, batch.y_ids.shape[1])

    @property
    def positions(self) -> int | None:
        """How many tokens the model can read; None = any number."""
        return positions_of(self.lm)

    @property
    def positions_between(self) -> int:
        """Number of positions that may lie between x and y."""
        return self.template.section_length

    def check_positions(self, batch: PairBatch) -> None:
        """Raise if a record, latent section included, is longer than the model can read.

        Raises:
            ValueError: naming the length, the limit and the ways out.
        """
        limit, between = self.positions, self.positions_between
        if not limit or batch.prefix_ids.shape[1] + between + batch.y_ids.shape[1] <= limit:
            return
        lengths = batch.prefix_mask.sum(-1) + between + batch.y_mask.sum(-1)
        row = int(lengths.argmax())
        if int(lengths[row]) > limit:
            room = limit - between + self.template.section_length
            raise ValueError(
                f"the record whose x begins with {batch.x[row][:40]!r} takes {int(lengths[row])} tokens, more than the "
                f"model's {limit} positions: set model.init_args.max_length to {room} (and on_overflow to skip, to "
                "leave such records out), or take a model with a larger max_position_embeddings"
            )

    def check_room(self, xs: Sequence[Text], lengths: Tensor) -> None:
        """Raise if a prompt of one of these x, which takes so many tokens [N], leaves no room for y.

        Raises:
            ValueError: naming the x, its length and the limit.
        """
        row = int(lengths.argmax())
        if self.positions and int(lengths[row]) >= self.positions:
            raise ValueError(
                f"the prompt whose x begins with {xs[row][:40]!r} leaves no room for y: it takes {int(lengths[row])} "
                f"of the model's {self.positions} positions. Shorten x, or take a model with a larger "
                "max_position_embeddings"
            )

    def keep_longest_y(self) -> None:
        """Register the buffer that holds the longest y-region seen, in tokens."""
        self.register_buffer("longest_y", torch.zeros((), dtype=torch.int64))
        self._longest_seen = 0  # beside the buffer: reading that would make the host wait in every step

    def share_longest_y(self) -> None:
        """Let every rank know of the longest y-region that any has seen."""
        longest = torch.tensor(self.longest_seen, device=self.device)
        self._longest_seen = int(self.trainer.strategy.reduce(longest, reduce_op="max"))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.longest_y.fill_(self.longest_seen)
        super()._save_to_state_dict(destination, prefix, keep_vars)
