"""A backward pass through those branches alone that have a gradient, whose activations it makes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from cvae_lightning.backbones.branch_inputs import BranchInputs
from cvae_lightning.backbones.causal_lm import decoder_of, has_dropout
from cvae_lightning.backbones.kv_cache import copied
from cvae_lightning.functional.graph import leaves
from cvae_lightning.functional.precision import same_autocast

ActivationsMode = Literal["auto", "kept", "again"]

WORTHWHILE = 0.6
"""Share of the branches with a gradient up to which making activations again takes less time than keeping them.

A pass forward counts 1 and one backward 2: 3 with all of them kept, 1 + 3 x share with those made again.
"""
TOGETHER = 2
"""Latents read at a time, where the user does not say: as much as a sharp posterior has a gradient for."""

Continue = Callable[[Any, BranchInputs, Any], Tensor]
"""Reads branches behind the cache of their prefix: (lm, inputs, cache) -> hidden states [B, K, S, D]."""


class BranchActivations:
    """Whether the activations of the branches are kept for the backward pass, or made again in it.

    A sharp posterior weighs one or two of K latents; what the others hold, nobody needs. So nothing is kept, and those
    branches that have a gradient are read again in the backward pass. Gradients are the same, as one of 0 adds nothing.

    Args:
        mode: ``kept``, ``again``, or ``auto``: on a CPU whichever of the two takes less time, by the share of branches
            that had a gradient in the last step; on an accelerator, which would have to wait to be asked, ``kept``.

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, mode: ActivationsMode = "auto") -> None:
        if mode not in get_args(ActivationsMode):
            raise ValueError(f"branch_activations must be one of {', '.join(get_args(ActivationsMode))}, got {mode!r}")
        self.mode = mode
        self.share = 1.0
        """Share of the branches that had a gradient in the last backward pass."""
        self._probed = False
        self._obstacle: str | None = None

    def again(self, lm: Any, inputs: BranchInputs, method: str) -> bool:
        """Return whether to make activations again in the pass that comes, as far as is known without reading.

        Raises:
            ValueError: for ``again`` where it does not work.
        """
        if self.mode == "kept" or not torch.is_grad_enabled():
            return False
        if self.mode == "auto" and (inputs.suffix_mask.device.type != "cpu" or self.share > WORTHWHILE):
            return False
        return not self._refused(self._obstacle or obstacle(lm, method))

    def suits(self, call: BranchCall, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether branches are read alike a second time, and with no weights but those that are known.

        One branch is read twice, at the first call.

        Raises:
            ValueError: for ``again`` where they are not.
        """
        if not self._probed:
            self._obstacle, self._probed = _probe(call, tensors), True
        return not self._refused(self._obstacle)

    def watch(self, hidden: Tensor) -> None:
        """Learn from the gradient of hidden states [B, K, S, D], which are kept, how many branches have one."""
        if self.mode == "auto" and hidden.requires_grad and hidden.device.type == "cpu":
            hidden.register_hook(self._count)

    def _count(self, gradient: Tensor | None) -> None:
        self.share = 0.0 if gradient is None else float(with_gradient(gradient).float().mean())

    def _refused(self, reason: str | None) -> bool:
        if reason and self.mode == "again":
            raise ValueError(f"branch_activations=again does not work with {reason}: use auto or kept")
        return reason is not None


def obstacle(lm: Any, method: str) -> str | None:
    """Return what keeps the activations of single branches from being made again, as a phrase; None if nothing does."""
    from torch.distributed.tensor import DTensor

    if method != "cache":
        return f"branch_method={method}, whose branches are not read on their own"
    if has_dropout(lm):
        return "dropout, which would leave out others the second time"
    if any(isinstance(weight, DTensor) for weight in decoder_of(lm).parameters()):
        return "weights that are divided over processes"
    return None


def with_gradient(gradient: Tensor) -> Tensor:
    """Return which of the branches of a gradient [B, K, S, D] have one, [B, K] bool."""
    return (gradient != 0).flatten(2).any(-1)


@dataclass(frozen=True)
class BranchCall:
    """A reading of branches, without the tensors that have a gradient: those are given to it.

    ``tensors`` are the suffixes as vectors, what conditions the norms (or None), those of the cache, and the weights.

    Args:
        function: reads branches, the same ones whichever others are read with them.
        reader: holds what has weights.
        inputs: without suffix and z.
        cache: of the prefix, without the tensors that have a gradient.
        held: layers and names of these tensors.
        weights: names of the weights that are trained.
        size: latents read at a time; backward as many branches.
        autocast: makes contexts that cast as is done in the step.
    """

    function: Continue
    reader: Reader
    inputs: BranchInputs
    cache: Any
    held: Sequence[tuple[int, str]]
    weights: Sequence[str]
    size: int
    autocast: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(
        cls, function: Continue, lm: Any, inputs: BranchInputs, cache: Any, size: int | None
    ) -> tuple[BranchCall, list[Tensor | None]]:
        """Return the reading and its tensors."""
        reader = Reader(lm, inputs.norms)
        weights = {name: weight for name, weight in reader.named_parameters() if weight.requires_grad}
        held = [
            (layer, name)
            for layer, part in enumerate(cache.layers)
            for name, value in vars(part).items()
            if isinstance(value, Tensor) and value.requires_grad
        ]
        states = [getattr(cache.layers[layer], name) for layer, name in held]
        empty = _filled(cache, held, [None] * len(held))
        autocast = same_autocast(inputs.suffix_mask.device)
        bare = replace(inputs, suffix=inputs.suffix.new_empty(0), z=None)
        call = cls(function, reader, bare, empty, held, list(weights), size or TOGETHER, autocast)
        return call, [inputs.suffix, inputs.z, *states, *weights.values()]

    @property
    def num_given(self) -> int:
        """Number of tensors that are no weights."""
        return 2 + len(self.held)

    def all(self, tensors: Sequence[Any]) -> Tensor:
        """Read all branches, [B, K, S, D], some latents at a time."""
        inputs, cache = self._with(tensors)
        with self.autocast():
            starts = range(0, inputs.num_latents, self.size)
            return torch.cat(
                [self.reader(self.function, inputs.latents(slice(i, i + self.size)), cache) for i in starts], 1
            )

    def some(self, tensors: Sequence[Any], b: Tensor, k: Tensor) -> tuple[Tensor, list[Any]]:
        """Read branches (b, k), [N, S, D], with the weights that are given.

        Returns:
            The hidden states, and the tensors that were read: suffixes and z of these branches alone, as leaves.
        """
        inputs, cache = self._with(tensors)
        inputs = inputs.branches(b, k)
        inputs.suffix.requires_grad_()
        if inputs.z is not None:
            inputs.z.requires_grad_()
        cache.batch_select_indices(b)
        weights = dict(zip(self.weights, tensors[self.num_given :], strict=True))
        with self.autocast():
            hidden = functional_call(self.reader, weights, (self.function, inputs, cache))[:, 0]
        return hidden, [inputs.suffix, inputs.z, *tensors[2:]]

    def _with(self, tensors: Sequence[Any]) -> tuple[BranchInputs, Any]:
        suffix, z, *states = tensors[: self.num_given]
        return replace(self.inputs, suffix=suffix, z=z), _filled(self.cache, self.held, states)


class Reader(nn.Module):
    """What reads branches, as a module of its own weights."""

    def __init__(self, lm: Any, norms: nn.Module | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList([decoder_of(lm), *([] if norms is None else [norms])])
        self._lm = [lm]  # not a part: its head is not read

    def forward(self, function: Continue, inputs: BranchInputs, cache: Any) -> Tensor:
        """Read branches behind their prefix."""
        return function(self._lm[0], inputs, cache)


def read_again(call: BranchCall, tensors: Sequence[Tensor | None], activations: BranchActivations) -> Tensor:
    """Return the hidden states [B, K, S, D] of the branches, and keep no activations of theirs.

    Args:
        call, tensors: what to read.
        activations: learns how many branches have a gradient.
    """
    return _Again.apply(call, activations, *tensors)


class _Again(torch.autograd.Function):
    """(call, activations, its tensors) -> hidden states of all branches."""

    @staticmethod
    def forward(ctx: Any, call: BranchCall, activations: BranchActivations, *tensors: Tensor | None) -> Tensor:
        ctx.call, ctx.activations = call, activations
        ctx.save_for_backward(*tensors)
        return call.all(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: BranchCall = ctx.call
        wanted = ctx.needs_input_grad[2:]
        chosen = [i for i, asked in enumerate(wanted) if asked]
        tensors = detached(ctx.saved_tensors, [False, False, *wanted[2:]])
        pairs = with_gradient(gradient).nonzero()
        ctx.activations.share = len(pairs) / gradient[..., 0, 0].numel()
        totals: list[Any] = [None if value is None else torch.zeros_like(value) for value in tensors[:2]]
        totals += [None if len(pairs) else torch.zeros_like(value) for value in ctx.saved_tensors[2:]]
        for part in pairs.split(call.size * len(gradient)) if len(pairs) else ():
            b, k = part.unbind(-1)
            with torch.enable_grad():
                hidden, read = call.some(tensors, b, k)
            found = torch.autograd.grad(hidden, [read[i] for i in chosen], gradient[b, k], allow_unused=True)
            for i, new in zip(chosen, found, strict=True):
                if new is not None and i < 2:  # of these branches
                    totals[i][b, k] = new[:, 0]
                elif new is not None:
                    totals[i] = new if totals[i] is None else totals[i] + new
        return None, None, *(total if asked else None for total, asked in zip(totals, wanted, strict=True))


def detached(tensors: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return tensors as leaves, of which those that are asked for collect a gradient."""
    pairs = zip(tensors, wanted, strict=True)
    return [None if value is None else value.detach().requires_grad_(asked) for value, asked in pairs]


def _filled(cache: Any, held: Sequence[tuple[int, str]], values: Sequence[Tensor | None]) -> Any:
    """Return a cache with other tensors; the given one stays as it is."""
    cache = copied(cache)
    for (layer, name), value in zip(held, values, strict=True):
        setattr(cache.layers[layer], name, value)
    return cache


def _probe(call: BranchCall, tensors: Sequence[Tensor | None]) -> str | None:
    """Return what makes a second reading of a branch another one, or one with unknown weights; None if nothing does."""
    tensors = detached(
        tensors, [i > 1 and value is not None and value.requires_grad for i, value in enumerate(tensors)]
    )
    device = call.inputs.suffix_mask.device
    first = torch.zeros(1, dtype=torch.long, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        (once, known), (twice, _) = (call.some(tensors, first, first) for _ in range(2))
    if not torch.allclose(once, twice, rtol=1e-3, atol=1e-5, equal_nan=True):
        return "parts that act at random"
    if {id(leaf) for leaf in leaves(once)} - {id(leaf) for leaf in known}:
        return "weights beside those of the language model and its norms, such as those of a hook"
    return None
