"""The language-model head in pieces: exact statistics and gradients without the [positions, vocabulary] logits.

With p_k the next-token distribution of latent k at one position, m = mean_k p_k and KL_k = sum_v p_kv log(p_kv / m_v):

    nll_k = logsumexp_v z_kv - z_ky                      JSD = mean_k KL_k
    dL/dz_kv = p_kv [g_k + (g_jsd / K) (log(p_kv / m_v) - KL_k)] - g_k 1[v = y],      g_k = dL/dnll_k

The gradient at one vocabulary entry needs the logsumexp and KL_k of its position and nothing of the other entries, so
the backward pass makes the logits again in blocks of the vocabulary; without the divergence, of the rows with a
gradient alone. Rows are ordered [K, positions], so the mixture is a mean over the first dimension. Hidden states are
gathered a few positions at a time: no copy of them is made, but their gradient is collected in the precision of the
statistics first.
Source: recomputation and chunking as in Wijmans et al. 2025 (arXiv 2411.09009); the K-way divergence is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_LOG_RATIO = -1e4
"""Of no account below: exp of it is 0 in every dtype, and products with gradients stay finite."""


class HeadSettings(NamedTuple):
    """Everything about the head that is not a tensor; meanings as in `latent_token_stats`."""

    need_jsd: bool
    scale: float
    softcap: float | None
    budget_bytes: int
    vocab_block: int
    compile_tiles: bool

    def fits(self, num_rows: int, weight: Tensor) -> bool:
        """Whether ordinary autograd, which holds about four arrays of the size of all logits, stays in the budget."""
        return 4 * num_rows * weight.shape[0] * _statistics_dtype(weight).itemsize <= self.budget_bytes

    def positions(self, latents: int, num_logits: int, weight: Tensor, share: int = 1) -> int:
        """Number of positions whose logits for all latents fit into 1 / share of the budget, at least 1."""
        return max(1, self.budget_bytes // share // (latents * num_logits * _statistics_dtype(weight).itemsize))

    def arithmetic(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the arithmetic of a tile of logits as it is written, or compiled into one loop."""
        return compiled(function) if self.compile_tiles else function


class ChunkedHead(torch.autograd.Function):
    """hidden [K, B, T, D], weight [V, D], bias [V] | None, N > 0 targets at (b, t) -> nll [K, N], jsd [N] | None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        b: Tensor,
        t: Tensor,
        settings: HeadSettings,
    ) -> tuple[Tensor, Tensor | None]:
        """Keep the logits of a few positions at a time; save one logsumexp and one KL per row."""
        latents, total = hidden.shape[0], len(targets)
        blocks = list(_slices(weight.shape[0], settings.vocab_block))
        if settings.need_jsd:  # which needs all logits of a position at once
            kept, size = len(blocks), settings.positions(latents, weight.shape[0], weight)
        else:
            kept, size = 1, settings.positions(latents, settings.vocab_block, weight, share=16)
        size = min(total, size)
        lse, target_logits = hidden.new_zeros(2, latents, total, dtype=_statistics_dtype(weight))
        divergence = torch.zeros_like(lse)  # KL_k
        buffer = lse.new_empty(kept, latents * size, min(settings.vocab_block, weight.shape[0]))
        log_sum, divergence_of = settings.arithmetic(_log_sum), settings.arithmetic(_divergence)
        for part in _slices(total, size):
            states, chosen = hidden[:, b[part], t[part]].to(weight.dtype), targets[part]
            tiles, sums = [], []
            for i, block in enumerate(blocks):
                tile = _logits(states, weight, bias, block, settings, buffer[i % kept])
                index, inside = _within(chosen, block, latents)
                target_logits[:, part] += tile.gather(-1, index).squeeze(-1).where(inside, 0)
                sums.append(log_sum(tile))
                tiles.append(tile)
            lse[:, part] = torch.stack(sums).logsumexp(0)
            for tile in tiles if settings.need_jsd else ():
                divergence[:, part] += divergence_of(tile, lse[:, part, None])
        ctx.save_for_backward(hidden, weight, bias, targets, b, t, lse, divergence)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return lse - target_logits, divergence.mean(0) if settings.need_jsd else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor | None, grad_jsd: Tensor | None) -> tuple[Tensor | None, ...]:
        """Make the logits again, one block of the vocabulary after the other."""
        hidden, weight, bias, targets, b, t, lse, divergence = ctx.saved_tensors
        settings: HeadSettings = ctx.settings
        grad_nll = torch.zeros_like(lse) if grad_nll is None else grad_nll
        k = torch.arange(hidden.shape[0], device=hidden.device)[:, None].expand(lse.shape)
        if grad_jsd is None and hidden.device.type == "cpu":
            # no row needs another, and a sharp posterior leaves most without a gradient: the others in one row, [1, N]
            latent, n = grad_nll.nonzero(as_tuple=True)
            k, b, t, targets = latent[None], b[n], t[n], targets[n]
            lse, divergence, grad_nll = lse[k, n], divergence[k, n], grad_nll[k, n]
        latents, total = lse.shape
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_weight = (torch.empty_like if total else torch.zeros_like)(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        size = max(1, min(total, settings.positions(latents, settings.vocab_block, weight, share=16)))
        buffer = lse.new_empty(latents * size, min(settings.vocab_block, weight.shape[0]))
        parts = list(_slices(total, size))
        places = [(k[:, part], b[part], t[part]) for part in parts]  # [K, C, D] states each
        gradient_of = settings.arithmetic(_gradient)
        grad_states = [lse.new_empty(latents * len(targets[part]), hidden.shape[-1]) for part in parts if need_hidden]
        for block in _slices(weight.shape[0], settings.vocab_block):
            block_grad = None
            if grad_weight is not None:  # in place, if it is of the statistics' dtype
                block_grad = grad_weight[block].to(lse.dtype)
            for i, part in enumerate(parts):
                states, g_nll = hidden[places[i]].to(weight.dtype), grad_nll[:, part, None]
                logits = _logits(states, weight, bias, block, settings, buffer)
                slope = None if settings.softcap is None else 1 - (logits / settings.softcap).square_()
                g_jsd = None if grad_jsd is None else grad_jsd[part, None] / latents
                grad = gradient_of(logits, lse[:, part, None], divergence[:, part, None], g_nll, g_jsd)
                index, inside = _within(targets[part], block, latents)
                grad.scatter_add_(-1, index, -g_nll * inside[..., None])
                grad = (grad if slope is None else grad.mul_(slope)).flatten(0, 1)  # [K * C, v]
                if settings.scale != 1:
                    grad *= settings.scale
                if grad_bias is not None:
                    grad_bias[block] += grad.sum(0)
                grad = grad.to(weight.dtype)
                if need_hidden:
                    _add_product(grad_states[i], grad, weight[block], first=block.start == 0)
                if block_grad is not None:
                    _add_product(block_grad, grad.t(), states.flatten(0, 1), first=i == 0)
            if grad_weight is not None and block_grad is not None and grad_weight.dtype != lse.dtype:
                grad_weight[block] = block_grad
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        if grad_hidden is not None:
            for place in places:
                states_grad = grad_states.pop(0).unflatten(0, (latents, -1))
                grad_hidden[place] = states_grad.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the compiled form, for tiles of any size; another kind of call (K = 1, inference mode) compiles anew."""
    return torch.compile(function, dynamic=True)


def _statistics_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, block: slice, settings: HeadSettings, buffer: Tensor
) -> Tensor:
    """[K, C, v] logits of the states [K, C, D] for one block of the vocabulary, written into the buffer."""
    flat = states.flatten(0, 1)
    shape = flat.shape[0], block.stop - block.start
    out = buffer.view(-1)[: shape[0] * shape[1]].view(shape)  # contiguous: one compiled loop for every block
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


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left @ right to the total, or put it there if it is the first; in place where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _log_sum(logits: Tensor) -> Tensor:
    """Logsumexp by log_softmax, whose kernel is the faster one; at the largest logit nothing cancels."""
    top = logits.amax(-1)
    return torch.where(top.isneginf(), top, top - logits.log_softmax(-1).amax(-1))


def _divergence(logits: Tensor, lse: Tensor) -> Tensor:
    """Share of a tile [K, C, v] in KL_k, [K, C]. The tile itself stays: compiled, a change would be one more pass."""
    log_probs = logits - lse
    probs = log_probs.exp()
    return probs.mul_(_log_ratio(log_probs, probs)).sum(-1)


def _gradient(logits: Tensor, lse: Tensor, divergence: Tensor, g_nll: Tensor, g_jsd: Tensor | None) -> Tensor:
    """dL/dz of a tile but for the term of the target, [K, C, v]; ``g_jsd`` is divided by K already."""
    log_probs = logits - lse
    grad = log_probs.exp()
    if g_jsd is None:
        return grad.mul_(g_nll)
    return grad.mul_(_log_ratio(log_probs, grad).mul_(g_jsd).add_(g_nll - g_jsd * divergence))


def _log_ratio(log_probs: Tensor, probs: Tensor) -> Tensor:
    """Log(p_k / m), written into ``log_probs``; finite where p_k = 0, as a logit of -inf makes it: 0 * finite = 0."""
    log_mixture = probs.mean(0).clamp_min_(torch.finfo(probs.dtype).tiny).log_()
    return log_probs.sub_(log_mixture).clamp_min_(LEAST_LOG_RATIO)


def _within(targets: Tensor, block: slice, latents: int) -> tuple[Tensor, Tensor]:
    """Index [K, C, 1] of each target within a block of the vocabulary, and whether it lies there, [C]."""
    index = (targets - block.start).clamp(0, block.stop - block.start - 1)
    return index[None, :, None].expand(latents, -1, -1), (targets >= block.start) & (targets < block.stop)
