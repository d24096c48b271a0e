"""Weights, gradients and optimizer states divided over the processes (FSDP2), under ``ModelParallelStrategy``."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn


class Shardable(L.LightningModule):
    """A module that divides itself over the data-parallel processes where the strategy brings a device mesh.

    Every layer of a language model is gathered when it is read, and the rest for the length of a step. Ranks read other
    numbers of batches in an evaluation, and generate texts of other lengths, so for that each gathers the whole model.
    The entangled model as the frozen reference stays whole on every rank.
    """

    def configure_model(self) -> None:
        """Divide the weights, which are those of rank zero from then on.

        Raises:
            ValueError: for the first kind of FSDP, tensor parallelism, checkpoints of several files, or weights that
                are shared with the entangled model.
        """
        strategy, mesh = None if self._trainer is None else self.trainer.strategy, self.device_mesh
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy: expected ModelParallelStrategy (FSDP2), got FSDPStrategy, whose flat parameters "
                "have no rows for the head over the latents to read"
            )
        if mesh is None or is_sharded(self):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"ModelParallelStrategy: expected tensor_parallel_size 1 and data_parallel_size {mesh.size()}, got "
                f"{mesh['tensor_parallel'].size()} and {mesh['data_parallel'].size()}: the models of this package are "
                "divided over data-parallel processes alone"
            )
        if getattr(strategy, "_save_distributed_checkpoint", False):
            raise ValueError(
                "ModelParallelStrategy: expected save_distributed_checkpoint false, got true: what reads checkpoints, "
                "`cvae-lightning export` for one, expects a single file"
            )
        if (adaptation := getattr(self, "adaptation", "full")) != "full":
            raise ValueError(
                f"ModelParallelStrategy: expected adaptation full, got {adaptation}: its weights are shared with the "
                "entangled model, and little is trained; take `trainer.strategy: ddp`"
            )
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        self.to(mesh.device_type)  # Lightning does so later, and NCCL sends nothing that lies elsewhere
        for value in (*self.parameters(), *self.buffers()):
            dist.broadcast(value.data, 0)
        whole = {name for part in self.modules() for name in getattr(part, "_no_split_modules", None) or ()}
        for part in list(self.modules()):
            if type(part).__name__ in whole:
                fully_shard(part, mesh=mesh["data_parallel"])
        fully_shard(self, mesh=mesh["data_parallel"], reshard_after_forward=False)
        for method in ("training_step", "gather"):
            register_fsdp_forward_method(self, method)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let layers go after they were read."""
        self.keep_gathered(False)

    def on_validation_model_eval(self) -> None:
        """Gather the whole model."""
        super().on_validation_model_eval()
        self.keep_gathered(True)

    def on_test_model_eval(self) -> None:
        """Gather the whole model."""
        super().on_test_model_eval()
        self.keep_gathered(True)

    def on_predict_model_eval(self) -> None:
        """Gather the whole model."""
        super().on_predict_model_eval()
        self.keep_gathered(True)

    def keep_gathered(self, keep: bool) -> None:
        """Gather the whole model, or let its layers go again as they are read; nothing where it is not divided."""
        if not is_sharded(self):
            return
        for part in self._divided():
            part.set_reshard_after_forward(not keep and part is not self, recurse=False)
        if keep:
            self.gather()

    def gather(self) -> None:
        """Gather all layers; a forward method, since FSDP2 expects one of the whole model to be the first."""
        for part in self._divided():
            part.unshard()

    def _divided(self) -> list[Any]:
        return [part for part in self.modules() if is_sharded(part)]


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module has been divided by FSDP2."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
