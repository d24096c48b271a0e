"""How a latent vector reaches a causal LM: as prefix vectors, or through its normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cvae_lightning.backbones.causal_lm import decoder_of

Injection = Literal["prefix", "norm", "both"]


class LatentPrefix(nn.Module):
    """Projects z to the input embeddings of the latent slot.

    The vectors start at the mean token embedding plus a random image of z of the embeddings' own spread.

    Args:
        lm: the causal LM that reads them.
        latent_dim: D.
        length: m, vectors in the slot, at least 1.
        hidden: width of one hidden layer (tanh) between z and the vectors; 0 = a linear map.
        scale: standard deviation of a vector under z ~ N(0, I), in units of the embeddings' own.

    Raises:
        ValueError: if ``length`` < 1 or ``hidden`` < 0.
    """

    def __init__(self, lm: Any, latent_dim: int, length: int = 1, hidden: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        if length < 1 or hidden < 0:
            raise ValueError(f"prefix_length must be at least 1 and prefix_hidden at least 0, got {length}, {hidden}")
        with torch.no_grad():  # by the module, which scales its rows in some families (Gemma)
            embeddings = lm.get_input_embeddings()
            rows = torch.arange(len(embeddings.weight), device=embeddings.weight.device)
            table = embeddings(rows).float()
        self.length, self.width = length, table.shape[1]
        self.inner = nn.Sequential(nn.Linear(latent_dim, hidden), nn.Tanh()) if hidden else nn.Identity()
        self.outer = nn.Linear(hidden or latent_dim, length * self.width)
        nn.init.normal_(self.outer.weight, std=scale * float(table.std()) / (hidden or latent_dim) ** 0.5)
        with torch.no_grad():
            self.outer.bias.copy_(table.mean(0).repeat(length))

    def forward(self, z: Tensor) -> Tensor:
        """Return vectors [..., m, E] for latents [..., D]."""
        return self.outer(self.inner(z.to(self.outer.weight.dtype))).unflatten(-1, (self.length, self.width))


class LatentNorms(nn.Module):
    """Adaptive normalisation: every norm of the model's width is followed by (1 + scale(z)) * . + shift(z).

    Works on any Hugging Face family through forward hooks. The maps start at zero, so the model starts as it was, and
    stays as it was outside :meth:`given`. Only what stands from the latent slot on is conditioned: the router's prompt
    never sees z. Gradient checkpointing reads the layers again when no latent is given any more, so it is refused.
    Source: Perez et al. 2018 (FiLM), arXiv 1709.07871; Peebles & Xie 2023 (zero start), arXiv 2212.09748.

    Args:
        lm: the causal LM to condition; its norm layers get hooks.
        latent_dim: D.

    Raises:
        ValueError: if the model has no normalisation layer of its hidden width.
    """

    def __init__(self, lm: Any, latent_dim: int) -> None:
        super().__init__()
        decoder: Any = decoder_of(lm)
        width = decoder.get_input_embeddings().weight.shape[1]
        norms = [part for part in decoder.modules() if is_norm(part, width)]
        if not norms:
            raise ValueError(f"{type(decoder).__name__} has no normalisation layer of width {width}: use prefix")
        maps = [nn.Linear(latent_dim, 2 * width) for _ in norms]
        self.maps = nn.ModuleList(maps)
        for linear in maps:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        self._z: Tensor | None = None
        self._start, self._past = 0, 0
        decoder.register_forward_pre_hook(self._locate, with_kwargs=True)
        for index, norm in enumerate(norms):
            norm.register_forward_hook(_Hook(self, index))

    @contextmanager
    def given(self, z: Tensor | None, start: int = 0) -> Iterator[None]:
        """Within this context rows of the model's batch are conditioned on ``z`` from slot ``start`` on.

        It may stand in another such context, as it does when a backward pass makes activations again.

        Args:
            z: [N, D], one latent per row of the batch behind the prefix; None = set later by :meth:`condition`.
            start: index of the first conditioned slot, padding and cached slots counted.
        """
        before = self._z, self._start, self._past
        try:
            self.condition(z, start)
            yield
        finally:
            self._z, self._start, self._past = before

    def condition(self, z: Tensor | None, start: int) -> None:
        """Change the latents inside :meth:`given`."""
        self._z, self._start = z, start

    def _locate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self._past = 0 if cache is None else int(cache.get_seq_length())
        if self._z is None or not (module.training and torch.is_grad_enabled()):
            return
        if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise ValueError(
                "z-conditioned norms do not work under gradient checkpointing: switch it off (num_latent_chunk bounds "
                "the memory of a discrete latent), or condition by prefix alone"
            )

    def apply_to(self, index: int, hidden: Tensor) -> Tensor:
        """Return the conditioned output [N, L, E] of norm number ``index``."""
        first = max(0, self._start - self._past)  # of the conditioned slots, within this call
        if self._z is None or first >= hidden.shape[1]:
            return hidden
        if len(self._z) != len(hidden):
            raise ValueError(f"z-conditioned norms got {len(self._z)} latents for {len(hidden)} rows of the batch")
        linear = cast(nn.Linear, self.maps[index])
        scale, shift = linear(self._z.to(linear.weight.dtype)).to(hidden.dtype)[:, None].chunk(2, -1)  # [N, 1, E] each
        behind = hidden[:, first:] * (1 + scale) + shift
        return torch.cat([hidden[:, :first], behind], 1) if first else behind


def check_norm_branches(method: str) -> None:
    """Raise if a way of running branches does not suit conditioned norms.

    Raises:
        ValueError: for ``grouped`` and ``packed``.
    """
    if method in ("grouped", "packed"):
        raise ValueError(
            f"branch_method={method} puts all branches into one row, which conditioned norms cannot tell apart: use "
            "auto, cache or repeat"
        )


class _Hook:
    """Forward hook of one norm; an object, so that a module with hooks can be copied and sent to other processes."""

    def __init__(self, norms: LatentNorms, index: int) -> None:
        self.norms, self.index = norms, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.norms.apply_to(self.index, output)


def is_norm(part: nn.Module, width: int) -> bool:
    """Return whether a layer normalises hidden states of this width: LayerNorm, or any family's RMSNorm."""
    weight = getattr(part, "weight", None)
    return "norm" in type(part).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,)
