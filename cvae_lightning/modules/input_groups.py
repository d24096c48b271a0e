"""Groups of inputs that are like each other, and halves put together of such groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cvae_lightning.modules.solution_divisions import Labels

GROUPS = 8
"""Groups of inputs that are like each other, by what the model makes of them."""
PLACES = 8
"""Tokens from either end of x by which inputs are grouped."""
SIDES = 16
"""Ways to put the groups of inputs to two sides, of each grouping."""


def environments_of(inputs: Tensor, tokens: Sequence[Sequence[int]], seed: int) -> list[Labels]:
    """Return groups [N] of the inputs: by their features, and by each of the first and last tokens of x.

    A token that fewer than one in 20 inputs have there is put to the others of that kind.

    Args:
        inputs: features of the inputs, [N, F].
        tokens: their tokens.
        seed: of k-means.
    """
    from sklearn.cluster import KMeans

    size = len(tokens)
    if size < 2 * GROUPS:
        return [np.arange(size) % GROUPS]
    left, scale, _ = torch.pca_lowrank(inputs, min(16, *inputs.shape), niter=4)
    points = (left * scale).cpu().double().numpy()
    found = [KMeans(GROUPS, n_init=3, random_state=seed % 2**32).fit(points).labels_.astype(np.int64)]
    for place in (*range(PLACES), *range(-PLACES, 0)):
        there = [ids[place] if -len(ids) <= place < len(ids) else -1 for ids in tokens]
        shares = Counter(there)
        often = {token: i for i, token in enumerate(shares) if shares[token] >= 0.05 * size}
        groups = np.array([often.get(token, -1) for token in there])
        if len(np.unique(groups)) > 1 and max(shares.values()) <= 0.9 * size:
            found.append(groups)
    return [groups for i, groups in enumerate(found) if not any(np.array_equal(groups, other) for other in found[:i])]


def sides_of(environments: Sequence[Labels], seed: int) -> list[Labels]:
    """Return sides [N] of the inputs, 0 or 1: the groups of each environment put to two sides in several ways.

    A side has a quarter of the inputs at least.

    Args:
        environments: groups of the inputs, [N] each.
        seed: which ways, where there are many.
    """
    source = np.random.default_rng(seed % 2**32)
    found: list[Labels] = []
    for groups in environments:
        values, index = np.unique(groups, return_inverse=True)
        codes = source.permutation(2 ** (len(values) - 1))[: 16 * SIDES]  # a bit for each group, without the last one
        sides = ((code >> index) & 1 for code in codes)
        found += islice((side for side in sides if 0.25 <= side.mean() <= 0.75), SIDES)
    return found
