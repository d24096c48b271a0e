"""Inputs of the language-model head, its statistics by the logits of all positions, and an objective of them."""

import torch

TINY = {"budget_bytes": 300, "vocab_block": 4}  # a few positions and blocks of 4 logits at a time


def inputs(batch=2, latents=3, length=4, width=5, vocab=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, latents, length, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (batch, length), generator=generator)
    targets[0, 1] = targets[-1, -1] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def naive(hidden, weight, bias, targets, scale=1.0, softcap=None):
    """All logits in the dtype of the inputs, then fp32, under ordinary autograd."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = targets.clamp_min(0)[:, None, :, None].expand(-1, hidden.shape[1], -1, 1)
    valid = targets >= 0
    nll = -log_probs.gather(-1, chosen).squeeze(-1) * valid[:, None]
    probs = log_probs.exp()
    mixture = probs.mean(1)
    entropy_of_mean, mean_entropy = -(mixture * mixture.log()).sum(-1), -(probs * log_probs).sum(-1).mean(1)
    return nll, (entropy_of_mean - mean_entropy) * valid


def objective(nll, jsd):
    """Not linear in the statistics, with another slope for every one of them."""
    slopes = torch.linspace(0.5, 2.0, nll.numel(), dtype=nll.dtype, device=nll.device).view_as(nll)
    return -torch.logsumexp(-(nll * slopes).sum(-1), dim=1).sum() + (jsd.sin() * slopes[:, 0]).sum()
