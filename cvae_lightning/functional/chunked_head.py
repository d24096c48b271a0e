"""The language-model head in pieces: exact statistics and gradients without the [positions, vocabulary] logits.

With p_k the next-token distribution of latent k at one position, m = mean_k p_k and KL_k = sum_v p_kv log(p_kv / m_v):

    nll_k = logsumexp_v z_kv - z_ky                      JSD = mean_k KL_k
    dL/dz_kv = p_kv [g_k + (g_jsd / K) (log(p_kv / m_v) - KL_k)] - g_k 1[v = y],      g_k = dL/dnll_k

The gradient at one vocabulary entry needs the logsumexp and KL_k of its position and nothing of the other entries, so
the backward pass makes the logits again in blocks of the vocabulary. Rows are ordered [K, positions], so the mixture is
a mean over the first dimension.
Source: recomputation and chunking as in Wijmans et al. 2025 (arXiv 2411.09009); the K-way divergence is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class HeadSettings(NamedTuple):
    """Everything about the head that is not a tensor; meanings as in `latent_token_stats`."""

    need_jsd: bool
    scale: float
    softcap: float | None
    budget_bytes: int
    vocab_block: int

    def fits(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether ordinary autograd, which holds about four arrays of the size of all logits, stays in the budget."""
        num_logits = rows.shape[0] * rows.shape[1] * weight.shape[0]
        return 4 * num_logits * _statistics_dtype(rows).itemsize <= self.budget_bytes

    def positions(self, rows: Tensor, num_logits: int, share: int = 1) -> int:
        """Number of positions whose logits for all latents fit into 1 / share of the budget, at least 1."""
        per_position = rows.shape[0] * num_logits * _statistics_dtype(rows).itemsize
        return min(rows.shape[1], max(1, self.budget_bytes // share // per_position))


class ChunkedHead(torch.autograd.Function):
    """rows [K, N, D], weight [V, D], bias [V] | None, targets [N] -> nll [K, N], jsd [N] | None."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: HeadSettings
    ) -> tuple[Tensor, Tensor | None]:
        """Keep the logits of a few positions at a time; save one logsumexp and one KL per row."""
        latents, total, _ = rows.shape
        blocks = list(_slices(weight.shape[0], settings.vocab_block))
        size = settings.positions(rows, weight.shape[0])
        lse, target_logits = rows.new_empty(2, latents, total, dtype=_statistics_dtype(rows))
        divergence = torch.zeros_like(lse)  # KL_k
        buffer = lse.new_empty(len(blocks), latents * size, min(settings.vocab_block, weight.shape[0]))
        for part in _slices(total, size):
            states, chosen = rows[:, part], targets[part]
            logits = [_logits(states, weight, bias, block, settings, buffer[i]) for i, block in enumerate(blocks)]
            lse[:, part] = torch.stack([tile.logsumexp(-1) for tile in logits]).logsumexp(0)
            target_logits[:, part] = sum(
                tile.gather(-1, index).squeeze(-1) * inside
                for tile, (index, inside) in zip(logits, (_within(chosen, b, latents) for b in blocks), strict=True)
            )
            if settings.need_jsd:
                for tile in logits:
                    log_probs = tile.sub_(lse[:, part, None])
                    probs = log_probs.exp()
                    divergence[:, part] += probs.mul_(log_probs.sub_(_log_mixture(probs))).sum(-1)
        ctx.save_for_backward(rows, weight, bias, targets, lse, divergence)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return lse - target_logits, divergence.mean(0) if settings.need_jsd else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor | None, grad_jsd: Tensor | None) -> tuple[Tensor | None, ...]:
        """Make the logits again, one block of the vocabulary after the other."""
        rows, weight, bias, targets, lse, divergence = ctx.saved_tensors
        settings: HeadSettings = ctx.settings
        latents = rows.shape[0]
        grad_nll = torch.zeros_like(lse) if grad_nll is None else grad_nll
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.zeros_like(rows, dtype=lse.dtype) if need_rows else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        size = settings.positions(rows, settings.vocab_block, share=16)
        buffer = lse.new_empty(latents * size, min(settings.vocab_block, weight.shape[0]))
        for block in _slices(weight.shape[0], settings.vocab_block):
            block_grad = torch.zeros_like(weight[block], dtype=lse.dtype) if need_weight else None
            for part in _slices(rows.shape[1], size):
                states, g_nll = rows[:, part], grad_nll[:, part, None]
                logits = _logits(states, weight, bias, block, settings, buffer)
                slope = None if settings.softcap is None else 1 - (logits / settings.softcap).square_()
                log_probs = logits.sub_(lse[:, part, None])
                grad = log_probs.exp()
                if grad_jsd is not None:
                    g_jsd = grad_jsd[part, None] / latents
                    log_ratio = log_probs.sub_(_log_mixture(grad))
                    grad *= log_ratio.mul_(g_jsd).add_(g_nll - g_jsd * divergence[:, part, None])
                else:
                    grad *= g_nll
                index, inside = _within(targets[part], block, latents)
                grad.scatter_add_(-1, index, -g_nll * inside[..., None])
                grad = (grad if slope is None else grad.mul_(slope)).flatten(0, 1)  # [K * C, v]
                if settings.scale != 1:
                    grad *= settings.scale
                if grad_bias is not None:
                    grad_bias[block] += grad.sum(0)
                grad = grad.to(rows.dtype)
                if grad_rows is not None:
                    grad_rows[:, part] += (grad @ weight[block]).view_as(states)
                if block_grad is not None:
                    block_grad += grad.t() @ states.flatten(0, 1)
            if grad_weight is not None and block_grad is not None:
                grad_weight[block] = block_grad
        return None if grad_rows is None else grad_rows.to(rows.dtype), grad_weight, grad_bias, None, None


def _statistics_dtype(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, block: slice, settings: HeadSettings, buffer: Tensor
) -> Tensor:
    """[K, C, v] logits of the states [K, C, D] for one block of the vocabulary, written into the buffer."""
    flat = states.flatten(0, 1)
    out = buffer[: flat.shape[0], : block.stop - block.start]
    if flat.dtype == out.dtype:
        torch.mm(flat, weight[block].t(), out=out)
    else:
        out.copy_(flat @ weight[block].t())
    if bias is not None:
        out += bias[block]
    if settings.scale != 1:
        out *= settings.scale
    if settings.softcap is not None:
        out.div_(settings.softcap).tanh_().mul_(settings.softcap)
    return out.view(*states.shape[:2], -1)


def _log_mixture(probs: Tensor) -> Tensor:
    return probs.mean(0).clamp_min_(torch.finfo(probs.dtype).tiny).log_()


def _within(targets: Tensor, block: slice, latents: int) -> tuple[Tensor, Tensor]:
    """Index [K, C, 1] of each target within a block of the vocabulary, and whether it lies there, [C]."""
    index = (targets - block.start).clamp(0, block.stop - block.start - 1)
    return index[None, :, None].expand(latents, -1, -1), (targets >= block.start) & (targets < block.stop)
