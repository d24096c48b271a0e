"""A key-value cache for generation that is not copied for every token."""

from __future__ import annotations

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
        # what was chosen or repeated since is no view of the room any more
        if room is None or held.data_ptr() != room.data_ptr() or end > room.shape[-2]:
            room = new.new_empty(*new.shape[:-2], end + min(self.reserve, 64 + end // 4), new.shape[-1])
            room[..., :start, :] = held
            self._rooms[name] = room
        room[..., start:end, :] = new
        return room[..., :end, :]

    def reset(self) -> None:
        """Forget everything."""
        self._rooms.clear()
        super().reset()


def generation_cache(config: Any, reserve: int) -> DynamicCache:
    """Return transformers' cache for a model's config, with room for ``reserve`` tokens in layers of full attention."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(reserve) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
