"""X1-X4: what a sharp posterior costs, whose gradients are nothing for most latents, or denormal numbers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from bench_head import BATCH, inputs, naive_costs
from measure import Figure, extra_megabytes, options, report, seconds
from setting import Sentences, artifact, build, plain_step

from cvae_lightning.backbones.branch_activations import ActivationsMode
from cvae_lightning.functional import latent_token_stats, precision
from cvae_lightning.losses import FreeEnergyLoss, LossCallback
from cvae_lightning.modules import SharedDiscreteCVAE

LATENTS = 4
SPREAD = 75.0
"""Nats by which the second-best latent is worse in the posterior: gradients below e^-87 are denormal numbers."""
FLAT, ALONE = 1e-3, 3000.0
"""The same where all latents weigh alike, and where one has all the weight in nearly every example."""


def head_step(head: Any, sharp: bool, width: int, vocab: int) -> Callable[[], None]:
    """Return one forward and backward pass of a head, whose costs a posterior weighs."""
    hidden, weight, targets = inputs(LATENTS, width, vocab)
    scores = (
        torch.randn(BATCH, LATENTS, generator=torch.Generator().manual_seed(1))
        + sharp * SPREAD * torch.eye(LATENTS)[:BATCH]
    )

    def run() -> None:
        hidden.grad = weight.grad = None
        (head(hidden, weight, targets)[0].mean(-1) * scores.softmax(-1)).sum().backward()

    return run


def exact_step(
    source: str,
    vocab: int,
    latents: int = LATENTS,
    length: int = 32,
    mode: ActivationsMode = "kept",
    spread: float = SPREAD,
) -> Callable[[], None]:
    """Return a training step by an exact posterior whose second-best latent is so many nats worse."""
    losses: dict[str, LossCallback | None] = {"free_energy": FreeEnergyLoss()}
    module = build(SharedDiscreteCVAE, source, latents, losses=losses, branch_activations=mode)
    module.posterior_kind = "exact"
    batch = module.template.collate(Sentences(length, length, 16, vocab).all)
    with torch.no_grad():
        outputs = module.compute_outputs(batch, frozenset())
        scores = outputs.router_log_probs - outputs.sequence_nll
        best, second = scores.topk(2).values.T
        module.posterior_temperature = float((best - second).median()) / spread
    return plain_step(module, batch)


def again(source: str, vocab: int, length: int, repeat: int) -> Iterator[Figure]:
    """X3-X4: activations of all branches kept, against those with a gradient made again."""
    for latents, spread, gate, aim in ((4, ALONE, 1.3, 1.5), (8, ALONE, 1.6, 2.0), (4, FLAT, None, None)):
        modes: tuple[ActivationsMode, ...] = ("kept", "again", "auto")
        sides = {mode: exact_step(source, vocab, latents, length, mode, spread) for mode in modes}
        best = seconds(sides, repeat)
        kind = "flat posterior" if spread == FLAT else "one latent weighs"
        for mode in modes[1:]:
            note = f"{best['kept']:.2f} s / {best[mode]:.2f} s"
            name = f"X3 step, K={latents}, {kind}, activations kept / {mode}"
            yield Figure(name, best["kept"] / best[mode], gate, aim, note)
    for latents, gate in ((4, 1.5), (8, 2.0)):
        kept, made = (
            extra_megabytes(partial(exact_step, source, vocab, latents, length, mode, ALONE))
            for mode in ("kept", "again")
        )
        note = f"{kept:.0f} MB / {made:.0f} MB"
        yield Figure(f"X4 memory of a step, K={latents}, activations kept / again", kept / made, gate, note=note)


def main() -> None:
    """Measure and report."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    width, layers, vocab = (32, 1, 997) if given.quick else (256, 4, 50257)
    figures = []
    ours = partial(latent_token_stats, need_jsd=False)
    for sharp in (True, False):
        sides = {
            "naive": head_step(naive_costs, sharp, width, vocab),
            "ours": head_step(ours, sharp, width, vocab),
        }
        best = seconds(sides, given.repeat)
        name = f"X1 head without divergence, K=4, {'sharp' if sharp else 'flat'} posterior"
        note = f"{best['naive']:.2f} s / {best['ours']:.2f} s"
        figures.append(Figure(name, best["naive"] / best["ours"], 1.5 if sharp else 1.0, note=note))
    with tempfile.TemporaryDirectory() as folder:
        source = artifact(folder, "llama", min(width, 128), layers, 200)
        step = exact_step(source, 200)

        def kept() -> None:
            with patch.object(precision, "NEGLIGIBLE", 0.0):
                step()

        best = seconds({"kept": kept, "dropped": step}, given.repeat)
        note = f"{best['kept']:.2f} s / {best['dropped']:.2f} s"
        figures.append(
            Figure("X2 step, negligible gradients kept / dropped", best["kept"] / best["dropped"], 1.5, note=note)
        )
        figures += again(source, 200, 16 if given.quick else 64, given.repeat)
    report("A sharp posterior", figures, given)


if __name__ == "__main__":
    main()
