"""Means over the supervised tokens of a sequence."""

import torch
from torch import Tensor

from cvae_lightning.functional.precision import at_least_float32


def masked_token_mean(
    values: Tensor, mask: Tensor, weights: Tensor | None = None, min_total_weight: float = 1e-4
) -> Tensor:
    """Mean over the tokens that count, uniform or weighted.

    sum_t w_t v_t / sum_t w_t over the tokens with mask True. Uniform where `weights` is None, and in every example
    whose total weight is at most `min_total_weight`. A sequence with no active token gives 0. Masked values, even NaN
    or infinite ones, have no influence on value or gradient.

    Args:
        values: one number per token.
        mask: bool, True counts.
        weights: non-negative weight per token, or None for the uniform mean.
        min_total_weight: an example whose weights sum to this or less gets the uniform mean.

    Shape:
        values: [B, T] or [B, K, T]; mask, weights: [B, T], shared by the K latents -> [B] or [B, K], at least fp32.

    Example:
        >>> values, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> masked_token_mean(values, mask), masked_token_mean(values, mask, torch.tensor([[3.0, 1.0, 5.0]]))
        (tensor([2.]), tensor([1.5000]))
    """
    if mask.shape != (values.shape[0], values.shape[-1]):
        expected = (values.shape[0], values.shape[-1])
        raise ValueError(
            f"mask must have shape {expected} to match values {tuple(values.shape)}, got {tuple(mask.shape)}"
        )
    values = at_least_float32(values)
    uniform = mask.to(values.dtype)
    if weights is None:
        weights = uniform
    else:
        weights = torch.where(mask, weights.to(values.dtype), 0.0)
        weights = torch.where(weights.sum(-1, keepdim=True) > min_total_weight, weights, uniform)
    total = weights.sum(-1)
    total = torch.where(total > 0, total, 1.0)
    if values.dim() == 3:  # [B, T] -> [B, 1, T]
        mask, weights, total = mask[:, None], weights[:, None], total[:, None]
    return (torch.where(mask, values, 0.0) * weights).sum(-1) / total
