"""What every module of the package shares: hyperparameters as plain data, a template, an optimizer, and generation."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cvae_lightning.backbones.branch_inputs import padded_left
from cvae_lightning.backbones.causal_lm import (
    build_causal_lm,
    decoder_of,
    evaluating,
    head_of,
    load_tokenizer,
    positions_of,
    read_hidden,
)
from cvae_lightning.functional import latent_token_stats
from cvae_lightning.modules.base_weights import FORMAT, FORMAT_KEY, WEIGHTS, check_format, load_base
from cvae_lightning.modules.sharding import Shardable
from cvae_lightning.outputs import PairBatch
from cvae_lightning.progress import steps_of_run
from cvae_lightning.scheduled import restore_scheduled
from cvae_lightning.spec import HasSpec, to_plain
from cvae_lightning.template import PromptTemplate, Text
from cvae_lightning.trust import find_class, read_checkpoint, rebuild


class LanguageModule(HasSpec, Shardable):
    """A LightningModule around one causal LM and its template.

    Args:
        learning_rate: peak learning rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate_fraction: share of the peak that the cosine decay ends at, over the whole run.
        weight_decay: of matrices; vectors and norms are not decayed.
    """

    lm: Any
    template: PromptTemplate
    _longest_seen: int
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

    def generate_from(self, xs: Sequence[Text], section: Sequence[Sequence[int]], **options: Any) -> list[Any]:
        """Continue ``<bos> <x> x </x> section <y>`` for each x; see :meth:`generate` of the subclasses.

        ``embed`` turns prompt ids [N, L] of these rows [N] of ``xs`` into input embeddings, where a latent is a vector;
        or returns them as they are, where it only tells the norms the latents of these rows.
        ``branches`` [K, S] are ids behind the section, instead of ``<y>``: K continuations in a row for each x.
        With ``num_return_sequences`` above 1 each of these is a list of texts.
        """
        from cvae_lightning.backbones.generation import check_options, expansion, generate_within

        batch_size: int = options.pop("batch_size", 256)
        limit: int | None = options.pop("max_new_tokens", None)
        embed: Callable[[Tensor, Tensor], Tensor] | None = options.pop("embed", None)
        branches: Tensor | None = options.pop("branches", None)
        seed: int | None = options.pop("generator_seed", None)
        shrink: bool = options.pop("shrink", True)
        options = {name: value for name, value in options.items() if value is not None}
        check_options(options | ({} if limit is None else {"max_new_tokens": limit}))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        wide, several = expansion(options), options.get("num_return_sequences") or 1
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        m = self.template.marker_ids
        banned = torch.tensor([m[t] for t in m if t != "</y>"] + self.template.all_latent_ids, device=self.device)
        behind = 0 if branches is None else branches.shape[1]
        texts: list[Any] = []
        write = self.template.decode if not len(xs) or isinstance(xs[0], str) else self.template.cut
        with evaluating(self):
            size = max(1, batch_size // (wide * (1 if branches is None else len(branches))))
            for start in range(0, len(xs), size):
                rows = slice(start, start + size)
                ids, mask = self.template.prefixes(xs[rows])
                tail = torch.tensor([[*part] if branches is not None else [*part, m["<y>"]] for part in section[rows]])
                ids, mask = torch.cat([ids, tail], -1), torch.cat([mask, torch.ones_like(tail, dtype=torch.bool)], -1)
                self.check_room(xs[rows], mask.sum(-1) + behind)
                produced = generate_within(
                    self.lm,
                    ids.to(self.device),
                    mask.to(self.device),
                    self.template.end_id,
                    limit or self.max_new_tokens,
                    self.positions,
                    embed,
                    start,
                    generator=generator,
                    banned=banned,
                    branches=branches,
                    shrink=shrink,
                    tokenizer=self.template.tokenizer,
                    **options,
                )
                texts += write(produced.cpu())
        return texts if several == 1 else [texts[i : i + several] for i in range(0, len(texts), several)]

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
            map_location: device, as for ``torch.load``; None = the device that it was saved from, where there is one.
            hparams_file: not read: a checkpoint remembers its own.
            strict: whether the weights must be exactly those of the model; None = True.
            weights_only: always True, whatever is given.
            kwargs: arguments of the model in place of those that the checkpoint remembers.

        Raises:
            ValueError: if it is no checkpoint of this class, or names a class of a module that is not imported.
        """
        source = str(checkpoint_path)
        stored = read_checkpoint(checkpoint_path, map_location or (None if torch.cuda.is_available() else "cpu"))
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
        model.on_load_checkpoint(stored)
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
        """Say in which format the checkpoint is."""
        checkpoint[FORMAT_KEY] = FORMAT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of a later version; outside training, go on with what schedules had set."""
        check_format(checkpoint, "the checkpoint")
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            restore_scheduled(self, checkpoint)
        self.from_checkpoint = True

    @property
    def shows_progress(self) -> bool:
        """Whether long work shows a progress bar: on rank zero, unless the trainer has none."""
        trainer = self._trainer
        return trainer is None or (trainer.is_global_zero and trainer.progress_bar_callback is not None)

    @property
    def max_new_tokens(self) -> int:
        """Longest y worth generating: a little above the longest that this module has seen."""
        return self.longest_seen + 8 if self.longest_seen else 256

    @property
    def longest_seen(self) -> int:
        """Tokens of the longest y-region that this module has seen, on this rank or before it was saved."""
        return max(int(self.longest_y), self._longest_seen)

    def watch_length(self, batch: PairBatch) -> None:
        """Remember the longest y-region seen; see also :meth:`check_positions`."""
        self.check_positions(batch)
        self._longest_seen = max(self._longest_seen, batch.y_ids.shape[1])

    @property
    def positions(self) -> int | None:
        """How many tokens the model can read; None = any number."""
        return positions_of(self.lm)

    @property
    def positions_between(self) -> int:
        """Number of positions that may lie between x and y."""
        return self.template.section_length

    def check_positions(self, batch: PairBatch) -> None:
        """Raise if a record, latent section included, is longer than the model can read.

        Raises:
            ValueError: naming the length, the limit and the ways out.
        """
        limit, between = self.positions, self.positions_between
        if not limit or batch.prefix_ids.shape[1] + between + batch.y_ids.shape[1] <= limit:
            return
        lengths = batch.prefix_mask.sum(-1) + between + batch.y_mask.sum(-1)
        row = int(lengths.argmax())
        if int(lengths[row]) > limit:
            room = limit - between + self.template.section_length
            raise ValueError(
                f"the record whose x begins with {batch.x[row][:40]!r} takes {int(lengths[row])} tokens, more than the "
                f"model's {limit} positions: set model.init_args.max_length to {room} (and on_overflow to skip, to "
                "leave such records out), or take a model with a larger max_position_embeddings"
            )

    def check_room(self, xs: Sequence[Text], lengths: Tensor) -> None:
        """Raise if a prompt of one of these x, which takes so many tokens [N], leaves no room for y.

        Raises:
            ValueError: naming the x, its length and the limit.
        """
        row = int(lengths.argmax()) if len(xs) else 0
        if self.positions and len(xs) and int(lengths[row]) >= self.positions:
            raise ValueError(
                f"the prompt whose x begins with {xs[row][:40]!r} leaves no room for y: it takes {int(lengths[row])} "
                f"of the model's {self.positions} positions. Shorten x, or take a model with a larger "
                "max_position_embeddings"
            )

    def keep_longest_y(self) -> None:
        """Register the buffer that holds the longest y-region seen, in tokens."""
        self.register_buffer("longest_y", torch.zeros((), dtype=torch.int64))
        self.longest_y: Tensor
        self._longest_seen = 0  # beside the buffer: reading that would make the host wait in every step

    def share_longest_y(self) -> None:
        """Let every rank know of the longest y-region that any has seen."""
        longest = torch.tensor(self.longest_seen, device=self.device)
        self._longest_seen = int(self.trainer.strategy.reduce(longest, reduce_op="max"))

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.longest_y.fill_(self.longest_seen)
        super()._save_to_state_dict(destination, prefix, keep_vars)


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
