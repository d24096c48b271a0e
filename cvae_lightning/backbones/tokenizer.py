"""Tokenizers built from the data, offline, for models that are trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")

TokenizerKind = Literal["char", "word", "bpe"]


def build_tokenizer(texts: Iterable[str], kind: TokenizerKind = "char", vocab_size: int = 4096) -> Any:
    """Build a lossless fast tokenizer from texts.

    Args:
        texts: training texts; every x and y.
        kind: ``char`` (one token per character), ``word`` (words and punctuation with their leading space) or
            ``bpe`` (byte-level byte-pair encoding, no unknown token).
        vocab_size: largest number of tokens for ``word`` (the most frequent stay) and ``bpe``.

    Returns:
        A ``PreTrainedTokenizerFast`` with ``<pad> <unk> <bos> <eos>``; ``char`` ids do not depend on the texts' order.

    Raises:
        ValueError: if the texts are empty or ``kind`` is unknown.
    """
    from transformers import PreTrainedTokenizerFast

    if kind == "char":
        characters = sorted(set().union(*map(set, texts)))
        if not characters:
            raise ValueError("a tokenizer needs at least one non-empty text, got none")
        vocab = {token: i for i, token in enumerate((*SPECIAL, *characters))}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    elif kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        words = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(texts, words)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        pairs = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, pairs)
    else:
        raise ValueError(f"tokenizer kind must be 'char', 'word' or 'bpe', got {kind!r}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
