"""A copy of the entangled model that writes the solutions of an input equally often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import exp, log
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cvae_lightning.backbones.causal_lm import evaluating
from cvae_lightning.metrics.matching import entropy
from cvae_lightning.modules.descent import descend
from cvae_lightning.modules.text_use import batched
from cvae_lightning.outputs import Record

if TYPE_CHECKING:
    from cvae_lightning.modules.discrete import SharedDiscreteCVAE

ACCIDENT = 0.05
"""Probability, as a share of that of the input's most probable solution, below which a solution may be a mistake."""
UNEVEN = 0.08
"""Nats from equal frequencies that are put up with, of a model that writes nothing but the solutions at hand.

What it writes beside them, as a probability, is added: a model that makes mistakes is uneven by these.
"""
COVERED = 0.5
"""Probability of an input's solutions, all in all, that makes them a list of what there is to write."""
SEVERAL = 0.05
"""Share of the inputs that must have several solutions for their frequencies to matter."""

Ways = Mapping[str, Mapping[str, float]]
"""Of every input its different solutions and their probabilities."""


def evened(
    module: SharedDiscreteCVAE, solutions: Sequence[Record], steps: int, seed: int, batch_size: int
) -> Any | None:
    """Return a copy of the entangled model that was taught to write each solution of an input equally often.

    Whether a solution is the commoner or the rarer one of its input shows in all that a model does. Clusters would go
    by it rather than by the ways of solving, where which way is the commoner depends on x.

    It learns from the inputs whose solutions leave least out of what there is to write: others would teach it never to
    write what was not drawn.

    Args:
        module: holds the entangled model; the copy is trained as its generator is.
        solutions: drawn from the entangled model.
        steps: optimizer steps of 64 solutions.
        seed: of the solutions' order.
        batch_size: solutions read at a time.

    Returns:
        None where the solutions of an input are about equally frequent as they are, or cannot be listed, and with a
        warning where the copy did not learn it.
    """
    ways = probabilities(module, module.reference(), solutions, batch_size)
    before = unevenness(ways)
    known = listed(ways)
    left_out = {x: max(0.0, 1 - sum(ps.values())) for x, ps in known.items()}
    if not before or before < UNEVEN + mean(left_out.values()):
        return None
    several = {x: ps for x, ps in known.items() if len(common(ps)) > 1}
    most = 2 * median(left_out[x] for x in several)
    full = {x: ps for x, ps in several.items() if left_out[x] <= most}
    likely = [[Record(x, y) for y in common(ps)] for x, ps in full.items()]
    lm = module.entangled_copy()
    source = torch.Generator().manual_seed(seed)
    template = module.template.unlimited()

    def loss() -> torch.Tensor:
        inputs = torch.randint(len(likely), (64,), generator=source).tolist()
        places = torch.rand(64, generator=source).tolist()
        rows = [likely[i][int(u * len(likely[i]))] for i, u in zip(inputs, places, strict=True)]
        batch = template.collate(rows).to(module.device)
        return module.free_token_nll(lm, batch).sum() / batch.y_mask.sum()

    with evaluating(lm):
        descend(lm, loss, module.learning_rate, steps, "seeding: even model", module.shows_progress)
    learned = probabilities(module, lm, [record for rows in likely for record in rows], batch_size)
    after = unevenness(learned)
    said = f"the entangled model writes the solutions of an input unequally often, {before:.3f} nats from equally"
    if after > unevenness(full) / 2 or len(listed(learned)) < 0.9 * len(learned):
        rank_zero_warn(
            f"seeding: {said}, and a copy of it did not learn to write them alike in {steps} steps: the latents may "
            "come to mean common and rare solutions. If many solutions are wrong, the entangled model needs more "
            "training; else another model.learning_rate, or more seeding.even_steps, may help."
        )
        return None
    rank_zero_info(f"seeding: {said}; a copy that learned to write them alike, {after:.3f} nats, solves the inputs")
    return lm.requires_grad_(False)


@torch.no_grad()
def probabilities(
    module: SharedDiscreteCVAE, lm: Any, solutions: Sequence[Record], batch_size: int
) -> dict[str, dict[str, float]]:
    """Return p(y|x) under a causal LM of every different solution y of every x."""
    different = list(dict.fromkeys((record.x, record.y) for record in solutions))
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    template = module.template.unlimited()
    with evaluating(lm):
        for some in batched(different, batch_size):
            batch = template.collate([Record(x, y) for x, y in some]).to(module.device)
            nll = module.free_token_nll(lm, batch).sum(-1).tolist()
            for (x, y), nats in zip(some, nll, strict=True):
                found[x][y] = exp(-nats)
    return dict(found)


def listed(ways: Ways) -> dict[str, Mapping[str, float]]:
    """Return the inputs whose solutions are most of what there is to write."""
    return {x: ps for x, ps in ways.items() if sum(ps.values()) >= COVERED}


def common(ps: Mapping[str, float]) -> dict[str, float]:
    """Return the solutions of an input that are no accidents, and their probabilities."""
    least = ACCIDENT * max(ps.values())
    return {y: p for y, p in ps.items() if p >= least}


def unevenness(ways: Ways) -> float:
    """Return how far the probabilities of an input's solutions are from equal ones: log(number) - entropy, in nats.

    The mean over inputs with several solutions that are no accidents. Zero where there are hardly any of these, or
    where those drawn are not most of what there is to write, as with longer texts: which are common is not known then.
    """
    known = listed(ways)
    several = [np.array(list(ps.values())) for ps in map(common, known.values()) if len(ps) > 1]
    if 2 * len(known) < len(ways) or len(several) < max(1, SEVERAL * len(known)):
        return 0.0
    return mean(log(len(ps)) - entropy(ps) for ps in several)
