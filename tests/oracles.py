"""Slow references, written from the formulas with Python loops and `math`; none shares code with the package."""

import itertools
import math


def kl(q, p):
    """sum_k q_k log(q_k / p_k) of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def entropy(p):
    return -sum(a * math.log(a) for a in p if a > 0)


def mixture(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def jsd(rows):
    """H(mean_k p_k) - mean_k H(p_k): the entropy form, where the package uses the KL form."""
    return entropy(mixture(rows)) - sum(map(entropy, rows)) / len(rows)


def softmax(logits):
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def gaussian_kl(mean_q, var_q, mean_p, var_p):
    return sum(
        0.5 * (vq / vp + (mq - mp) ** 2 / vp - 1 + math.log(vp / vq))
        for mq, vq, mp, vp in zip(mean_q, var_q, mean_p, var_p, strict=True)
    )


def token_mean(values, mask, weights=None, threshold=1e-4):
    """Weighted mean over active tokens; uniform if the weights sum to the threshold or less; 0 without tokens."""
    active = [t for t, counts in enumerate(mask) if counts]
    if not active:
        return 0.0
    used = {t: 1.0 if weights is None else weights[t] for t in active}
    if sum(used.values()) <= threshold:
        used = dict.fromkeys(active, 1.0)
    return sum(used[t] * values[t] for t in active) / sum(used.values())


def evidence(router, sequence_nll):
    """log sum_k p_k exp(-nll_k) of plain numbers."""
    return math.log(sum(p * math.exp(-nll) for p, nll in zip(router, sequence_nll, strict=True)))


def elbo(q, router, sequence_nll):
    return -sum(a * nll for a, nll in zip(q, sequence_nll, strict=True)) - kl(q, router)


def head(hidden, weight, targets, bias=None, scale=1.0, softcap=None):
    """Nested lists hidden [B][K][T][D], weight [V][D], targets [B][T] -> token_nll [B][K][T], jsd [B][T]."""
    token_nll, divergence = [], []
    for states, ids in zip(hidden, targets, strict=True):
        token_nll.append([[0.0] * len(ids) for _ in states])
        divergence.append([0.0] * len(ids))
        for t, target in enumerate(ids):
            if target < 0:
                continue
            distributions = []
            for k, latent_states in enumerate(states):
                logits = []
                for v, row in enumerate(weight):
                    logit = sum(a * b for a, b in zip(latent_states[t], row, strict=True))
                    logit = (logit + (bias[v] if bias else 0.0)) * scale
                    logits.append(softcap * math.tanh(logit / softcap) if softcap else logit)
                distributions.append(softmax(logits))
                token_nll[-1][k][t] = -math.log(distributions[-1][target])
            divergence[-1][t] = jsd(distributions)
    return token_nll, divergence


def best_one_to_one(matrix):
    """Largest sum of entries, no two in one row or column, over all injective assignments."""
    rows, columns = len(matrix), len(matrix[0])
    if rows > columns:
        matrix, rows, columns = [list(column) for column in zip(*matrix, strict=True)], columns, rows
    return max(
        sum(matrix[row][column] for row, column in enumerate(order))
        for order in itertools.permutations(range(columns), rows)
    )
