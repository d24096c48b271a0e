"""EntangledLM: trains or evaluates the base model p(y|x) and leaves an artifact folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import (
    add_token_rows,
    build_causal_lm,
    evaluating,
    load_causal_lm,
    load_tokenizer,
)
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.functional import global_batch_mean
from cvae_lightning.metrics import ReconstructionRatio
from cvae_lightning.modules.language_model import LanguageModule, describe_lm, rebuild_lm
from cvae_lightning.modules.sharding import is_sharded
from cvae_lightning.outputs import PairBatch
from cvae_lightning.progress import progress
from cvae_lightning.template import PromptTemplate, Text


class EntangledLM(LanguageModule):
    """A causal language model of y given x that mixes all strategies: the start of every CVAE, and its yardstick.

    Generative process: p(y|x) = prod_t p(y_t|x, y_<t), trained by the mean NLL of the y-tokens. After ``fit`` (and
    after ``validate``, which only evaluates) ``output_dir`` holds the model, its tokenizer and ``baseline.json``; a
    ``fast_dev_run`` writes none of it.

    Args:
        output_dir: artifact folder to write.
        model: Hugging Face folder or hub name to start from (never runs remote code); None = built from ``config``.
        config: config of a model trained from scratch, ``model_type`` among its keys (llama, gpt2, ...).
        tokenizer: for a model from scratch: ``char``, ``word`` or ``bpe``, built from the training split.
        tokenizer_vocab_size: largest vocabulary of ``word`` and ``bpe``, in tokens.
        max_length: longest record in tokens, latent section included; null = unlimited.
        on_overflow: what happens to a longer record: ``error``, or ``skip`` it and say how many.
        padding_side: side on which x is padded.
        max_gap: training leaves 0 to this many positions, at random, free before ``<y>``, so that the latent section
            that post-training puts there (3 tokens; ``prefix_length`` + 2 where that is not 1, so set this to it) does
            not shift what the model has learned; 0 = never.
        new_token_std: noise of the rows added to a pretrained model, in units of the embedding's standard deviation.
        learning_rate: peak learning rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate_fraction: share of the peak at which the cosine decay ends.
        weight_decay: of matrices.
    """

    def __init__(
        self,
        output_dir: str,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: Literal["char", "word", "bpe"] = "char",
        tokenizer_vocab_size: int = 4096,
        max_length: int | None = None,
        on_overflow: Literal["error", "skip"] = "error",
        padding_side: Literal["left", "right"] = "left",
        max_gap: int = 3,
        new_token_std: float = 1.0,
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        final_learning_rate_fraction: float = 0.05,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(learning_rate, warmup_steps, final_learning_rate_fraction, weight_decay)
        if (model is None) == (config is None):
            raise ValueError(
                "EntangledLM needs exactly one of `model` (a Hugging Face folder or name) and `config` (a model to "
                f"train from scratch), got model={model!r} and config={config!r}"
            )
        self.output_dir = output_dir
        self.config = config
        self.tokenizer_kind = tokenizer
        self.tokenizer_vocab_size = tokenizer_vocab_size
        self.template_options: dict[str, Any] = {
            "max_length": max_length,
            "on_overflow": on_overflow,
            "padding_side": padding_side,
        }
        self.max_gap = max_gap
        self.new_token_std = new_token_std
        self.lm = None
        self.template = None  # type: ignore[assignment]
        self.validation_nll = ReconstructionRatio(1.0)
        self.keep_longest_y()
        self.seconds = 0.0
        self._has_weights = model is not None
        if model is not None:
            self._adopt(load_causal_lm(model), load_tokenizer(model))

    def _adopt(self, lm: Any, tokenizer: Any) -> None:
        self.template = PromptTemplate(tokenizer, 0, **self.template_options)
        add_token_rows(lm, len(self.template), self.new_token_std, added=self.template.added_ids)
        self.lm = lm

    def setup(self, stage: str) -> None:
        """Build tokenizer and model from the training split where none was given."""
        if self.lm is not None:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None or not hasattr(data, "train_texts"):
            raise ValueError(
                "a model from scratch needs a data module of cvae_lightning.data to build its tokenizer from"
            )
        alphabet = data.alphabet()
        texts: Iterable[str] = (text for pair in data.train_texts() for text in pair)
        if alphabet is not None and self.tokenizer_kind == "char":
            texts = sorted(alphabet)
        tokenizer = build_tokenizer(texts, self.tokenizer_kind, self.tokenizer_vocab_size)
        template = PromptTemplate(tokenizer)
        self._adopt(build_causal_lm(self.config or {}, len(template), template.pad_id), tokenizer)

    @classmethod
    def by_itself(
        cls, arguments: dict[str, Any], stored: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Leave out the model that the training started from: the checkpoint holds config, tokenizer and weights."""
        if arguments.get("model") is None or given.keys() & {"model", "config"} or "entangled" not in stored:
            return arguments
        return arguments | {"model": None, "config": json.loads(stored["entangled"]["config"])}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store config and tokenizer, so that the checkpoint loads by itself."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["entangled"] = describe_lm(self.lm, self.template.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the model where no data has done so, or data whose tokens are not those of the weights.

        Raises:
            ValueError: if the model of other tokens is shared out among processes already.
        """
        super().on_load_checkpoint(checkpoint)
        if self.lm is None:
            self._adopt(*rebuild_lm(checkpoint["entangled"]))
        elif self.config is not None and "entangled" in checkpoint:
            stored = checkpoint["entangled"]
            if stored["tokenizer"] == describe_lm(self.lm, self.template.tokenizer)["tokenizer"]:
                return
            if is_sharded(self):
                raise ValueError(
                    "the checkpoint was trained with a tokenizer that today's training split does not give: expected "
                    "the data that it was trained on; give that data, or load the checkpoint in one process"
                )
            rank_zero_info("the tokenizer is that of the checkpoint: today's training split would give another one")
            self._adopt(*rebuild_lm(stored))

    def on_fit_start(self) -> None:
        """Refuse before any work is done what cannot be written in the end, and start the clock.

        Raises:
            ValueError: if there is no data module to measure the model on.
            PermissionError: if the folder cannot be written.
        """
        self._started = time.monotonic()
        self._has_weights = True
        self._need_data()
        if self.trainer.is_global_zero:
            os.makedirs(self.output_dir, exist_ok=True)
            if not os.access(self.output_dir, os.W_OK):
                raise PermissionError(f"output_dir {self.output_dir!r} cannot be written")

    def on_validation_start(self) -> None:
        """Refuse to measure a model that nobody has trained: its artifact would take the place of a trained one.

        Raises:
            ValueError: if ``validate`` has neither ``model`` nor a checkpoint, or no data module.
        """
        if self.trainer.state.fn == "validate":
            self._need_data()
        if self.trainer.state.fn == "validate" and not (self._has_weights or self.from_checkpoint):
            raise ValueError(
                f"validate would write a model of random weights to {self.output_dir}: expected trained ones, got a "
                "config alone. Give the training's checkpoint with --ckpt_path, or the folder of a trained model with "
                "--model.init_args.model FOLDER --model.init_args.config null"
            )

    @property
    def positions_between(self) -> int:
        """Number of positions that may lie between x and y: in training also the largest gap and ``<y>``."""
        return max(super().positions_between, self.max_gap + 1 if self.lm.training else 0)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the mean NLL per y-token of the batch, in nats."""
        self.watch_length(batch)
        gap = torch.randint(self.max_gap + 1, (len(batch),), device=self.device) if self.max_gap else None
        nats_and_tokens = torch.stack([self.free_token_nll(self.lm, batch, gap).sum(-1), batch.y_mask.sum(-1)], -1)
        nats, tokens = global_batch_mean(nats_and_tokens)  # tokens of all ranks count alike
        loss = nats / tokens
        self.last_terms = {"loss": loss.detach()}
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Accumulate the NLL of the split."""
        self.watch_length(batch)
        self.validation_nll.update(self.free_token_nll(self.lm, batch), batch.y_mask.sum())

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Accumulate the NLL of the split."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log nats per y-token as ``baseline_nll``."""
        self._log_nll("val")

    def on_test_epoch_end(self) -> None:
        """Log nats per y-token as ``baseline_nll``."""
        self._log_nll("test")

    def _log_nll(self, stage: str) -> None:
        self.share_longest_y()
        self.log(f"{stage}/baseline_nll", self.validation_nll.compute().to(self.device), prog_bar=True, sync_dist=True)
        self.validation_nll.reset()

    def on_fit_end(self) -> None:
        """Measure the baseline on the validation split with the final weights and write the artifact.

        On the device of the training, which Lightning has taken the module away from by then.
        """
        self.seconds = time.monotonic() - self._started
        if self._is_trial:
            return
        left_on = self.device
        self.to(self.trainer.strategy.root_device)
        self.write_artifact(self.trainer.datamodule)  # type: ignore[attr-defined]
        self.to(left_on)

    def on_validation_end(self) -> None:
        """Write the artifact where the model is only evaluated."""
        if self.trainer.state.fn == "validate" and not self._is_trial:
            self.write_artifact(self.trainer.datamodule)  # type: ignore[attr-defined]

    def _need_data(self) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self._is_trial and not (hasattr(data, "val_dataloader") and hasattr(data, "fingerprint")):
            raise ValueError(
                "an entangled model's cost per token is measured on a data module with val_dataloader() and "
                f"fingerprint(split), as those of cvae_lightning.data are: got {type(data).__name__}. Give one as "
                "`datamodule=`"
            )

    @property
    def _is_trial(self) -> bool:
        """Whether this is a ``fast_dev_run``, which only tries whether all runs and must leave no trace."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def write_artifact(self, data: Any) -> Baseline:
        """Write ``output_dir`` and return its baseline."""
        lm = self.lm
        if is_sharded(self):
            self.keep_gathered(True)
            lm, _ = rebuild_lm(describe_lm(self.lm, self.template.tokenizer))
            lm.load_state_dict(dict(self.lm.named_parameters(remove_duplicate=False)), strict=False)
            lm.to(self.device)
        c_base, tokens = measure_baseline(self, lm, data.val_dataloader())
        baseline = Baseline(
            c_base, tokens, data.fingerprint("val"), self.template.fingerprint(), round(self.seconds, 1)
        )
        if self.global_rank == 0:
            save_artifact(self.output_dir, lm, self.template.tokenizer, baseline)
            rank_zero_info(f"entangled model: {c_base:.5f} nats per token, written to {self.output_dir}")
        return baseline

    def generate(self, x: Sequence[Text], **options: Any) -> list[Any]:
        """Return one y per x.

        Args:
            x: inputs, as texts or all as token ids; y is of the same kind.
            options: ``generator_seed``, ``batch_size`` (rows of the model's batch), and those of transformers'
                ``GenerationConfig``.
        """
        return self.generate_from(x, [()] * len(x), **options)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one row per record: x, the greedy y, and its own solution as ``target``, None where it holds none."""
        columns = zip(batch.index.tolist(), batch.x, self.generate(list(batch.x)), batch.y, strict=True)
        return [{"index": i, "x": x, "y": y, "target": target or None} for i, x, y, target in columns]


@torch.no_grad()
def measure_baseline(module: LanguageModule, lm: Any, loader: Any) -> tuple[float, int]:
    """Return (nats per y-token, number of tokens) of ``lm`` on a loader's z-free records, over all ranks.

    Raises:
        ValueError: if the split is missing or empty, or its NLL is not a positive number.
    """
    if not loader:
        raise ValueError("c_base is measured on the validation split, and there is none: give the data module one")
    sums = torch.zeros(2, dtype=torch.float64, device=module.device)  # nats, tokens
    with evaluating(lm):
        for batch in progress(loader, "measuring the entangled model", module.shows_progress):
            batch = batch.to(module.device)
            module.check_positions(batch)
            sums += torch.stack([module.free_token_nll(lm, batch).double().sum(), batch.y_mask.sum().double()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    tokens = int(sums[1])
    value = float(sums[0]) / max(tokens, 1)
    if not (tokens and 0 < value < float("inf")):
        raise ValueError(
            f"the entangled model costs {value} nats per token on {tokens} validation tokens; expected > 0"
        )
    return value, tokens
