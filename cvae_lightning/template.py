"""PromptTemplate: records to token ids and back, with spans and masks, and no search for markers in strings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor

from cvae_lightning.outputs import PairBatch, Record

MARKERS = ("<x>", "</x>", "<z>", "</z>", "<y>", "</y>")
"""Special tokens that delimit the segments."""
Text = str | Sequence[int]
"""A text, or the token ids that stand for it."""


def latent_token(k: int, part: int = 0) -> str:
    """Return the text of latent token ``k``, or of a further ``part`` of it where a latent takes several tokens."""
    return f"<z_{k}.{part}>" if part else f"<z_{k}>"


class PromptTemplate:
    """Writes the three prompts of a record with one tokenizer.

    ::

        z-free      <bos> <x> x </x> <y> y </y> <eos>
        router      <bos> <x> x </x> <z>
        generator   <bos> <x> x </x> <z> z_k </z> <y> y </y> <eos>

    With ``prefix_length`` m > 1, m tokens ``z_k z_k.1 ... z_k.(m-1)`` stand in the place of ``z_k``; the first of them
    is the one that routes. Segments are tokenised apart, so spans are known by construction. ``<bos>`` and ``<eos>``
    appear where the tokenizer has them. The supervised tokens are y, ``</y>`` and ``<eos>``.

    Args:
        tokenizer: a Hugging Face fast tokenizer; markers and latent tokens that it lacks are added as special tokens.
        num_latents: K latents ``<z_0>`` ...; 0 for an entangled model, or where a latent is a vector.
        max_length: longest generator prompt in tokens; None = unlimited.
        on_overflow: ``error`` raises for a longer record; ``skip`` lets the data module leave it out and count it.
        padding_side: side on which x prefixes are padded in a batch.
        prefix_length: m, tokens (or vectors) in the latent slot.

    Raises:
        ValueError: if ``num_latents`` is negative, ``prefix_length`` is not positive, or ``max_length`` leaves no room
            for a record.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_latents: int = 0,
        max_length: int | None = None,
        on_overflow: Literal["error", "skip"] = "error",
        padding_side: Literal["left", "right"] = "left",
        prefix_length: int = 1,
    ) -> None:
        if num_latents < 0:
            raise ValueError(f"num_latents must be >= 0, got {num_latents}")
        if prefix_length < 1:
            raise ValueError(f"prefix_length must be at least 1, got {prefix_length}")
        if max_length is not None and max_length < prefix_length + 9:
            raise ValueError(
                f"max_length must be at least {prefix_length + 9} tokens (markers and latent alone take "
                f"{prefix_length + 7}), got {max_length}"
            )
        # the first of every latent before all others: their ids do not depend on prefix_length
        latents = [latent_token(k, part) for part in range(prefix_length) for k in range(num_latents)]
        known = tokenizer.get_vocab()
        missing = [token for token in (*MARKERS, *latents) if token not in known]
        if missing:
            tokenizer.add_special_tokens(
                {"extra_special_tokens": [*tokenizer.extra_special_tokens, *missing]},
            )
        self.tokenizer = tokenizer
        self.num_latents = num_latents
        self.prefix_length = prefix_length
        self.max_length = max_length
        self.on_overflow = on_overflow
        self.padding_side = padding_side
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*MARKERS, *latents)}
        self.marker_ids: dict[str, int] = {token: ids[token] for token in MARKERS}
        self.latent_prefixes: list[list[int]] = [
            [ids[latent_token(k, part)] for part in range(prefix_length)] for k in range(num_latents)
        ]  # K rows of m ids
        self.added_ids: list[int] = [ids[token] for token in missing]
        """Tokens that the tokenizer lacked, so that a model of its own has never seen them."""
        self.bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self.end_id: int = self.marker_ids["</y>"]

    def __len__(self) -> int:
        """Size of the vocabulary, markers and latents included."""
        return len(self.tokenizer)

    @property
    def latent_ids(self) -> list[int]:
        """The K ids that route: the first token of every latent."""
        return [row[0] for row in self.latent_prefixes]

    @property
    def all_latent_ids(self) -> list[int]:
        """The K * m ids of all latent tokens, those that route first."""
        return [row[part] for part in range(self.prefix_length) for row in self.latent_prefixes]

    @property
    def section_length(self) -> int:
        """Number of tokens of the latent section ``<z> z_k </z> <y>``."""
        return self.prefix_length + 3

    def _ids(self, texts: Sequence[Text]) -> list[list[int]]:
        if not len(texts):
            return []
        if not isinstance(texts[0], str):
            return [self._own_ids(ids) for ids in texts]
        for text in texts:
            assert isinstance(text, str)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{text!r:.60} holds half of a surrogate pair, which is not a character") from error
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _own_ids(self, ids: Text) -> list[int]:
        if isinstance(ids, str):
            raise ValueError(f"expected token ids, as before it, got the text {ids!r:.60}")
        row = [int(i) for i in ids]
        structure = {*self.marker_ids.values(), *self.all_latent_ids}
        for i in row:
            if not 0 <= i < len(self) or i in structure:
                what = "a marker's or a latent's" if i in structure else f"outside the vocabulary of {len(self)}"
                raise ValueError(f"token id {i} is {what}: give the ids of a text, without its markers")
        return row

    def segments(self, records: Sequence[Record]) -> list[tuple[list[int], list[int]]]:
        """Return (prefix ids, supervised y ids) of each record, whatever their length."""
        m = self.marker_ids
        xs, ys = self._ids([r.x for r in records]), self._ids([r.y for r in records])
        return [([*self.bos, m["<x>"], *x, m["</x>"]], [*y, m["</y>"], *self.eos]) for x, y in zip(xs, ys, strict=True)]

    def length(self, prefix: list[int], y_ids: list[int]) -> int:
        """Return the number of tokens of the generator prompt, its latent section with ``<y>`` included."""
        return len(prefix) + self.section_length + len(y_ids)

    def overflows(self, records: Sequence[Record]) -> list[bool]:
        """Return which records are longer than ``max_length``."""
        if self.max_length is None:
            return [False] * len(records)
        return [self.length(*segment) > self.max_length for segment in self.segments(records)]

    def unlimited(self) -> PromptTemplate:
        """Return the template without its limit of length, which is that of records."""
        template = copy(self)
        template.max_length = None
        return template

    def collate(self, records: Sequence[Record]) -> PairBatch:
        """Return the batch of these records.

        Raises:
            ValueError: if a record is longer than ``max_length``.
        """
        segments = self.segments(records)
        for record, segment in zip(records, segments, strict=True):
            if self.max_length is not None and self.length(*segment) > self.max_length:
                raise ValueError(
                    f"record {record.index} takes {self.length(*segment)} tokens, more than max_length="
                    f"{self.max_length}: raise max_length, or set on_overflow=skip to leave such records out"
                )
        prefix_ids, prefix_mask = self._pad([p for p, _ in segments], self.padding_side)
        y_ids, y_mask = self._pad([y for _, y in segments], "right")
        return PairBatch(
            prefix_ids=prefix_ids,
            prefix_mask=prefix_mask,
            y_ids=y_ids,
            y_mask=y_mask,
            index=torch.tensor([r.index for r in records]),
            strategy=torch.tensor([r.strategy for r in records]),
            x=tuple(r.x for r in records),
            y=tuple(r.y for r in records),
        )

    def prefixes(self, xs: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Return ids and bool mask [B, P] of ``<bos> <x> x </x>``, padded on the left for generation."""
        m = self.marker_ids
        return self._pad([[*self.bos, m["<x>"], *ids, m["</x>"]] for ids in self._ids(xs)], "left")

    def decode(self, ids: Tensor) -> list[str]:
        """Return the text of generated y-tokens [B, T], each cut before its first ``</y>``."""
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in self.cut(ids)]

    def cut(self, ids: Tensor) -> list[list[int]]:
        """Return generated y-tokens [B, T], each cut before its first ``</y>``."""
        return [row[: row.index(self.end_id)] if self.end_id in row else row for row in ids.tolist()]

    def _pad(self, rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        width = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, span] = torch.tensor(row, dtype=torch.long)
            mask[i, span] = True
        return ids, mask

    def fingerprint(self) -> str:
        """Return a hash of the tokenizer and the template, latent tokens left out: equal hashes, equal tokens."""
        words = {word: i for word, i in self.tokenizer.get_vocab().items() if not word.startswith("<z_")}
        probe = self._ids(["Sort 5 3 1; then 12+7=19.", "<y> </y> é\n"])
        text = repr((sorted(words.items()), probe, self.marker_ids, self.bos, self.eos))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
