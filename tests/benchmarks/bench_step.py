"""S1-S4, L1: a whole training step through the LightningModule against the step that one writes first."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from measure import Figure, clock, extra_megabytes, options, report
from setting import NaiveCVAE, Sentences, artifact, build, frozen_costs, ideal_flops, plain_step, through_lightning

from cvae_lightning.functional.latent_head import COMPILE_VARIABLE
from cvae_lightning.modules import SharedDiscreteCVAE

LENGTH = 64
SETTINGS = {(128, 4): ("S1", 3.5, 4.7), (128, 8): ("S2", 4.5, 6.3), (256, 4): ("S2", 5.5, 7.7)}


def gemm_peak(width: int, vocab: int) -> float:
    """Return FLOP/s of the best of a few large fp32 products."""
    best = 0.0
    for rows, inner, columns in ((512, width, min(vocab, 1024)), (1024, 1024, 1024), (512, 2048, 1024)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        for _ in range(20):
            start = clock()
            for _ in range(5):
                torch.mm(a, b, out=out)
            best = max(best, 5 * 2 * rows * inner * columns / (clock() - start))
    return best


def main() -> None:
    """Measure and report."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    width, layers, vocab = (64, 2, 2000) if given.quick else (256, 4, 50257)
    batch_size, figures = 4, []
    with tempfile.TemporaryDirectory() as folder:
        source = artifact(folder, "gpt2", width, layers, vocab)
        if "S3".startswith(given.only[:2]):  # first: a forked process inherits the holes in the heap
            figures += memory(source, vocab, batch_size)
        for (prefix, latents), (name, gate, aim) in SETTINGS.items():
            if not f"{name} ({prefix},{latents})".startswith(given.only):
                continue
            data = Sentences(prefix, LENGTH, 2 * batch_size, vocab, batch_size)
            ours, naive = (build(kind, source, latents) for kind in (SharedDiscreteCVAE, NaiveCVAE))
            batch = ours.template.collate(data.all[:batch_size])
            assert batch.prefix_ids.shape[1] == prefix - 1  # <z> makes it P
            hand = build(SharedDiscreteCVAE, source, latents)
            check_equal(hand, naive, batch)
            others = {"naive": plain_step(naive, batch), "hand": plain_step(hand, batch, frozen_costs(hand, batch))}
            hand._reference.clear()
            if (prefix, latents) == (128, 4):
                others["compiled"] = compiled(others["hand"])
            best = through_lightning(ours, data, others, clock, given.repeat)
            note = f"{best['naive']:.2f} s / {best['lightning']:.2f} s"
            figures.append(
                Figure(f"{name} ({prefix},{latents}) time", best["naive"] / best["lightning"], gate, aim, note)
            )
            if (prefix, latents) == (128, 4):
                peak = gemm_peak(width, vocab)
                bound = ideal_flops(batch_size, prefix, latents, LENGTH, width, layers, vocab) / peak
                note = f"bound {bound:.2f} s at {peak / 1e9:.0f} GFLOP/s, step {best['lightning']:.2f} s"
                figures.append(Figure("S4 bound / achieved", bound / best["lightning"], 0.6, 0.8, note))
                note = f"the same bound, hand-written step {best['compiled']:.2f} s"
                figures.append(Figure("S4 with CVAE_LIGHTNING_COMPILE_HEAD=1", bound / best["compiled"], note=note))
                overhead = best["lightning"] / best["hand"]
                note = f"{best['lightning']:.2f} s / {best['hand']:.2f} s"
                figures.append(Figure("L1 Lightning / hand-written loop", overhead, 1.10, 1.03, note, True))
            del ours, naive, hand, others
    report("The training step, naive / ours", figures, given)


def compiled(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step with the head's tile arithmetic compiled; compiled once before anything is timed."""

    def run() -> None:
        with patch.dict(os.environ, {COMPILE_VARIABLE: "1"}):
            step()

    run()
    return run


def check_equal(ours: Any, naive: Any, batch: Any) -> None:
    """Both sides compute the same losses, or there is nothing to compare."""
    with torch.no_grad():
        totals = [module._step(batch, "train")[0] for module in (ours, naive)]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-4)


def memory(source: str, vocab: int, batch_size: int) -> list[Figure]:
    """S3: peak extra memory of one step, each side in a process of its own."""

    def extra(kind: type[SharedDiscreteCVAE], latents: int) -> float:
        def build_side() -> Any:
            module = build(kind, source, latents, num_latent_chunk=4)
            batch = module.template.collate(Sentences(128, LENGTH, batch_size, vocab).all)
            if kind is NaiveCVAE:
                module.reference()
                return plain_step(module, batch)
            costs = frozen_costs(module, batch)
            module._reference.clear()
            return plain_step(module, batch, costs)

        return extra_megabytes(build_side)

    naive, ours, wide = extra(NaiveCVAE, 4), extra(SharedDiscreteCVAE, 4), extra(SharedDiscreteCVAE, 16)
    return [
        Figure("S3 memory (128,4)", naive / ours, 5, 7, f"{naive:.0f} MB / {ours:.0f} MB"),
        Figure(
            "S3 memory K=16 / K=4, 4 latents at a time", wide / ours, 1.5, 1.2, f"{wide:.0f} MB / {ours:.0f} MB", True
        ),
    ]


if __name__ == "__main__":
    main()
