"""Solutions drawn from a causal language model: behind the template's prompt, or behind one in plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cvae_lightning.backbones.causal_lm import evaluating, positions_of
from cvae_lightning.backbones.generation import generate_within
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate


@torch.no_grad()
def draw_solutions(
    lm: Any,
    template: PromptTemplate,
    xs: Sequence[str],
    num_solutions: int,
    max_new_tokens: int,
    seed: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompt: str | None = None,
    stop: Sequence[str] = (),
) -> list[str | None]:
    """Return ``num_solutions`` solutions of each x in a row; None for one that did not end, or fits no record.

    What is drawn is a function of the arguments alone.

    Args:
        lm: a causal LM that has rows for the template's markers.
        template: of the records that the solutions are for.
        xs: inputs.
        num_solutions: solutions of each input.
        max_new_tokens: longest solution, in tokens.
        seed: of sampling.
        temperature: divides the logits; > 0.
        top_p: share of the probability that is drawn from; in (0, 1].
        prompt: plain text in which ``{x}`` stands for the input, for a model that has never seen the markers: its
            solution ends with the tokenizer's end of text or with a ``stop``, and is taken without the white space
            around it. None = ``<bos> <x> x </x> <y>``, and the solution ends with ``</y>``.
        stop: texts that end a solution behind ``prompt``; they do not belong to it.

    Raises:
        ValueError: if an input is too long to be solved and the template does not say ``skip``, or nothing can end a
            solution behind ``prompt``.
    """
    if prompt is not None and not stop and not template.eos:
        raise ValueError("the tokenizer has no end of text, so that a solution behind a plain prompt needs a `stop`")
    device, positions = next(lm.parameters()).device, positions_of(lm) or 2**31
    limit = min(positions, template.max_length or 2**31)  # of a record
    ids, mask = template.prefixes(xs)
    behind = template.section_length + len(template.eos)
    room = limit - mask.sum(-1) - behind  # for y and </y>
    readable = limit - behind + 1  # <y> is counted with what lies between x and y
    _check_room(template, xs, room, "input", f"the {limit} tokens of a record: shorten it, raise max_length")
    has_room = room >= 2
    if prompt is not None:  # the records do not hold it
        ids, mask = _plain_prompts(template, prompt, xs)
        room, readable = positions - mask.sum(-1), positions
        _check_room(template, xs, room, "plain prompt of the input", f"the model's {positions} positions: shorten it")
        has_room &= room >= 2
    solvable: list[int] = has_room.nonzero()[:, 0].tolist()
    if not solvable:
        return [None] * (len(xs) * num_solutions)
    width = int(mask[solvable].sum(-1).max())
    ids, mask = ids[solvable, -width:].to(device), mask[solvable, -width:].to(device)
    markers = template.marker_ids
    never = [i for token, i in markers.items() if prompt is not None or token != "</y>"]
    rows = lm.get_output_embeddings().weight.shape[0]  # a padded table has some for the latents too
    options: dict[str, Any] = {} if top_p >= 1 else {"top_p": top_p}
    if prompt is None:
        branches = torch.tensor([[markers["<y>"]]], device=device).expand(num_solutions, 1)
        options |= {"branches": branches}
    else:
        ids, mask = ids.repeat_interleave(num_solutions, 0), mask.repeat_interleave(num_solutions, 0)
        options |= {"stop_strings": list(stop), "tokenizer": template.tokenizer} if stop else {}
    end = template.end_id if prompt is None else template.eos[0] if template.eos else template.pad_id
    with evaluating(lm):
        ys = generate_within(
            lm,
            ids,
            mask,
            end,
            max_new_tokens,
            readable,
            do_sample=True,
            temperature=temperature,
            generator=torch.Generator(device).manual_seed(seed),
            banned=torch.tensor([*never, *(i for i in template.all_latent_ids if i < rows)], device=device),
            **options,
        )
    own = room[solvable].repeat_interleave(num_solutions).tolist()  # a row ends there, and is not whole
    rows_of = zip(ys.tolist(), own, strict=True)
    texts = [_ended(template, row[:most], end, prompt is not None, stop) for row, most in rows_of]
    repeated = [xs[i] for i in solvable for _ in range(num_solutions)]
    ended = [j for j, text in enumerate(texts) if text is not None]
    segments = template.segments([Record(repeated[j], texts[j] or "") for j in ended])
    for j, segment in zip(ended, segments, strict=True):  # a text may take more tokens than it was drawn in
        if template.length(*segment) > limit:
            texts[j] = None
    drawn: list[str | None] = [None] * (len(xs) * num_solutions)
    for n, i in enumerate(solvable):
        drawn[i * num_solutions : (i + 1) * num_solutions] = texts[n * num_solutions : (n + 1) * num_solutions]
    return drawn


def _check_room(template: PromptTemplate, xs: Sequence[str], room: Tensor, what: str, where: str) -> None:
    """Raise if an input has no room [N], and the template does not say ``skip``."""
    for x, left in zip(xs, room.tolist(), strict=True):
        if left < 2 and template.on_overflow == "error":
            raise ValueError(
                f"the {what} that begins with {x[:40]!r} leaves no room for a solution in {where}, or set "
                "on_overflow=skip to leave such inputs out"
            )


def _plain_prompts(template: PromptTemplate, prompt: str, xs: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask of the prompts as the tokenizer writes them by itself, padded on the left."""
    texts = [prompt.replace("{x}", x) for x in xs]
    rows = template.tokenizer(texts, split_special_tokens=True)["input_ids"]
    ids = pad_sequence([torch.tensor(row) for row in rows], True, template.pad_id, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]


def _ended(template: PromptTemplate, row: list[int], end: int, plain: bool, stop: Sequence[str]) -> str | None:
    """Return the text of generated ids, or None if nothing has ended it or it is empty."""
    ended = end in row
    text = template.tokenizer.decode(row[: row.index(end)] if ended else row, skip_special_tokens=True)
    found = [at for at in map(text.find, stop) if at >= 0]
    if plain:
        text = (text[: min(found)] if found else text).strip()
    return text if (ended or found) and text.strip() else None
