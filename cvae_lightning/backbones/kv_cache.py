"""Key-value caches: one for generation that is not copied for every token, and copies that share what they hold."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one attention layer, written into room held in reserve.

    transformers' own layer concatenates what it holds with every new token, which copies all of it each time. For
    inference alone: what it holds is written in place.

    Args:
        reserve: most tokens that room is made for at a time; less where few are held (64 and a quarter of them).
    """

    keys: Tensor
    values: Tensor

    def __init__(self, reserve: int) -> None:
        super().__init__()
        self.reserve = reserve
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, H, T, D] each; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        if not held.numel():
            return new
        start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or end > room.shape[-2]:
            room = new.new_empty(*new.shape[:-2], end + min(self.reserve, 64 + end // 4), new.shape[-1])
            room[..., :start, :] = held
            self._rooms[name] = room
        room[..., start:end, :] = new
        return room[..., :end, :]

    # What is chosen, repeated or put in order is copied, and the old room goes first: there is one layer at a time that
    # is held twice.

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, or keep rows more than once."""
        self._rooms.clear()
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Keep every row so many times."""
        self._rooms.clear()
        super().batch_repeat_interleave(repeats)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order of the beams."""
        self._rooms.clear()
        super().reorder_cache(beam_idx)

    def reset(self) -> None:
        """Forget everything."""
        self._rooms.clear()
        super().reset()


def generation_cache(lm: Any, reserve: int) -> DynamicCache:
    """Return transformers' cache for a model, with room for ``reserve`` tokens in layers of full attention.

    A compiled model keeps transformers' own layers: what is written in place breaks its graphs, and is compiled anew
    time and again.
    """
    cache = DynamicCache(config=lm.config)
    if any(part._compiled_call_impl is not None for part in lm.modules()):
        return cache
    cache.layers = [PreallocatedLayer(reserve) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def copied(cache: Any) -> Any:
    """Return a cache with layers of its own and the same tensors; what is changed in it leaves the other as it is."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache
