"""The model card of an export: what it is, how to prompt it, what its latents do, how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cvae_lightning.callbacks.report import table
from cvae_lightning.export.folder import LATENT_FILES, is_plain
from cvae_lightning.export.usage import load_usage, plain_usage, prompt
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE

NOT_PLAIN = (
    "This folder alone is not the whole model. {why} live in `{file}`, and a plain Hugging Face folder has no place "
    "for them: `AutoModelForCausalLM` would load a language model that ignores {what}. Use "
    "`cvae_lightning.load_export`."
)
WIDTH = 400
"""Longest text of a sample, in characters."""


def warning(module: SharedDiscreteCVAE | ContinuousCVAE, kind: str) -> str | None:
    """Return what to say where the folder alone is not the whole model; None where it is."""
    if is_plain(module):
        return None
    discrete = kind == "discrete"
    why = "The z-conditioned norms" if discrete else "The router and the weights that inject z"
    what = "part of its latent" if discrete else "its latent"
    return NOT_PLAIN.format(why=why, file=LATENT_FILES[kind], what=what)


def card(
    module: SharedDiscreteCVAE | ContinuousCVAE,
    kind: str,
    size: int,
    name: str,
    config: Mapping[str, Any],
    steps: int,
    summary: Mapping[str, Any] | None,
    samples: Sequence[tuple[str, Mapping[str, str]]],
) -> str:
    """Return the text of README.md.

    Args:
        module: the model.
        kind: ``discrete`` or ``continuous``.
        size: parameters of its language model.
        name: title.
        config: hyperparameters of the training.
        steps: optimizer steps of the training.
        summary: what ``cvae-lightning test`` measured; None if it is not known.
        samples: inputs, each with its outputs by label.
    """
    xs = [x for x, _ in samples[:2]]
    library = "transformers" if is_plain(module) else "cvae_lightning"
    caution = warning(module, kind)
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: [cvae_lightning, {kind}-latent]\n---",
        f"# {name}",
        _introduction(module, size),
        *([f"> **Note** {caution}"] if caution else []),
        "## How to prompt it",
        prompt(module),
        "## How to use it",
        *([plain_usage(module, xs)] if is_plain(module) else []),
        load_usage(module, xs),
        "## Latents",
        _latents(module, summary),
        "## How good it is",
        _quality(summary),
        "## What it writes",
        _samples(samples),
        "## How it was trained",
        f"{steps} optimizer steps with `cvae_lightning`; labels of the strategies, if there were any, were seen by the "
        "metrics alone.",
        _block("yaml", yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True).rstrip()),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(module: SharedDiscreteCVAE | ContinuousCVAE, size: int) -> str:
    family = f"A `{type(module.lm).__name__}` of {size:,} parameters"
    if isinstance(module, SharedDiscreteCVAE):
        return (
            f"{family} that is a router p(z|x) and a generator p(y|x,z) at once. z is one of {module.num_latents} "
            "latents, and choosing z chooses the way in which y is worked out."
        )
    return (
        f"{family} with a router p(z|x) and a generator p(y|x,z). z is a Gaussian vector of {module.latent_dim} "
        "dimensions, and choosing z chooses the way in which y is worked out."
    )


def _latents(module: SharedDiscreteCVAE | ContinuousCVAE, summary: Mapping[str, Any] | None) -> str:
    if not isinstance(module, SharedDiscreteCVAE):
        return f"z ~ N(mean(x), diag var(x)) in {module.latent_dim} dimensions; `route` returns mean and log-variance."
    columns = [(summary or {}).get(key) for key in ("usage", "router_usage")]
    rows = ["| latent | tokens | usage, posterior | usage, router |", "|---|---|---|---|"]
    for k, ids in enumerate(module.template.latent_prefixes):
        tokens = " ".join(f"`{token}`" for token in module.template.tokenizer.convert_ids_to_tokens(ids))
        shares = [f"{usage[k]:.3f}" if usage and k < len(usage) else "not measured" for usage in columns]
        rows.append(f"| {k} | {tokens} | {' | '.join(shares)} |")
    return "\n".join(
        [*rows, "", "Usage: share of the test split's solutions that q(z|x,y), or p(z|x), gives a latent."]
    )


def _quality(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "Not measured: `cvae-lightning test` writes a `summary.json`, which `export --report` shows here."
    return _block("text", "\n".join(table(summary)).rstrip())


def _samples(samples: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    if not samples:
        return "No sample was written."
    width = max(len(label) for _, outputs in samples for label in outputs)
    blocks = []
    for x, outputs in samples:
        lines = [f"{'x':<{width}}  {_short(x)}", *(f"{label:<{width}}  {_short(y)}" for label, y in outputs.items())]
        blocks.append(_block("text", "\n".join(lines)))
    return "\n\n".join(["Greedy, one line for each latent; texts as JSON strings.", *blocks])


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= WIDTH else shown[: WIDTH - 1] + "…"


def _block(language: str, text: str) -> str:
    """Return a code block, fenced by more backticks than stand in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(value: Any) -> Any:
    """Return nested plain data that YAML can write."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
