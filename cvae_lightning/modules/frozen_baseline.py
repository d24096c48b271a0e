"""When the frozen entangled model is run: once per record, and then no more, on disk what it said."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import RunningStage

from cvae_lightning.backbones.baseline_cache import BaselineCache, model_fingerprint

if TYPE_CHECKING:
    from cvae_lightning.modules.compared import ComparedModule

SPLITS = {
    RunningStage.TRAINING: "train",
    RunningStage.SANITY_CHECKING: "val",
    RunningStage.VALIDATING: "val",
    RunningStage.TESTING: "test",
}


class FrozenBaseline:
    """Opens the caches of a run's splits and says when the entangled model is not needed any more.

    Args:
        option: True = below the trainer's ``default_root_dir``, in runs that save checkpoints; False = no cache; or a
            folder.
        lm: the entangled model, as loaded; None where there is none.
    """

    def __init__(self, option: bool | str, lm: Any | None) -> None:
        self.option = option
        self.model = model_fingerprint(lm) if option and lm is not None else None
        self.caches: dict[str, BaselineCache | None] = {}
        self._computed = 0

    def cache(self, module: ComparedModule) -> BaselineCache | None:
        """Return the cache of the split that the trainer is at; None where records have no lasting index."""
        trainer: Any = module._trainer
        split = None if trainer is None else SPLITS.get(trainer.state.stage)
        if split is None or self.model is None:
            return None
        if split not in self.caches:
            data = trainer.datamodule
            indexed = hasattr(data, "records") and hasattr(data, "fingerprint")
            writes = isinstance(self.option, str) or trainer.checkpoint_callback is not None
            self.caches[split] = self._open(module, data, split) if indexed and writes else None
        return self.caches[split]

    def _open(self, module: ComparedModule, data: Any, split: str) -> BaselineCache:
        trainer: Any = module.trainer
        parts = (self.model, module.template.fingerprint(), data.fingerprint(split), trainer.precision)
        fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
        root = Path(self.option) if isinstance(self.option, str) else Path(trainer.default_root_dir) / "baseline_cache"
        folder, size = root / f"{split}-{fingerprint}", len(data.records(split))
        return BaselineCache(folder, fingerprint, size, trainer.global_rank)

    def fill(self, module: ComparedModule) -> None:
        """Compute the training records that the epoch's full batches have left out, each rank its share."""
        cache = self.caches.get("train")
        if cache is None:
            return
        trainer: Any = module.trainer
        loader = trainer.train_dataloader
        trainer.strategy.barrier("every rank has written the rows of its batches")
        missing = cache.missing(_indices(loader.dataset))
        if not 0 < len(missing) < loader.batch_size * trainer.world_size:
            return
        records = trainer.datamodule.records("train")
        mine = [records[i] for i in missing[trainer.global_rank :: trainer.world_size]]
        if mine:
            batch = module.template.collate(mine).to(module.device)
            with torch.no_grad():
                cache.rows(batch.index, batch.y_mask, lambda: module.free_token_nll(module.reference(), batch))
        trainer.strategy.barrier("every rank has written its share")
        cache.refresh()

    def done(self, module: ComparedModule) -> bool:
        """Return whether all splits in use are cached, or nothing was computed since the last call."""
        trainer: Any = module.trainer
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}
        used = {split: cache for split, cache in self.caches.items() if cache is not None}
        computed = sum(cache.computed for cache in used.values())
        idle, self._computed = computed == self._computed, computed
        return bool(used) and (idle or not any(c.missing(_indices(loaders[s].dataset)) for s, c in used.items()))


def _indices(dataset: Any) -> Any:
    """Record indices of a whole split, or of what is left of it."""
    return getattr(dataset, "indices", range(len(dataset)))
