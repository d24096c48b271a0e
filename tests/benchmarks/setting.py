"""A model, its data and the two ways of taking a training step that the benchmarks compare."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation

from cvae_lightning import losses as terms
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.data.base import RecordDataModule
from cvae_lightning.losses import LossCallback
from cvae_lightning.modules import SharedDiscreteCVAE
from cvae_lightning.modules.base import CVAEModule
from cvae_lightning.outputs import DiscreteOutputs, PairBatch, Record
from cvae_lightning.template import PromptTemplate


def family(name: str, width: int, layers: int) -> dict[str, Any]:
    """Return the config of a small model without dropout; heads of 64."""
    heads = max(1, width // 64)
    if name == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return {"model_type": name, "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 4096, **dropout}
    return {
        "model_type": name,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def words(vocab: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word w0, w1, ...; markers and 16 latents make up the rest of ``vocab``."""
    known = {token: i for i, token in enumerate(("<pad>", "<unk>", "<bos>", "<eos>"))}
    known |= {f"w{i}": i + 4 for i in range(vocab - 4 - 6 - 16)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{key}_token": f"<{key}>" for key in ("pad", "unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def artifact(folder: str | Path, name: str = "gpt2", width: int = 256, layers: int = 4, vocab: int = 50257) -> str:
    """Write a random entangled model whose head has ``vocab`` rows, latents included."""
    torch.manual_seed(0)
    tokenizer = words(vocab)
    template = PromptTemplate(tokenizer)
    lm = build_causal_lm(family(name, width, layers), vocab, template.pad_id)
    save_artifact(folder, lm, tokenizer, Baseline(10.0, 1, "benchmark-val", template.fingerprint()))
    return str(folder)


class Sentences(RecordDataModule):
    """Random words: a router prompt of P tokens and a y-region of T in every record."""

    strategy_names = ()

    def __init__(self, prefix: int, length: int, size: int, vocab: int, batch_size: int = 4) -> None:
        super().__init__(batch_size=batch_size)
        draw = random.Random(0)
        pick = [f"w{i}" for i in range(vocab - 64)]
        self.all = [
            Record(" ".join(draw.choices(pick, k=prefix - 4)), " ".join(draw.choices(pick, k=length - 2)), index=i)
            for i in range(size)
        ]

    def given_records(self, split: str) -> Sequence[Record]:
        """Return the same records for every split."""
        return self.all

    def has_split(self, split: str) -> bool:
        """Every split exists."""
        return True

    def given_fingerprint(self, split: str) -> str:
        """Return a constant: the data are."""
        return f"benchmark-{split}"


def elbo_losses() -> dict[str, LossCallback | None]:
    """Terms that need token costs, baseline and divergence."""
    return {
        "token_weighted_reconstruction_loss": terms.TokenWeightedReconstructionLoss(),
        "kl_prior_loss": terms.PriorKLLoss(weight=0.1),
        "inter_latent_divergence_loss": terms.InterLatentDivergenceLoss(weight=0.1),
    }


class NaiveCVAE(SharedDiscreteCVAE):
    """The same objective as one writes it first.

    K full sequences with logits at all positions, a router pass and a baseline pass of their own in every step, all by
    Hugging Face's model as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in [*self.lm.modules(), *self.posterior_network.modules(), *self.reference().modules()]:
            for name, child in part.named_children():
                if isinstance(child, torch.nn.GELU):
                    setattr(part, name, NewGELUActivation())

    def compute_outputs(self, batch: PairBatch, fields: frozenset[str]) -> DiscreteOutputs:
        """Return the same outputs by the plain forward of the Hugging Face model."""
        m, latents = self.template.marker_ids, torch.tensor(self.template.latent_ids)
        size, count = len(batch), len(latents)
        z = torch.full_like(batch.y_ids[:, :1], m["<z>"])
        prompt = torch.cat([batch.prefix_ids, z], -1)
        prompt_mask = torch.cat([batch.prefix_mask, torch.ones_like(z, dtype=torch.bool)], -1)
        router = self._logits(self.lm, prompt, prompt_mask)[:, -1, latents].float().log_softmax(-1)
        section = torch.stack([latents, *(torch.full_like(latents, m[t]) for t in ("</z>", "<y>"))], -1)
        ids = torch.cat(
            [prompt[:, None].expand(-1, count, -1), section.expand(size, -1, -1), _each(batch.y_ids, count)], -1
        )
        ones = batch.y_mask.new_ones(size, 3)
        mask = torch.cat([prompt_mask, ones, batch.y_mask], -1).repeat_interleave(count, 0)
        log_probs = self._logits(self.lm, ids.flatten(0, 1), mask).float().log_softmax(-1)
        log_probs = log_probs[:, prompt.shape[1] + 2 : -1].unflatten(0, (size, count))  # [B, K, T, V]
        nll = -log_probs.gather(-1, _each(batch.y_ids, count)[..., None]).squeeze(-1) * batch.y_mask[:, None]
        ids, mask, _ = self._z_free(batch)
        with torch.no_grad():
            free = self._logits(self.reference(), ids, mask).float().log_softmax(-1)[:, -batch.y_ids.shape[1] - 1 : -1]
            baseline = -free.gather(-1, batch.y_ids[..., None]).squeeze(-1) * batch.y_mask
        amortized = self.amortized_posterior(batch)
        return DiscreteOutputs(
            router_log_probs=router,
            posterior_log_probs=amortized,
            amortized_log_probs=amortized,
            token_nll=nll,
            y_mask=batch.y_mask,
            temperature=nll.new_tensor(1.0),
            c_base=nll.new_tensor(10.0),
            baseline_nll=baseline,
            inter_latent_jsd=plain_divergence(log_probs),
        )

    @staticmethod
    def _logits(lm: Any, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return lm(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits


def plain_divergence(log_probs: Tensor) -> Tensor:
    """Return mean_k KL(p_k || mean_k p_k) of log-probabilities [B, K, T, V], [B, T]."""
    log_mixture = log_probs.logsumexp(1) - math.log(log_probs.shape[1])
    return (log_probs.exp() * (log_probs - log_mixture[:, None])).sum(-1).mean(1)


def _each(ids: Tensor, count: int) -> Tensor:
    return ids[:, None].expand(-1, count, -1)


def build(kind: type[SharedDiscreteCVAE], folder: str, latents: int, **options: Any) -> SharedDiscreteCVAE:
    """Build a module with the ELBO losses, the amortized posterior and equal weights in every call."""
    torch.manual_seed(1)
    losses = options.pop("losses", None) or elbo_losses()
    return kind(folder, losses, num_latents=latents, posterior="amortized", **options).train()


def plain_step(module: CVAEModule, batch: PairBatch, baseline: Tensor | None = None) -> Callable[[], None]:
    """Return a hand-written training step: outputs, losses, backward, AdamW. A given baseline is not computed."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its state is there before anything is measured
    optimizer.zero_grad()
    if baseline is not None:
        module.baseline_nll = lambda batch: baseline  # type: ignore[method-assign]

    def run() -> None:
        total, _, _ = module._step(batch, "train")
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def ideal_flops(batch: int, prefix: int, latents: int, length: int, width: int, layers: int, vocab: int) -> float:
    """Return FLOP of the ideal step: 2 per weight and token forward, 4 backward, and the attention scores.

    The prefix is read once, the head sees supervised positions alone and is not recomputed, the baseline is cached; the
    posterior network is of the model's size.
    """
    body, suffix = 12 * width * width * layers, length + 2
    tokens = prefix + latents * suffix
    pairs = prefix**2 / 2 + latents * (suffix * prefix + suffix**2 / 2)
    model = 3 * (2 * body * tokens + 4 * width * layers * pairs)
    head = 6 * vocab * width * latents * length
    record = prefix + length
    posterior = 3 * (2 * body * record + 4 * width * layers * record**2 / 2)
    return batch * (model + head + posterior)


class Turns(Callback):
    """Times every training step from the end of the last one, data loading included, and lets others take turns.

    A side of another process returns the seconds that it took by its own clock.
    """

    def __init__(self, clock: Callable[[], float], others: dict[str, Callable[[], Any]], warm_up: int) -> None:
        self.clock, self.others, self.warm_up = clock, others, warm_up
        self.best = dict.fromkeys(("lightning", *others), float("inf"))
        self.steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._start = self.clock()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Stop the clock, run the other sides, and start it again."""
        taken = {"lightning": self.clock() - self._start}
        self.steps += 1
        for name, other in self.others.items():
            start = self.clock()
            own = other()
            taken[name] = self.clock() - start if own is None else own
        if self.steps > self.warm_up:
            self.best = {name: min(self.best[name], taken[name]) for name in taken}
        self._start = self.clock()


def through_lightning(
    module: CVAEModule,
    data: Sentences,
    others: dict[str, Callable[[], Any]],
    clock: Callable[[], float],
    repeat: int,
) -> dict[str, float]:
    """Train for one epoch that fills the baseline cache and ``repeat`` steps more, in turns with the other sides."""
    warm_up = len(data.all) // data.batch_size
    turns = Turns(clock, others, warm_up)
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            default_root_dir=root,
            max_steps=warm_up + repeat,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turns],
        )
        module.frozen_baseline.option = str(Path(root) / "cache")
        trainer.fit(module, datamodule=data)
    assert not module._reference  # the entangled model is gone once its costs are known
    return turns.best


def frozen_costs(module: SharedDiscreteCVAE, batch: PairBatch) -> Tensor:
    """Return the baseline of a batch, as the cache holds it."""
    with torch.no_grad():
        return module.free_token_nll(module.reference(), batch)
