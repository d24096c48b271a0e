"""Hugging Face causal language models: building, loading, new token rows, and the head as plain tensors."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """The language-model head as tensors: logits = softcap(scale * (hidden W^T + bias)).

    Shape:
        weight: [V, D]. bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return logits [..., V], or [..., R] of the vocabulary ids ``rows`` [R] alone."""
        weight = self.weight if rows is None else self.weight[rows]
        bias = None if self.bias is None else self.bias if rows is None else self.bias[rows]
        logits = nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        logits = logits.float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def positions_of(lm: Any) -> int | None:
    """Return how many tokens a model can read; None = any number."""
    return getattr(lm.config, "max_position_embeddings", None)


def build_causal_lm(config: dict[str, Any], vocab_size: int, pad_token_id: int | None = None) -> Any:
    """Build a randomly initialised causal LM, in fp32 whatever the config's ``dtype``.

    Args:
        config: keywords of a Hugging Face config, ``model_type`` among them (``llama``, ``gpt2``, ``qwen2``, ...).
        vocab_size: number of tokens; overrides the config's.
        pad_token_id: id of the padding token.

    Raises:
        ValueError: if ``model_type`` is missing or unknown, or the config does not fit it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    config = copy.deepcopy(config)
    model_type = config.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.config needs 'model_type' (for example llama, gpt2 or qwen2)")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "for example llama, gpt2 or qwen2"
        raise ValueError(f"model.config: transformers knows no model_type {model_type!r}; {hint}")
    config.update(vocab_size=vocab_size, pad_token_id=pad_token_id, bos_token_id=None, eos_token_id=None)
    try:
        built = AutoConfig.for_model(model_type, **config)
        _refuse_kernel(built)
        return fuse_activations(AutoModelForCausalLM.from_config(built).float())
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ValueError(f"cannot build a model of type {model_type!r} from model.config: {reason}") from error


def load_causal_lm(name: str) -> Any:
    """Load a causal LM from a folder or a hub name in float32 and training mode, without remote code.

    Raises:
        ValueError: if nothing is found there, it is no causal LM, or its head is not one that :func:`head_of` knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _refuse_kernel(config)
        lm = AutoModelForCausalLM.from_pretrained(name, config=config, trust_remote_code=False, use_safetensors=True)
    except Exception as error:  # a folder of a stranger's making fails in transformers in every way there is
        raise ValueError(f"cannot load a causal language model from {name!r}: {_first_line(error)}") from error
    lm = fuse_activations(lm.float().train())
    _check_head(lm, name)
    return lm


def fuse_activations(lm: Any) -> Any:
    """Put PyTorch's tanh-GELU in the place of the one that GPT-2 and its kin spell out, and return the model.

    The function is the same; spelled out it keeps eight arrays of the MLP's width for the backward pass instead of one.
    """
    from transformers.activations import NewGELUActivation

    for part in list(lm.modules()):
        for name, child in part.named_children():
            if type(child) is NewGELUActivation:
                setattr(part, name, nn.GELU(approximate="tanh"))
    return lm


def load_tokenizer(name: str) -> Any:
    """Load a fast tokenizer from a folder or a hub name, without remote code.

    Raises:
        ValueError: if nothing is found there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, use_fast=True)
    except Exception as error:  # as above
        raise ValueError(f"cannot load a tokenizer from {name!r}: {_first_line(error)}") from error


def _refuse_kernel(config: Any) -> None:
    """Raise if a config, or a part of it, asks for code of the hub, which transformers would fetch and run."""
    for key, value in vars(config).items():
        if hasattr(value, "model_type"):
            _refuse_kernel(value)
        elif key.endswith("_implementation_internal"):  # of attention, of experts
            for name in value.values() if isinstance(value, dict) else (value,):
                if isinstance(name, str) and "/" in name:
                    raise ValueError(f"its config names the code {name!r} of the hub; remote code is never run")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def decoder_of(lm: Any) -> nn.Module:
    """Return the part of a causal LM that maps tokens to hidden states."""
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else None
    return lm.base_model if decoder is None else decoder


SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Under which families keep the bound of their logits: most, RecurrentGemma, xLSTM."""


def head_of(lm: Any) -> Head:
    """Return the head of a causal LM with the scalings that its family applies after it."""
    head, config = lm.get_output_embeddings(), lm.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    softcap = next((cap for key in SOFTCAP_KEYS if (cap := getattr(config, key, None))), None)
    return Head(head.weight, head.bias, float(scale), softcap)


@torch.no_grad()
def _check_head(lm: Any, name: str) -> None:
    """Raise unless :func:`head_of` gives the family's own logits on a few tokens; families scale them as they please.

    Raises:
        ValueError: naming the family.
    """
    ids = torch.arange(min(4, lm.get_input_embeddings().weight.shape[0]))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with evaluating(lm):
        found = head_of(lm).logits(decoder_of(lm)(**inputs).last_hidden_state)
        expected = lm(**inputs).logits.float()
    error, size = (found - expected).abs().max(), expected.abs().max()
    if error > 1e-3 * size:  # not where weights are nan: that is said elsewhere
        raise ValueError(
            f"{name!r} is of the family {lm.config.model_type!r}, whose head is none of scale, bias and soft cap: the "
            f"logits made of its weights are off by {float(error):.3g}; expected a family such as llama, gpt2 or qwen2"
        )


def add_token_rows(
    lm: Any, vocab_size: int, std: float, generator: torch.Generator | None = None, added: Sequence[int] = ()
) -> list[int]:
    """Grow the embeddings (and an untied head) to ``vocab_size`` rows; new ones are the mean of the old plus noise.

    Hugging Face's own ``mean_resizing`` gives all new rows almost the same vector, so that latent tokens would be
    copies of each other. Published tables are often padded: the rows of new tokens may be there already, and all zero.

    Args:
        lm: a causal LM; changed in place.
        vocab_size: number of tokens of the tokenizer; a larger embedding keeps its size.
        std: standard deviation of the noise, in units of the rows' own standard deviation about their mean.
        generator: source of the noise.
        added: tokens that the model has never seen; those within the embedding get new rows too.

    Returns:
        The ids of the new rows.
    """
    old = lm.get_input_embeddings().weight.shape[0]
    within = sorted(row for row in added if row < min(old, vocab_size))
    rows = [*within, *range(old, vocab_size)]
    if not rows:
        return []
    if vocab_size > old:
        lm.resize_token_embeddings(vocab_size, mean_resizing=False)
    source = sorted({*range(min(old, vocab_size))} - {*within})
    tables = {id(e.weight): e.weight for e in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    for weight in tables.values():
        fill_rows(weight, rows, weight[source], std, generator)
    return rows


@torch.no_grad()
def fill_rows(weight: Tensor, rows: list[int], source: Tensor, std: float, generator: Any = None) -> None:
    """Set ``weight[rows]`` to the mean of the rows of ``source`` plus noise of ``std`` times their standard deviation.

    Shape:
        weight: [V, D]. source: [N, D].
    """
    known = source.float()
    noise = torch.randn(len(rows), weight.shape[1], generator=generator, dtype=torch.float32).to(weight.device)
    weight[rows] = (known.mean(0) + std * known.std() * noise).to(weight.dtype)


def set_dropout(module: nn.Module, p: float) -> None:
    """Set every dropout probability in a model, in its modules and in what they hand to functions."""
    for part, name, _ in _dropout_rates(module):
        setattr(part, name, p)


def has_dropout(module: nn.Module) -> bool:
    """Return whether some part of the model drops anything out in training mode."""
    return any(rate > 0 for _, _, rate in _dropout_rates(module))


def _dropout_rates(module: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Yield every part of a model that holds a dropout probability, under which name, and the probability.

    Families call it dropout, hidden_dropout, activation_dropout, attn_pdrop, ..., and some give it as the integer 0.
    """
    for part in module.modules():
        for name, value in list(vars(part).items()):
            named = "dropout" in name or name.endswith("_pdrop") or (name == "p" and isinstance(part, nn.Dropout))
            if named and isinstance(value, int | float) and not isinstance(value, bool):
                yield part, name, value


def read_hidden(decoder: Any, ids: Tensor, mask: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return the decoder's hidden states [B, L, D] of padded ids [B, L].

    Positions count real tokens only, plus ``offset`` [B, L] if given.
    """
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if offset is not None:
        positions = positions + offset
    output = decoder(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    return output.last_hidden_state


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every part's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
