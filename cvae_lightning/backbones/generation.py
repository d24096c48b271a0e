"""Batched generation behind a prompt, with positions that count real tokens."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.branch_choice import attends_only
from cvae_lightning.backbones.causal_lm import decoder_of, head_of, positions_of

ELSEWHERE = {
    "max_length": "it counts the prompt and its padding: give max_new_tokens",
    "min_length": "it counts the prompt and its padding: give min_new_tokens",
    "pad_token_id": "the prompt template sets it",
    "bos_token_id": "the prompt template sets it",
    "decoder_start_token_id": "the prompt template sets it",
    "is_assistant": "this model drafts for no other",
}
"""Options of ``GenerationConfig`` that have no place here, and why."""

SHARES = ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Options that are shares of the probability; transformers leaves out what lies above 1 without a word."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise if generation cannot follow these options of transformers' ``GenerationConfig``.

    Raises:
        ValueError: for an unknown option, one without effect (``top_p`` without ``do_sample``), a value out of range,
            or a method whose code transformers would fetch from the hub.
    """
    from transformers import GenerationConfig

    known = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
    for name in options:
        why = ELSEWHERE.get(name)
        if name.startswith("output_") or name == "return_dict_in_generate":
            why = "texts are returned, and nothing else"
        if why is not None:
            raise ValueError(f"{name} is no option of generate: {why}")
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "generator_seed", "batch_size"], n=1)
            hint = f"did you mean {near[0]}?" if near else "it takes generator_seed, batch_size and"
            raise ValueError(f"generate has no option {name!r}; {hint}{'' if near else ' those of GenerationConfig'}")
    config = GenerationConfig()
    for name, value in options.items():
        setattr(config, name, value)
    try:
        mode = str(config.get_generation_mode().value)
        if mode not in ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation"):
            raise ValueError(f"they ask for {mode}, whose code lies on the hub, and code from there is never run")
        config.validate(strict=True)
        for name in SHARES:
            if not 0 <= (options.get(name) or 0) <= 1:
                raise ValueError(f"`{name}` must be a share, between 0 and 1, but is {options[name]}.")
        if config.do_sample and config.temperature is not None and not config.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, but is {config.temperature}: greedy is do_sample=False.")
    except (TypeError, ValueError) as error:
        issues = [line[2:] for line in str(error).splitlines() if line.startswith("- ")] or [str(error)]
        raise ValueError(f"generate cannot follow its options: {' '.join(issues)}") from error


def expansion(options: Mapping[str, Any]) -> int:
    """Return how many rows of the model's batch a prompt becomes: its beams, or its several continuations."""
    return max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)


@torch.no_grad()
def generate_within(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    end_id: int,
    max_new_tokens: int,
    positions: int | None,
    embed: Callable[[Tensor, Tensor], Tensor] | None = None,
    first: int = 0,
    **options: Any,
) -> Tensor:
    """Continue left-padded prompts as :func:`generate_ids` does, each as far as there is room for it.

    A long prompt must not cut short what stands beside it, so every row has room of its own. Where padding takes room
    too, in transformers' ``generate`` and in families that keep a table of all pairs of places, prompts that are short
    of it are continued together with those of their own length.

    Args:
        lm: a Hugging Face causal LM.
        ids: [N, L] prompts, padded on the left.
        mask: [N, L] True at real tokens.
        end_id: the token that ends a row.
        max_new_tokens: longest continuation.
        positions: how many tokens may stand in a row, branch and continuation included; None = any number. Every row
            may be continued by one.
        embed: turns the prompts [n, l] of these rows [n] into input embeddings [n, l, D].
        first: number of the first row, as ``embed`` counts them.
        options: others of :func:`generate_ids`.

    Returns:
        As :func:`generate_ids`.
    """
    branches = options.get("branches")
    lengths = (mask.sum(-1) + (0 if branches is None else branches.shape[1])).cpu()
    room = torch.full_like(lengths, max_new_tokens)
    if positions is not None:
        room = (positions - lengths).clamp(1, max_new_tokens)
    rows = torch.arange(len(ids))
    groups = [rows[room == most] for most in room.unique()] if _padding_takes_room(lm, options) else [rows]
    parts: list[Tensor] = []
    for group in groups:
        width = int(mask[group].sum(-1).max())
        prompts, real = ids[group, -width:], mask[group, -width:]
        most = room[group] if len(room[group].unique()) > 1 else int(room[group[0]])
        prompts = embed(prompts, first + group) if embed else prompts
        parts.append(generate_ids(lm, prompts, real, end_id, most, **options))
    longest = max(part.shape[1] for part in parts)
    padded = [nn.functional.pad(part, (0, longest - part.shape[1]), value=end_id) for part in parts]
    return torch.cat(padded).unflatten(0, (len(ids), -1))[torch.cat(groups).argsort()].flatten(0, 1)


def _padding_takes_room(lm: Any, options: Mapping[str, Any]) -> bool:
    """Whether padded places count where tokens are counted: by transformers, or in a table of all pairs of places."""
    by_transformers = not options.keys() <= set(inspect.signature(generate_ids).parameters)
    return by_transformers or any(buffer.shape[-2:] == (positions_of(lm),) * 2 for buffer in lm.buffers())


@torch.no_grad()
def generate_ids(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    end_id: int,
    max_new_tokens: int | Tensor,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    banned: Tensor | None = None,
    branches: Tensor | None = None,
    shrink: bool = True,
    tokenizer: Any = None,
    **options: Any,
) -> Tensor:
    """Continue left-padded prompts until every row holds ``end_id``.

    Rows that have ended leave the batch once they are a quarter of it, unless ``shrink`` is off.

    Args:
        lm: a Hugging Face causal LM.
        ids: [N, L] prompts, padded on the left; or [N, L, D] their input embeddings.
        mask: [N, L] True at real tokens.
        end_id: the token that ends a row; what follows it in a row has no meaning.
        max_new_tokens: longest continuation, at least 1; or that of each prompt, [N], without ``options``: a row that
            has reached its own has ended.
        do_sample: draw from the model instead of taking the most probable token.
        temperature: divides the logits when sampling; > 0.
        generator: source of randomness for sampling.
        banned: [M] ids never to be produced (markers, latent tokens).
        branches: [K, S] ids; every prompt is continued behind each of these, and read only once.
        shrink: let ended rows leave; off where something outside keeps one value per row, as conditioned norms do.
        tokenizer: what writes the texts in which ``stop_strings`` are looked for.
        options: any other option of transformers' ``GenerationConfig``. With one, transformers' own ``generate`` runs:
            it has them all, but it reads a prompt once for each of its branches.

    Returns:
        [N, at most max_new_tokens] new token ids; [N * K, ...] with branches, those of a prompt in a row; and
        ``num_return_sequences`` rows in a row for each of these.
    """
    from cvae_lightning.backbones.kv_cache import generation_cache

    if options:
        if branches is not None:
            ids = torch.cat([ids.repeat_interleave(len(branches), 0), branches.repeat(len(ids), 1)], -1)
            tail = mask.new_ones(len(ids), branches.shape[1])
            mask = torch.cat([mask.repeat_interleave(len(branches), 0), tail], -1)
        options |= {"do_sample": do_sample, "max_new_tokens": max_new_tokens}
        if do_sample:
            options["temperature"] = temperature
        return _generate_by_transformers(lm, ids, mask, end_id, generator, banned, tokenizer, options)
    decoder, head = decoder_of(lm), head_of(lm)
    most = torch.as_tensor(max_new_tokens).expand(len(mask)).to(mask.device)
    longest = int(most.max())
    cache: Any = generation_cache(lm, longest) if takes_cache(decoder) else None
    remembering = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    sharing = cache is not None and attends_only(lm)
    mask = mask.long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    if branches is not None:
        tail = branches.repeat(len(mask), 1)  # [N * K, S]
        seen = mask.repeat_interleave(len(branches), 0)
        mask = torch.cat([seen, torch.ones_like(tail)], -1)
        behind = (mask.cumsum(-1) - 1).clamp_min(0)
        if sharing:
            prompt = {"input_ids": ids, "attention_mask": seen[:: len(branches)], "position_ids": positions}
            decoder(**prompt, **remembering)
            cache.batch_repeat_interleave(len(branches))
            ids, positions = tail, behind[:, -tail.shape[1] :]
        else:
            ids, positions = torch.cat([ids.repeat_interleave(len(branches), 0), tail], -1), behind
    rows = torch.arange(len(mask), device=mask.device)  # those that still run
    most = most.repeat_interleave(len(mask) // len(most))
    last = positions[:, -1] + most - 1  # position of the last token that a row reads
    result = mask.new_full((len(mask), longest), end_id)
    for step in range(longest):
        output = decoder(
            **{"inputs_embeds" if ids.is_floating_point() else "input_ids": ids},
            attention_mask=mask,
            position_ids=positions,
            **remembering,
        )
        logits = head.logits(output.last_hidden_state[:, -1])  # [rows, V]
        if banned is not None:
            logits[:, banned] = float("-inf")
        if do_sample:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)
        result[rows, step] = new[:, 0].where(step < most[rows], end_id)
        running = (result[rows, : step + 1] != end_id).all(-1) & (step + 1 < most[rows])
        left = int(running.sum())
        if left == 0:
            return result[:, : step + 1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        behind = torch.minimum(positions[:, -1] + 1, last[rows])[:, None]
        if cache is None:  # all of it is read again
            tail = lm.get_input_embeddings()(new) if ids.is_floating_point() else new
            ids, positions = torch.cat([ids, tail], 1), torch.cat([positions, behind], -1)
        else:
            ids, positions = new, behind
        if shrink and (sharing or cache is None) and left <= 0.75 * len(rows):
            index = running.nonzero()[:, 0]
            if cache is not None:
                cache.batch_select_indices(index)
            rows, ids, mask, positions = (t[index] for t in (rows, ids, mask, positions))
    return result


def takes_cache(decoder: Any) -> bool:
    """Return whether a decoder takes a cache under the name that all but a few state-space families use.

    These few take no notice of ``past_key_values``, and those of them that keep a state of their own leave padding out
    of account when they go on from it.
    """
    return "past_key_values" in inspect.signature(decoder.forward).parameters


def _generate_by_transformers(
    lm: Any,
    ids: Tensor,
    mask: Tensor,
    end_id: int,
    generator: torch.Generator | None,
    banned: Tensor | None,
    tokenizer: Any,
    options: dict[str, Any],
) -> Tensor:
    """Return new token ids by ``lm.generate``, under these options alone."""
    from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor, StoppingCriteria

    class StopStrings(StoppingCriteria):
        """Ends a row whose y holds a string; transformers' own fails on tokenizers that cannot write its probe."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
            found = [any(stop in text for stop in stops) for text in texts]
            return torch.tensor(found, device=input_ids.device)

    stops = options.pop("stop_strings", None)
    stops = [stops] if isinstance(stops, str) else stops
    ends = options.pop("eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    options["eos_token_id"] = [end_id, *ends]
    options["pad_token_id"] = end_id  # so that what follows a row's end is cut with it
    suppressed = [*(options.pop("suppress_tokens", None) or []), *([] if banned is None else banned.tolist())]
    options["suppress_tokens"] = [token for token in suppressed if token not in ends] or None
    if options["do_sample"]:
        options.setdefault("top_k", 0)  # transformers' own default is 50
    vectors = ids.is_floating_point()
    penalty = options.pop("repetition_penalty", None) if vectors else None  # which would spare as much as is padded
    start = 0 if vectors else ids.shape[1]  # where y starts in what transformers hands back
    seed = None if generator is None else int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with _defaults(lm), torch.random.fork_rng([ids.device] if ids.is_cuda else [], enabled=seed is not None):
        if seed is not None:  # transformers draws from the global generator
            torch.manual_seed(seed)
        produced = lm.generate(
            **{"inputs_embeds" if vectors else "input_ids": ids},
            attention_mask=mask.long(),
            generation_config=GenerationConfig(**options),
            logits_processor=[] if penalty is None else [RepetitionPenaltyLogitsProcessor(penalty)],
            stopping_criteria=[StopStrings()] if stops else None,
        )
    return produced[:, start:]


@contextmanager
def _defaults(lm: Any) -> Iterator[None]:
    """Within this context a model has no generation options of its own, so that those given are the only ones."""
    from transformers import GenerationConfig

    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
