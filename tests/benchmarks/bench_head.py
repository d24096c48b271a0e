"""H1-H4: the language-model head with the inter-latent divergence, against logits for all positions and latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Figure, extra_megabytes, options, report, seconds
from setting import plain_divergence
from torch import Tensor

from cvae_lightning.functional import latent_token_stats

BATCH, LENGTH = 4, 64


def naive_costs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes first: logits and log-softmax of all positions, [B, K, T, V], behind the costs [B, K, T]."""
    log_probs = (hidden @ weight.t()).float().log_softmax(-1)
    return -log_probs.gather(-1, targets[:, None, :, None].expand(-1, hidden.shape[1], -1, 1)).squeeze(-1), log_probs


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the costs and the KL form of the divergence."""
    nll, log_probs = naive_costs(hidden, weight, targets)
    return nll, plain_divergence(log_probs)


def inputs(latents: int, width: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return random states, a head's weight and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, latents, LENGTH, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (BATCH, LENGTH), generator=generator)


def step(
    head: Any, latents: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, frozen: bool = False
) -> Callable[[], None]:
    """Return one forward and backward pass of a head in a loss that is linear in neither statistic."""
    hidden, weight, targets = inputs(latents, width, vocab, dtype)
    weight.requires_grad_(not frozen)

    def run() -> None:
        hidden.grad = weight.grad = None
        nll, jsd = head(hidden, weight, targets)
        (-torch.logsumexp(-nll.sum(-1) / LENGTH, 1).sum() - jsd.sum()).backward()

    return run


def main() -> None:
    """Measure and report."""
    given = options(__doc__ or "")
    width, vocab, wide = (32, 997, 1999) if given.quick else (256, 50257, 151936)
    figures = []

    def compare(name: str, gate: float, aim: float, **setting: Any) -> None:
        if not name.startswith(given.only):
            return
        sides = {"naive": step(naive, **setting), "ours": step(latent_token_stats, **setting)}
        best = seconds(sides, given.repeat)
        note = f"{best['naive']:.2f} s / {best['ours']:.2f} s"
        figures.append(Figure(name, best["naive"] / best["ours"], gate, aim, note))

    def memory(head: Any, **setting: Any) -> float:
        return extra_megabytes(lambda: step(head, **setting))

    # Memory first: a forked process inherits the holes in the heap.
    if "H2".startswith(given.only[:2]):
        settings = [{"latents": k, "width": width, "vocab": vocab} for k in (4, 8)]
        theirs, ours, before = (
            memory(naive, **settings[1]),
            memory(latent_token_stats, **settings[1]),
            memory(latent_token_stats, **settings[0]),
        )
        figures.append(Figure("H2 memory, K=8", theirs / ours, 10, 16, f"{theirs:.0f} MB / {ours:.0f} MB"))
        figures.append(Figure("H2 memory, K=8 / K=4", ours / before, 1.1, 1.03, f"{ours:.0f} / {before:.0f} MB", True))
    if "H3".startswith(given.only[:2]):
        setting = {"latents": 4, "width": width, "vocab": wide}
        theirs, ours = memory(naive, **setting), memory(latent_token_stats, **setting)
        figures.append(Figure("H3 memory, V=152k", theirs / ours, 10, 14, f"{theirs:.0f} MB / {ours:.0f} MB"))
    compare("H1 time, K=4", 1.25, 1.6, latents=4, width=width, vocab=vocab)
    compare("H3 time, V=152k", 1.7, 2.2, latents=4, width=width, vocab=wide)
    compare("H4 time, bf16", 1.8, 2.4, latents=4, width=width, vocab=vocab, dtype=torch.bfloat16)
    compare("H4 time, frozen W", 1.8, 2.3, latents=4, width=width, vocab=vocab, frozen=True)
    report("The language-model head, naive / ours", figures, given)


if __name__ == "__main__":
    main()
