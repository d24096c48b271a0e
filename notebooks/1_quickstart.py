# %% [markdown]
# # 1. From an entangled model to a latent that chooses the strategy
#
# A language model that has learned to sort by three algorithms mixes them: ask it, and it picks one by chance. This
# notebook trains such a model (half a minute), post-trains it into a router p(z|x), a generator p(y|x,z) and a
# posterior q(z|x,y) (another half), and looks at what came of it. No label of an algorithm is used in training.
#
# `make quickstart` does the same from the command line, with four algorithms and a larger model.

# %%
import logging
import warnings
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch

from cvae_lightning import EntangledLM, SharedDiscreteCVAE, losses
from cvae_lightning.callbacks import StrategyEvaluation
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import SortingAlgorithms
from cvae_lightning.metrics import StrategyAlignment

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")
torch.set_num_threads(1)  # the models are so small that more threads only wait for each other

# %% [markdown]
# ## The data
# x is a list of digits, y the list after every pass of an algorithm and then the answer. Two algorithms may write the
# same y for some x, so that even a perfect latent agrees with the labels only up to a *ceiling*, which the task knows.

# %%
task = SortingAlgorithms(length=4, strategies=["bubble", "selection", "merge"])
data = SyntheticDataModule(task, train_size=100_000, val_size=256, test_size=256, batch_size=64, eval_batch_size=128)
for record in data.records("val")[:6]:
    print(f"{record.x}  ->  {record.y:25}  {task.strategies[record.strategy]}")
ceiling = data.ceiling("val").one_to_one
print(f"ceiling of alignment: {ceiling:.3f}")

# %% [markdown]
# ## The entangled model p(y|x)
# Yours would be a model that you have. This one is a Llama of two layers, from scratch. `fit` leaves an ordinary
# Hugging Face folder behind, and beside it what the model costs per token (`baseline.json`): the yardstick of all that
# follows.

# %%
folder = Path("runs/notebooks/entangled")
quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
L.seed_everything(1)
if not (folder / "baseline.json").exists():
    config = {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": True} | shape
    entangled = EntangledLM(str(folder), config=config, learning_rate=4e-3, warmup_steps=50)
    L.Trainer(max_steps=700, limit_val_batches=0, **quiet).fit(entangled, datamodule=data)
print((folder / "baseline.json").read_text())

# %% [markdown]
# ## Post-training
# Every solution is scored under all three latents at once, and three terms are enough:
#
# * `FreeEnergyLoss` with the exact posterior at temperature 0.3 pays for latents that tell solutions apart,
# * `AggregatePosteriorBalanceLoss` makes the data use all of them,
# * `PosteriorDistillationLoss` teaches a posterior network, for inference without enumeration.
#
# `norm_dim` lets the latent reach every normalisation layer, so that latent k does the same for *every* x.

# %%
model = SharedDiscreteCVAE(
    str(folder),
    losses={
        "free_energy_loss": losses.FreeEnergyLoss(1.0),
        "aggregate_posterior_balance_loss": losses.AggregatePosteriorBalanceLoss(1.0),
        "posterior_distillation_loss": losses.PosteriorDistillationLoss(0.1),
    },
    num_latents=3,
    posterior="exact",
    posterior_temperature=0.3,
    norm_dim=16,
    learning_rate=3e-3,
)


class History(L.Callback):
    """Keeps what every validation logged."""

    rows: list = []

    def on_validation_end(self, trainer, pl_module):
        self.rows.append({"step": trainer.global_step} | {k: float(v) for k, v in trainer.callback_metrics.items()})


history = History()
callbacks = [StrategyEvaluation(num_examples=48), history]
trainer = L.Trainer(max_steps=200, val_check_interval=40, check_val_every_n_epoch=None, callbacks=callbacks, **quiet)
trainer.fit(model, datamodule=data)

# %%
keys = {
    "val/alignment/one_to_one": "posterior's latent agrees with the strategy",
    "val/controlled/alignment_one_to_one": "forced latent causes the strategy",
    "val/controlled/final_answer_accuracy": "right answers, every latent forced",
    "val/rho_recon": "rho_recon: 1 = z carries nothing",
}
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for key, label in keys.items():
    axes.plot([row["step"] for row in history.rows], [row[key] for row in history.rows], marker="o", label=label)
axes.axhline(ceiling, color="0.5", linestyle=":", label="ceiling of alignment")
axes.set(xlabel="optimizer step", ylim=(0, 1.3))
_ = axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
# %% [markdown]
# ## What each latent does
# The same x under every latent, then the algorithm that writes exactly this.

# %%
xs = [record.x for record in data.records("test")[:3]]
for x, row in zip(xs, model.generate(xs, "all"), strict=True):
    for k, y in enumerate(row):
        names = ", ".join(sorted(task.compatible_strategies(x, y))) or "none of them"
        print(f"{x}  z{k}  {y:25} {names}")

# %% [markdown]
# And the other way round: which latent does a given solution belong to? `infer` gives log q(z|x,y). Labels come in only
# here, to count how latents and algorithms go together.

# %%
records = data.records("test")[:256]
log_q = model.infer([r.x for r in records], [r.y for r in records])
alignment = StrategyAlignment(3, 3)
alignment.update(log_q.argmax(-1), torch.tensor([r.strategy for r in records]))
figure, axes = alignment.plot(strategy_names=task.strategies)
axes.set_xticks(range(3), task.strategies)
figure

# %%
agreement = float(alignment.compute()["one_to_one"])
print(f"one-to-one alignment {agreement:.3f}, ceiling of the test split {data.ceiling('test').one_to_one:.3f}")

# %% [markdown]
# ## Was anything lost?
# The NLL of the whole mixture, sum_z p(z|x) p(y|x,z), beside that of the entangled model on the same tokens. Below it
# here: post-training goes on where the short training of the entangled model stopped. `route` is p(z|x): about a third
# each, as in the data.

# %%
last = history.rows[-1]
print(f"NLL, nats per token: {last['val/marginal_nll']:.4f}, entangled model {last['val/baseline_nll']:.4f}")
for x, probs in zip(xs, model.route(xs).exp().tolist(), strict=True):
    print(f"p(z|{x}) =", ", ".join(f"{p:.2f}" for p in probs))

# %% [markdown]
# ## Where to go from here
# * `SharedDiscreteCVAE.load_from_checkpoint("runs/quickstart/discrete/checkpoints/last.ckpt")`, the result of
#   `make quickstart`, is used like `model` above; `tensorboard --logdir runs/quickstart` shows its curves, pictures and
#   generations.
# * [2_your_own.py](2_your_own.py): your own loss and your own step.
# * [3_collapsed_run.py](3_collapsed_run.py): what it looks like when the latent is ignored, and what to do.
