"""Token statistics of K latents, from hidden states straight through the language-model head."""

import os

import torch
from torch import Tensor

from cvae_lightning.functional.chunked_head import ChunkedHead, HeadSettings
from cvae_lightning.functional.divergences import jensen_shannon_divergence
from cvae_lightning.functional.liger_head import liger_head, liger_wanted
from cvae_lightning.functional.precision import at_least_float32, without_autocast, without_negligible_gradients

COMPILE_VARIABLE = "CVAE_LIGHTNING_COMPILE_HEAD"


def latent_token_stats(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    need_jsd: bool = True,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    budget_bytes: int | None = None,
    vocab_block: int | None = None,
    compile_tiles: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """NLL of every target token under every latent, and how far the K next-token distributions differ.

    nll_t(z_k) = -log p(y_t | x, z_k, y_<t) and JSD_t = mean_k KL(p_k,t || mean_k p_k,t), with logits
    softcap tanh((W h + b) scale / softcap). Where the logits of all positions would not fit into the budget, they are
    made in pieces and again in the backward pass, so memory does not grow with K, T or V. Differentiable once, with
    respect to `hidden`, `lm_head_weight` and `bias`. Under autocast the products are in its dtype; statistics are
    accumulated in at least fp32. Gradients of token_nll below 1e-12 of the largest are taken for 0.

    Args:
        hidden: final hidden states at the positions that predict the targets.
        lm_head_weight: weight of the language-model head.
        targets: token ids; -100 (any negative number) where there is nothing to predict: both results are 0 there.
        need_jsd: whether to compute the divergence.
        bias: bias of the language-model head.
        scale: factor of the logits.
        softcap: bound of the logits, > 0; None = unbounded.
        budget_bytes: memory for logits; None = 32 MiB, and 512 MiB on an accelerator.
        vocab_block: number of logits per position that are made at a time; None = 1024, and 8192 on an accelerator.
        compile_tiles: run the arithmetic on a block of logits through `torch.compile`, which on a CPU needs a C++
            compiler and takes some seconds at the first call of every kind (training, evaluation, K = 1, ...), of which
            torch allows `torch._dynamo.config.recompile_limit`; nothing changes where the logits fit into the budget.
            None = whether the environment has `CVAE_LIGHTNING_COMPILE_HEAD=1`: a matter of the machine, not the model.

    Shape:
        hidden: [B, K, T, D]; lm_head_weight: [V, D]; targets: [B, T]; bias: [V] -> token_nll [B, K, T] and
        inter_latent_jsd [B, T] (None without `need_jsd`), nats, at least fp32.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> hidden = torch.tensor([[[[0.0]], [[4.0]]]])  # one token, two latents, one hidden unit
        >>> latent_token_stats(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([[0]]))
        (tensor([[[6.9315e-01],
                 [3.3540e-04]]]), tensor([[0.2144]]))
    """
    batch, latents, length, width = hidden.shape
    if targets.shape != (batch, length):
        raise ValueError(f"targets must have shape {(batch, length)} to match hidden, got {tuple(targets.shape)}")
    if lm_head_weight.shape[1:] != (width,):
        raise ValueError(f"lm_head_weight must have shape [V, {width}], got {list(lm_head_weight.shape)}")
    on_cpu, scored = hidden.device.type == "cpu", targets >= 0
    b, t = _positions(scored, only_scored=on_cpu)  # N
    chosen = targets[b, t].clamp_min(0)

    settings = HeadSettings(
        need_jsd=need_jsd,
        scale=scale,
        softcap=softcap,
        budget_bytes=budget_bytes or (32 << 20 if on_cpu else 512 << 20),
        vocab_block=vocab_block or (1024 if on_cpu else 8192),
        compile_tiles=os.environ.get(COMPILE_VARIABLE) == "1" if compile_tiles is None else compile_tiles,
    )
    states = hidden.transpose(0, 1)  # [K, B, T, D]
    weight = lm_head_weight.to(_product_dtype(hidden, lm_head_weight))
    bias = None if bias is None else at_least_float32(bias)
    with without_autocast(hidden.device):
        if not need_jsd and liger_wanted(hidden.device):
            nll, jsd = liger_head(states[:, b, t], weight, bias, chosen, scale, softcap), None
        else:
            head = _plain_head if settings.fits(latents * len(chosen), weight) else ChunkedHead.apply
            nll, jsd = head(states, weight, bias, chosen, b, t, settings)

    keep = scored[b, t]
    token_nll = nll.new_zeros(latents, batch, length)
    token_nll[:, b, t] = nll.where(keep, 0)
    if jsd is not None:
        jsd = jsd.new_zeros(batch, length).index_put((b, t), jsd.where(keep, 0))
    return without_negligible_gradients(token_nll).transpose(0, 1), jsd


def _positions(scored: Tensor, only_scored: bool) -> tuple[Tensor, ...]:
    """Row and column of the scored positions, or of all: the host learns how many are scored only from the device."""
    if only_scored:
        return scored.nonzero(as_tuple=True)
    place = torch.arange(scored.numel(), device=scored.device)
    return place // scored.shape[1], place % scored.shape[1]


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if dtype != torch.float64 and casts:
        return torch.get_autocast_dtype(device)
    return dtype


def _plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    b: Tensor,
    t: Tensor,
    settings: HeadSettings,
) -> tuple[Tensor, Tensor | None]:
    """Make all logits at once, under ordinary autograd: quickest where they are few."""
    index = b * hidden.shape[2] + t
    rows = hidden.flatten(1, 2).index_select(1, index).to(weight.dtype)  # [K, N, D]
    logits = at_least_float32(rows @ weight.t())
    if bias is not None:
        logits = logits + bias
    if settings.scale != 1:
        logits = logits * settings.scale
    if settings.softcap is not None:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    log_probs = logits.log_softmax(-1)  # [K, N, V]
    nll = -log_probs.gather(-1, targets[None, :, None].expand(len(rows), -1, 1)).squeeze(-1)
    return nll, jensen_shannon_divergence(log_probs.transpose(0, 1)) if settings.need_jsd else None
