"""Features of solutions with planted ways of solving, for tests of the clustering."""

import torch

from cvae_lightning import LatentSeeding

K = 3


def centred(features, solutions=9):
    """Features less their mean over the solutions of an input."""
    return LatentSeeding(num_solutions=solutions).centre(features)


def planted(inputs=24, solutions=9):
    """Features of three clusters under offsets of each input that are ten times as large, and the clusters."""
    torch.manual_seed(1)
    truth = torch.randint(K, (inputs, solutions))
    truth[:, :K] = torch.arange(K)  # every input knows all of them, in shares of its own
    means = 3 * torch.linalg.qr(torch.randn(8, K))[0].T
    features = means[truth] + 0.2 * torch.randn(inputs, solutions, 8) + 30 * torch.randn(inputs, 1, 8)
    return features.flatten(0, 1)[:, None], truth.flatten()


def swapping():
    """Points of three clusters and what is written, which depends on the input too; labels, and labels that swap."""
    features, truth = planted(inputs=64)
    kind = (torch.arange(64) % 4 == 3).long()  # of the input
    swapped = torch.where((kind.repeat_interleave(9) == 1) & (truth < 2), 1 - truth, truth)
    written = torch.nn.functional.one_hot(swapped, K).float() + 0.1 * torch.randn(len(truth), K)
    points = torch.cat([centred(features), 3 * (written - written.mean(0))], -1)
    axes = torch.linalg.svd(points, full_matrices=False)[2].T
    return (points @ axes).double().numpy(), kind.numpy(), truth.numpy(), swapped.numpy()


def swapped_on_one_side():
    """Points, groups of the inputs, two ways of solving, and labels that swap them in the second and fourth group.

    What shows the labels has a place of its own in either part of the groups: it can be learned from any group of that
    part, and not from the other part. The ways show in one place everywhere.
    """
    torch.manual_seed(3)
    groups = torch.arange(100) % 5
    among = (groups % 2 == 1).repeat_interleave(8)
    truth = torch.arange(8).repeat(100) % 2
    swapped = torch.where(among, 1 - truth, truth)
    sign = 2.0 * torch.stack([truth, swapped, swapped], -1) - 1
    sign[:, 1] *= ~among
    sign[:, 2] *= among
    points = sign + 0.3 * torch.randn(800, 3)
    return points.double().numpy(), groups.numpy(), truth.numpy(), swapped.numpy()


def unlike_kinds():
    """Features whose ways look different from one kind of input to the next, the kinds, and the ways."""
    features, truth = planted(inputs=64)
    kind = torch.arange(64) % 4
    torch.manual_seed(2)
    looks = 0.7 * torch.randn(4, K, 8)
    return features + looks[kind.repeat_interleave(9), truth][:, None], kind.numpy(), truth
