"""The command ``cvae-lightning export``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def export(args: Sequence[str]) -> int:
    """Write a checkpoint as a folder that other programs load, and return the exit code."""
    given = _parse(args)
    from cvae_lightning.export import card, folder, restore, samples

    target, checkpoint = Path(given.out), Path(given.ckpt)
    folder.check_target(target, given.force)
    report = Path(given.report) if given.report else samples.beside(checkpoint, "summary.json")
    summary = None if report is None else read_summary(report)
    found = restore.restore(checkpoint)
    module, notes = found.module, list(found.notes)
    if report is None:
        notes.append(
            "no summary.json beside the run: the card has no table (`cvae-lightning test` writes one; --report)"
        )
    outputs: list[tuple[str, dict[str, str]]] = []
    config = Path(given.config) if given.config else samples.beside(checkpoint, "config.yaml")
    if config is None and given.inputs:
        notes.append("no config.yaml beside the run: the card has no sample outputs (--config names one)")
    elif config is not None and given.inputs:
        try:
            outputs = write_samples(module, samples.sample_inputs(config, given.inputs, module.template))
        except (OSError, ValueError) as error:
            if given.config:
                raise
            notes.append(f"the card has no sample outputs: {error}")
    with folder.whole_folder(target, given.force) as new:
        size = folder.write_model(new, module, found.kind, given.posterior)
        name = target.absolute().name
        text = card.card(module, found.kind, size, name, found.config, found.steps, summary, outputs)
        (new / "README.md").write_text(text, encoding="utf-8")
    for note in notes:
        print(f"note: {note}")
    caution = card.warning(module, found.kind)
    print(f"{target}: {'a plain Hugging Face folder' if caution is None else caution}")
    print(f"how to use it: {target / 'README.md'}")
    return 0


def write_samples(module: Any, xs: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the inputs with what the model writes: under every latent, or at draws from a Gaussian router."""
    if hasattr(module, "generate_all"):
        return [(x, {f"z{k}": y for k, y in enumerate(ys)}) for x, ys in zip(xs, module.generate_all(xs), strict=True)]
    columns = {"mean": module.generate(xs, "mean")}
    columns |= {f"draw {seed}": module.generate(xs, "router", generator_seed=seed) for seed in (1, 2, 3)}
    return [(x, {label: ys[i] for label, ys in columns.items()}) for i, x in enumerate(xs)]


def read_summary(path: Path) -> Mapping[str, Any]:
    """Return what ``cvae-lightning test`` measured.

    Raises:
        ValueError: if the file holds anything but such a table.
    """
    from cvae_lightning.callbacks.report import SUMMARY_KEYS

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() & SUMMARY_KEYS.keys():
        raise ValueError(f"{path}: expected the summary.json of `cvae-lightning test`, got {str(content)[:60]}")
    for key, value in content.items():
        listed = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(item, int | float) for item in listed):
            raise ValueError(f"{path}: {key} must be a number or a list of numbers, got {value!r:.60}")
    return content


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cvae-lightning export",
        description="Write a checkpoint as a Hugging Face folder with a model card. A discrete model without "
        "conditioned norms needs nothing but transformers afterwards; all others load with "
        "cvae_lightning.load_export(DIR).",
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a model with latents")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it appears only when it is whole")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="summary.json of `cvae-lightning test` (default: the one beside the run, if any)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config whose data gives the inputs of the sample outputs (default: the run's config.yaml, if any)",
    )
    parser.add_argument(
        "--inputs", type=_count, default=3, metavar="N", help="inputs of the sample outputs (default: 3)"
    )
    parser.add_argument("--posterior", action="store_true", help="export the posterior network too, for infer")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    return parser.parse_args(args)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return int(text)
