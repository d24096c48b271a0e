"""P1: the backbone behind a shared prefix against K full sequences, relative to the ratio of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from measure import Figure, options, report, seconds
from setting import family

from cvae_lightning.backbones.branches import BranchMethod, run_branches
from cvae_lightning.backbones.causal_lm import build_causal_lm

BATCH, SUFFIX = 4, 68
SETTINGS = ((32, 4), (128, 4), (256, 8))


def main() -> None:
    """Measure and report."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    width, layers = (64, 2) if given.quick else (256, 4)
    figures = []
    for name in ("gpt2", "qwen2"):
        torch.manual_seed(0)
        lm = build_causal_lm(family(name, width, layers), 512, 0)
        for prefix, latents in SETTINGS[: 1 if given.quick else None]:
            generator = torch.Generator().manual_seed(0)
            prefix_ids = torch.randint(512, (BATCH, prefix), generator=generator)
            suffix = torch.randint(512, (BATCH, latents, SUFFIX), generator=generator)
            prefix_mask = torch.ones_like(prefix_ids, dtype=torch.bool)
            if name == "qwen2":  # with padding on the left
                prefix_mask &= torch.arange(prefix) >= torch.tensor([0, 3, 5, 7])[:, None]
            suffix_mask = torch.ones(BATCH, SUFFIX, dtype=torch.bool)

            def side(method: BranchMethod, *inputs: torch.Tensor, lm: torch.nn.Module = lm) -> Callable[[], None]:
                def run() -> None:
                    output = run_branches(lm, *inputs, method)
                    (output.hidden.sum() + output.router_hidden.sum()).backward()
                    lm.zero_grad()

                return run

            inputs = (prefix_ids, prefix_mask, suffix, suffix_mask)
            methods: tuple[BranchMethod, ...] = ("repeat", "cache", "grouped")
            best = seconds({method: side(method, *inputs) for method in methods}, given.repeat)
            tokens = latents * (prefix + SUFFIX) / (prefix + latents * SUFFIX)
            for method in methods[1:]:
                speed_up = best["repeat"] / best[method]
                note = f"{speed_up:.2f} x, tokens {tokens:.2f} x; {best['repeat']:.2f} s / {best[method]:.2f} s"
                figures.append(Figure(f"P1 {name} ({prefix},{latents}) {method}", speed_up / tokens, 0.9, 1.0, note))
    report("The backbone, speed-up over `repeat` / ratio of tokens", figures, given)


if __name__ == "__main__":
    main()
