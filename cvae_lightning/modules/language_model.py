"""What every module of the package shares: hyperparameters as plain data, a template, an optimizer, and generation."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cvae_lightning.backbones.branches import run_branches
from cvae_lightning.backbones.causal_lm import build_causal_lm, head_of, load_tokenizer
from cvae_lightning.functional import latent_token_stats
from cvae_lightning.outputs import PairBatch
from cvae_lightning.spec import HasSpec, to_plain
from cvae_lightning.template import PromptTemplate


class LanguageModule(HasSpec, L.LightningModule):
    """A LightningModule around one causal LM and its template.

    Args:
        learning_rate: peak learning rate of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate_fraction: share of the peak that the cosine decay ends at, over the whole run.
        weight_decay: of matrices; vectors and norms are not decayed.
    """

    lm: Any
    template: PromptTemplate

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
            self.save_hyperparameters({**to_plain(self._spec_args), **instantiator})  # type: ignore[attr-defined]
        else:
            self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay, both in optimizer steps; stateless in the step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98), fused=fused)
        total = max(1, int(min(self.trainer.estimated_stepping_batches, 2**53)))
        scheduler = LambdaLR(optimizer, lambda step: self.learning_rate_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def learning_rate_factor(self, step: int, total: int) -> float:
        """Return the learning rate of ``step`` out of ``total`` as a share of the peak."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        floor = self.final_learning_rate_fraction
        return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))))

    def free_token_nll(self, lm: Any, batch: PairBatch) -> Tensor:
        """Return -log p(y_t|x,y_<t) of the z-free records under ``lm``, [B, T] nats, 0 where masked."""
        head = head_of(lm)
        y_open = batch.y_ids.new_full((len(batch), 1, 1), self.template.marker_ids["<y>"])
        suffix = torch.cat([y_open, batch.y_ids[:, None, :-1]], -1)
        mask = torch.cat([batch.y_mask[:, :1], batch.y_mask[:, :-1]], -1)
        hidden = run_branches(lm, batch.prefix_ids, batch.prefix_mask, suffix, mask, "repeat").hidden  # [B, 1, T, D]
        return token_stats(hidden, head, batch, need_jsd=False)[0][:, 0]

    def generate_from(self, xs: Sequence[str], section: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Continue ``<bos> <x> x </x> section <y>`` for each x; see :meth:`generate` of the subclasses."""
        from cvae_lightning.backbones.generation import generate_ids

        batch_size: int = options.pop("batch_size", 256)
        limit: int | None = options.pop("max_new_tokens", None)
        seed: int | None = options.pop("generator_seed", None)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        m = self.template.marker_ids
        banned = torch.tensor([m[t] for t in m if t != "</y>"] + self.template.latent_ids, device=self.device)
        texts: list[str] = []
        training = self.training
        self.eval()
        try:
            for start in range(0, len(xs), batch_size):
                rows = slice(start, start + batch_size)
                ids, mask = self.template.prefixes(xs[rows])
                tail = torch.tensor([[*part, m["<y>"]] for part in section[rows]])
                ids, mask = torch.cat([ids, tail], -1), torch.cat([mask, torch.ones_like(tail, dtype=torch.bool)], -1)
                produced = generate_ids(
                    self.lm,
                    ids.to(self.device),
                    mask.to(self.device),
                    self.template.end_id,
                    limit or self.max_new_tokens,
                    generator=generator,
                    banned=banned,
                    **options,
                )
                texts += self.template.decode(produced.cpu())
        finally:
            self.train(training)
        return texts

    @property
    def max_new_tokens(self) -> int:
        """Longest y worth generating: a little above the longest that this module has seen."""
        return int(self.longest_y) + 8 if int(self.longest_y) else 256

    def watch_length(self, batch: PairBatch) -> None:
        """Remember the longest y-region seen."""
        self.longest_y.fill_(max(int(self.longest_y), batch.y_ids.shape[1]))

    def keep_longest_y(self) -> None:
        """Register the buffer that holds the longest y-region seen, in tokens."""
        self.register_buffer("longest_y", torch.zeros((), dtype=torch.int64))
        self.longest_y: Tensor


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
    """Return (randomly initialised LM, tokenizer) from :func:`describe_lm`; the checkpoint's weights come after."""
    config = cast(dict[str, Any], json.loads(description["config"]))
    with tempfile.TemporaryDirectory() as folder:
        for name, text in json.loads(description["tokenizer"]).items():
            (Path(folder) / Path(name).name).write_text(text)
        tokenizer = load_tokenizer(folder)
    return build_causal_lm(config, config["vocab_size"], config.get("pad_token_id")), tokenizer
