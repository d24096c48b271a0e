"""What every module of the package shares: hyperparameters as plain data, a template, an optimizer and checkpoints."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cvae_lightning.backbones.branch_inputs import padded_left
from cvae_lightning.backbones.causal_lm import (
    build_causal_lm,
    decoder_of,
    head_of,
    load_tokenizer,
    read_hidden,
)
from cvae_lightning.functional import latent_token_stats
from cvae_lightning.modules.base_weights import FORMAT, FORMAT_KEY, WEIGHTS, check_format, load_base
from cvae_lightning.modules.generating import Generating
from cvae_lightning.outputs import PairBatch
from cvae_lightning.progress import steps_of_run
from cvae_lightning.scheduled import SCHEDULED, note_scheduled, restore_scheduled
from cvae_lightning.spec import HasSpec, to_plain
from cvae_lightning.trust import find_class, read_checkpoint, rebuild


class LanguageModule(HasSpec, Generating):
    """A LightningModule around one causal LM and its template.

    Args:
        learning_rate: peak learning rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate_fraction: share of the peak that the cosine decay ends at, over the whole run.
        weight_decay: of matrices; vectors and norms are not decayed.
    """

    from_checkpoint = False
    """Whether a checkpoint has been loaded, so that the weights are not those of a new model."""

    def __init__(
        self,
        learning_rate: float,
        warmup_steps: int,
        final_learning_rate_fraction: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.final_learning_rate_fraction = final_learning_rate_fraction
        self.weight_decay = weight_decay
        if _given_hyperparameters.get() is None:  # built in Python, not by LightningCLI
            instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
            self.save_hyperparameters({**to_plain(self._spec_args), **instantiator})
        else:
            self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay, both in optimizer steps; stateless in the step.

        Raises:
            ValueError: if the whole module was compiled.
        """
        if self._compiler_ctx is not None:
            raise ValueError(
                "torch.compile cannot follow a step that logs: give the trainer the module itself, and compile "
                "its transformer in place: model.lm.get_decoder().compile(dynamic=True)"
            )
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        # under mixed precision Lightning refuses to clip for a fused optimizer, which may unscale gradients by itself
        clips_mixed = self.trainer.gradient_clip_val and isinstance(self.trainer.precision_plugin, MixedPrecision)
        fused = not clips_mixed and all(p.device.type in ("cpu", "cuda") for p in parameters)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98), fused=fused)
        total = int(min(steps_of_run(self.trainer), 2**53))
        scheduler = LambdaLR(optimizer, lambda step: self.learning_rate_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_factor(self, step: int, total: int) -> float:
        """Return the learning rate of ``step`` out of ``total`` as a share of the peak."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        floor = self.final_learning_rate_fraction
        return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))

    def free_token_nll(self, lm: Any, batch: PairBatch, gap: Tensor | None = None) -> Tensor:
        """Return -log p(y_t|x,y_<t) of the z-free records under ``lm``, [B, T] nats, 0 where masked.

        Args:
            lm: a causal LM.
            batch: the records.
            gap: [B] number of positions left free before ``<y>``; None = 0.
        """
        prefix_ids, prefix_mask = padded_left(batch.prefix_ids, batch.prefix_mask)
        width = prefix_ids.shape[1]
        y_open = torch.full_like(batch.y_ids[:, :1], self.template.marker_ids["<y>"])
        ids = torch.cat([prefix_ids, y_open, batch.y_ids[:, :-1]], -1)
        mask = torch.cat([prefix_mask, batch.y_mask[:, :1], batch.y_mask[:, :-1]], -1)
        behind = torch.arange(ids.shape[1], device=ids.device) >= width
        offset = None if gap is None else gap[:, None] * behind
        hidden = read_hidden(decoder_of(lm), ids, mask, offset)[:, width:]  # [B, T, D]
        return token_stats(hidden[:, None], head_of(lm), batch, need_jsd=False)[0][:, 0]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint without running code that it names: weights only, and components of imported modules only.

        Args:
            checkpoint_path: the file.
            map_location: device, as for ``torch.load``; None = the device that it was saved from, where there is such a
                one, else the CPU.
            hparams_file: not read: a checkpoint remembers its own.
            strict: whether the weights must be exactly those of the model; None = True.
            weights_only: always True, whatever is given.
            kwargs: arguments of the model in place of those that the checkpoint remembers.

        Raises:
            ValueError: if it is no checkpoint of this class, or names a class of a module that is not imported.
        """
        source = str(checkpoint_path)
        stored = read_checkpoint(checkpoint_path, map_location)
        remembered = stored.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {}
        if not isinstance(remembered, dict) or not isinstance(stored.get("state_dict"), dict):
            raise ValueError(f"cannot read checkpoint {source}: expected hyper_parameters and state_dict as mappings")
        check_format(stored, source)
        path = remembered.get("_class_path")
        target = cls if path is None else find_class(path, cls, source)
        own = {key: value for key, value in remembered.items() if key not in ("_class_path", "_instantiator", *kwargs)}
        own = target.by_itself(own, stored, kwargs)
        try:
            model = target(**rebuild(own, source), **kwargs)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{source} does not describe a {target.__name__}: {error}") from error
        noted = [n for n in stored.get(SCHEDULED, ()) if (n["attribute"] or "losses") not in kwargs]
        model.on_load_checkpoint({**stored, SCHEDULED: noted})
        model.load_state_dict(stored["state_dict"], strict=strict is not False)
        return model.to(next((value.device for value in stored["state_dict"].values()), "cpu"))

    @classmethod
    def by_itself(
        cls, arguments: dict[str, Any], stored: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments that a checkpoint remembers, where it holds what they point to.

        Args:
            arguments: what it remembers.
            stored: the checkpoint.
            given: what the caller gives in place of these.
        """
        return arguments

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in which format the checkpoint is, and what schedules have set."""
        checkpoint[FORMAT_KEY] = FORMAT
        if self._trainer is not None:  # here, not in the callbacks: a checkpoint of weights alone does not ask them
            checkpoint[SCHEDULED] = note_scheduled(self, self.trainer.callbacks)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a later version; outside training, go on with what schedules had set."""
        check_format(checkpoint, "the checkpoint")
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            for said in restore_scheduled(self, checkpoint):
                rank_zero_info(said)
        self.from_checkpoint = True

    @property
    def shows_progress(self) -> bool:
        """Whether long work shows a progress bar: on rank zero, unless the trainer has none."""
        trainer = self._trainer
        return trainer is None or (trainer.is_global_zero and trainer.progress_bar_callback is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Leave rotary frequencies in fp32 where ``bf16-true`` casts all else: of rounded ones, far angles are wrong.

        The frozen reference keeps its own, and both are compared.
        """
        exact = {name: buffer for name, buffer in self.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            now = self.get_buffer(name)
            if now.dtype != buffer.dtype:
                owner, _, own = name.rpartition(".")
                setattr(self.get_submodule(owner), own, buffer.to(now.device))
        return self


def token_stats(hidden: Tensor, head: Any, batch: PairBatch, need_jsd: bool) -> tuple[Tensor, Tensor | None]:
    """Return (token_nll [B, K, T], inter_latent_jsd [B, T] or None) of hidden states [B, K, T, D] that predict y."""
    targets = batch.y_ids.masked_fill(~batch.y_mask, -100)
    return latent_token_stats(
        hidden, head.weight, targets, need_jsd=need_jsd, bias=head.bias, scale=head.scale, softcap=head.softcap
    )


def describe_lm(lm: Any, tokenizer: Any) -> dict[str, str]:
    """Return config and tokenizer as JSON texts, so that a checkpoint can be loaded where the artifact is gone."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {p.name: p.read_text() for p in Path(folder).iterdir() if p.suffix == ".json"}
    return {"config": json.dumps(lm.config.to_dict()), "tokenizer": json.dumps(files)}


def rebuild_lm(description: dict[str, str]) -> tuple[Any, Any]:
    """Return (LM, tokenizer) from :func:`describe_lm`.

    The LM is randomly initialised, and the checkpoint's weights come after; or it has those that the checkpoint left
    out, where the description says which these are.
    """
    config = cast(dict[str, Any], json.loads(description["config"]))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in json.loads(description["tokenizer"]).items():
            (Path(folder) / Path(name).name).write_text(text)
        tokenizer = load_tokenizer(folder)
    if WEIGHTS in description:
        return load_base(description), tokenizer
    return build_causal_lm(config, config["vocab_size"], config.get("pad_token_id")), tokenizer
