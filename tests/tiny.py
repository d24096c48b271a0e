"""Tiny models, tokenizers and data, built in code: no network, a few milliseconds each."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from cvae_lightning import losses as losses_
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.data.tasks import MultidigitAddition
from cvae_lightning.outputs import Record
from cvae_lightning.template import PromptTemplate

CONFIGS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}
"""Options of a Trainer that writes nothing."""

RECORDS = [
    Record("12", "21=3", 0, 0),
    Record("7", "77;7=7", 1, 1),
    Record("3456", "6=6", 0, 2),
    Record("9", "9;9;9=9", 1, 3),
    Record("80", "0=8", -1, 4),
]


def tiny_tokenizer():
    return build_tokenizer(["0123456789;="], "char")


def tiny_lm(family="llama", seed=0, dropout=0.0):
    torch.manual_seed(seed)
    template = PromptTemplate(tiny_tokenizer())
    lm = build_causal_lm(CONFIGS[family], len(template), template.pad_id)
    if family == "gpt2":
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(lm.config, name, dropout)
        from cvae_lightning.backbones.causal_lm import set_dropout

        set_dropout(lm, dropout)
    with torch.no_grad():  # larger weights: logits far from uniform, so that equality tests see something
        for p in lm.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return lm, template


def tiny_artifact(folder, family="llama", seed=0, c_base=1.5, **baseline):
    lm, template = tiny_lm(family, seed)
    values = {"num_tokens": 10, "data": "tiny-val", "template": template.fingerprint(), **baseline}
    save_artifact(folder, lm, template.tokenizer, Baseline(c_base=c_base, **values))
    return str(folder)


ADDITION_LM = CONFIGS["llama"] | {"max_position_embeddings": 256}
"""Config of a model that has room for additions."""


def addition_artifact(folder, config=ADDITION_LM, scale=1.0, c_base=1.5, data="-"):
    """An untrained entangled model whose tokenizer knows the characters of additions."""
    template = PromptTemplate(build_tokenizer([MultidigitAddition().alphabet], "char"))
    torch.manual_seed(0)
    lm = build_causal_lm(config, len(template), template.pad_id)
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 2:
                p.mul_(scale)
    save_artifact(folder, lm, template.tokenizer, Baseline(c_base, 10, data, template.fingerprint()))
    return str(folder)


def all_losses():
    """Every term, each with its own weight, one of them diagnostic only."""
    return {
        "reconstruction_loss": losses_.ReconstructionLoss(0.5),
        "baseline_normalized_reconstruction_loss": losses_.BaselineNormalizedReconstructionLoss(0.5),
        "token_weighted_reconstruction_loss": losses_.TokenWeightedReconstructionLoss(1.0),
        "free_energy_loss": losses_.FreeEnergyLoss(1.0),
        "posterior_distillation_loss": losses_.PosteriorDistillationLoss(0.1),
        "kl_prior_loss": losses_.PriorKLLoss(0.0),
        "inter_latent_divergence_loss": losses_.InterLatentDivergenceLoss(0.3),
        "router_marginal_kl_to_prior_loss": losses_.RouterMarginalKLLoss(0.1),
        "aggregate_posterior_balance_loss": losses_.AggregatePosteriorBalanceLoss(1.0),
        "posterior_entropy_loss": losses_.PosteriorEntropyLoss(-0.01),
        "router_support_loss": losses_.RouterSupportLoss(0.1),
    }


def continuous_losses():
    """The same of a Gaussian latent, and its own."""
    terms = {name: loss for name, loss in all_losses().items() if name != "router_support_loss"}
    return terms | {"posterior_variance_loss": losses_.PosteriorVarianceLoss(0.1)}


class TinyData(LightningDataModule):
    """The contract of the data modules, over a handful of records."""

    strategy_names = ("first", "second")
    task = None

    def __init__(self, records=RECORDS, batch_size=4):
        super().__init__()
        self.all, self.batch_size = list(records), batch_size

    def records(self, split):
        return self.all

    def train_texts(self):
        return ((r.x, r.y) for r in self.all)

    def alphabet(self):
        return set("0123456789;=")

    def fingerprint(self, split):
        return f"tiny-{split}"

    def alignment_ceiling(self, split):
        return None

    def _loader(self, shuffle=False):
        collate = self.trainer.lightning_module.template.collate
        return DataLoader(self.all, batch_size=self.batch_size, collate_fn=collate, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Alone:
    """What seeding and the step read of a trainer of one process."""

    is_global_zero = True
    progress_bar_callback = None
    strategy = SimpleNamespace(broadcast=lambda value: value)

    def __init__(self, records=RECORDS, global_step=0):
        self.datamodule, self.global_step = TinyData(records), global_step


def start(model, *args):
    """Seed a model that no Trainer trains; return whether there are seeds."""
    model._trainer = Alone(*args)
    model.train()
    model.on_train_start()
    return bool(model.seeded)


def kept_for_backward(function):
    """Return the bytes of the storages that a function keeps for its backward pass, and its result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storages.values()), result
