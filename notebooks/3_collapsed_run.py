# %% [markdown]
# # 3. Reading a run whose latent collapsed
#
# The entangled model predicts y well without z, so that the plain objective has no reason to use z. Nothing in the loss
# curve says so: it falls, the answers are right. This notebook trains the plain ELBO and this package's recipe from the
# same entangled model, and goes through the diagnostics that tell them apart.

# %%
import logging
import warnings
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch

from cvae_lightning import EntangledLM, SharedDiscreteCVAE, losses
from cvae_lightning.callbacks import CollapseAlarm, CollapseWarning, StrategyEvaluation
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import SortingAlgorithms

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
torch.set_num_threads(1)

# %% [markdown]
# The entangled model of the first notebook; trained here if that was not run.

# %%
task = SortingAlgorithms(length=4, strategies=["bubble", "selection", "merge"])
data = SyntheticDataModule(task, train_size=100_000, val_size=256, test_size=256, batch_size=64, eval_batch_size=128)
folder = Path("runs/notebooks/entangled")
quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
L.seed_everything(1)
if not (folder / "baseline.json").exists():
    config = {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": True} | shape
    entangled = EntangledLM(str(folder), config=config, learning_rate=4e-3, warmup_steps=50)
    L.Trainer(max_steps=700, limit_val_batches=0, **quiet).fit(entangled, datamodule=data)

# %% [markdown]
# ## Two runs
# `CollapseAlarm` reads every validation and warns once per cause; here its warnings are kept for later.


# %%
def train(terms, **options):
    """Train 120 steps; return the model, its last validation, and what the alarm said."""
    L.seed_everything(1)
    model = SharedDiscreteCVAE(str(folder), terms, num_latents=3, learning_rate=3e-3, **options)
    callbacks = [StrategyEvaluation(num_examples=48), CollapseAlarm()]
    steps = {"max_steps": 120, "val_check_interval": 60, "check_val_every_n_epoch": None}
    trainer = L.Trainer(callbacks=callbacks, **steps, **quiet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CollapseWarning)
        trainer.fit(model, datamodule=data)
    said = [str(w.message) for w in caught if w.category is CollapseWarning]
    return model, {k: float(v) for k, v in trainer.callback_metrics.items()}, said


elbo = {"reconstruction_loss": losses.ReconstructionLoss(1.0), "kl_prior_loss": losses.PriorKLLoss(0.1)}
collapsed, found_collapsed, said_collapsed = train(elbo, posterior="amortized")
recipe = {
    "free_energy_loss": losses.FreeEnergyLoss(1.0),
    "aggregate_posterior_balance_loss": losses.AggregatePosteriorBalanceLoss(1.0),
    "posterior_distillation_loss": losses.PosteriorDistillationLoss(0.1),
    "kl_prior_loss": losses.PriorKLLoss(0.0),
}
healthy, found_healthy, said_healthy = train(recipe, posterior="exact", norm_dim=16)

# %% [markdown]
# ## What does *not* tell
# The loss of a collapsed run falls, its answers are mostly right and get better, and its NLL is no worse than that of
# the entangled model: it *is* an entangled model, trained a little longer.
#
# ## What tells
# * `rho_recon`: cost of y under the posterior's latents, relative to the entangled model. 1: knowing z does not help.
# * `kl_prior_loss` (nats): 0 says that the posterior does not look at y. Large alone says nothing about *what* z holds.
# * `inter_latent_jsd` (nats per token): how far the latents disagree on the next token. 0: they all write the same.
# * `distinct_fraction`: share of different texts among those of the K latents for one x.
# * alignment needs labels; at chance it is about 1/K (a little above, since the best matching is chosen).

# %%
keys = {
    "val/controlled/final_answer_accuracy": "accuracy, latents forced",
    "val/marginal_nll_ratio": "NLL / entangled model",
    "val/rho_recon": "rho_recon",
    "val/kl_prior_loss": "KL(q | p), nats",
    "val/diagnostics/inter_latent_jsd/weighted_mean": "inter-latent JSD, nats",
    "val/controlled/distinct_fraction": "distinct outputs of the latents",
    "val/alignment/one_to_one": "alignment of the posterior",
    "val/controlled/alignment_one_to_one": "alignment of forced latents",
    "val/diagnostics/latent_usage_perplexity": "usage perplexity (of 3)",
}
print(f"{'':34}{'plain ELBO':>12}{'recipe':>12}")
for key, label in keys.items():
    print(f"{label:34}{found_collapsed[key]:12.3f}{found_healthy[key]:12.3f}")

# %% [markdown]
# Usage perplexity is near 3 in both: a posterior that ignores y and a router that is uniform *use* all latents. It is a
# test for dead latents, not for meaning.
#
# ## What the alarm says

# %%
for name, said in (("plain ELBO", said_collapsed), ("recipe", said_healthy)):
    print(f"{name}:", *said or ["nothing"], sep="\n  ")

# %% [markdown]
# ## Where along y the latents differ
# -log p(y_t | x, z, y_<t) of one solution under each latent, token by token. In the collapsed model the rows are equal.
# In the other one two latents pay where the algorithms part, and the third goes through for free.

# %%
record = next(r for r in data.records("test") if len(set(task.groups(r.x))) == 3)  # the algorithms differ here
batch = healthy.template.collate([record])
tokens = healthy.template.tokenizer.convert_ids_to_tokens(batch.y_ids[0].tolist())
figure, axes = plt.subplots(2, 1, figsize=(8.5, 3.6), layout="constrained", sharex=True)
for axis, model, name in zip(axes, (collapsed, healthy), ("plain ELBO", "recipe"), strict=True):
    with torch.no_grad():
        nll = model.eval().compute_outputs(batch, frozenset()).token_nll[0].numpy()  # [K, T]
    image = axis.imshow(nll, cmap="Purples", vmin=0, vmax=4, aspect="auto")
    axis.set_yticks(range(3), ["z0", "z1", "z2"])
    axis.set_title(f"{name}: {record.y} by {task.strategies[record.strategy]}", fontsize=9, loc="left")
axes[-1].set_xticks(range(len(tokens)), tokens, fontsize=8)
axes[-1].get_xticklabels()[-1].set_rotation(60)
_ = figure.colorbar(image, ax=axes, label="nats")
# %% [markdown]
# ## What the posterior believes
# q(z|x,y) of 24 solutions, sorted by their algorithm. Grey throughout: the posterior repeats the router.

# %%
records = sorted(data.records("test")[:24], key=lambda r: r.strategy)
figure, axes = plt.subplots(1, 2, figsize=(7, 4.6), layout="constrained", sharey=True)
for axis, model, name in zip(axes, (collapsed, healthy), ("plain ELBO", "recipe"), strict=True):
    q = model.infer([r.x for r in records], [r.y for r in records]).exp().numpy()
    image = axis.imshow(q, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(3), ["z0", "z1", "z2"])
    axis.set_title(name, fontsize=10)
axes[0].set_yticks(range(24), [task.strategies[r.strategy] for r in records], fontsize=7)
_ = figure.colorbar(image, ax=axes, label="q(z|x,y)")

# %% [markdown]
# ## What to do
# | what you see | cause | cure |
# |---|---|---|
# | rho_recon near 1, KL and JSD near 0 | the objective does not need z | `FreeEnergyLoss` with the exact posterior |
# | usage perplexity falls, dead latents | other latents were faster | `AggregatePosteriorBalanceLoss` |
# | rho_recon low, alignment between chance and ceiling | latents are permuted between inputs | `norm_dim`, `seeding` |
# | alignment of the posterior high, of forced latents low | the generator lags behind | train longer |
# | `alignment` high, `alignment_amortized` low | the posterior network lags behind | train longer, or enumerate |
# | rho_recon low, alignment low | z holds something other than your labels | read the generations of each latent |
