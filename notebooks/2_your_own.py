# %% [markdown]
# # 2. Your own loss, and your own step
#
# A loss is one class; a changed step is one method. Nothing in the package has to change, and both get what every term
# has: a weight, a log key, a share of the objective, a schedule.

# %%
import logging
import math
import warnings
from pathlib import Path

import lightning as L
import matplotlib.pyplot as plt
import torch

from cvae_lightning import EntangledLM, LossCallback, SharedDiscreteCVAE, losses
from cvae_lightning.callbacks import WeightSchedule
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
# ## Your own loss
# `forward` takes the outputs of a step (`DiscreteOutputs` documents every field and its shape) and returns the
# *unweighted* term, one number for each record; mean, weight and logging are done outside. `diagnostics` is optional.
#
# This one is minimal where the router is sure: the negative probability that two draws of z for the same x agree.


# %%
class RouterConfidence(LossCallback):
    """Purity of the router, negated: between -1 (one latent for each x) and -1/K (all alike)."""

    def forward(self, outputs):
        return -outputs.router_log_probs.exp().square().sum(-1)  # [B]

    def diagnostics(self, outputs):
        return {"router_largest": outputs.router_log_probs.exp().amax(-1).mean()}


# %% [markdown]
# It stands beside the others, under a name of your choice, and its weight grows over the first half of the run.


# %%
class History(L.Callback):
    """Keeps what was logged after every step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


def terms():
    return {
        "free_energy_loss": losses.FreeEnergyLoss(1.0),
        "aggregate_posterior_balance_loss": losses.AggregatePosteriorBalanceLoss(1.0),
    }


options = {"num_latents": 3, "norm_dim": 16, "learning_rate": 3e-3}
L.seed_everything(1)
model = SharedDiscreteCVAE(str(folder), terms() | {"router_confidence": RouterConfidence(1.0)}, **options)
history = History()
schedule = WeightSchedule("router_confidence", kind="linear", start=0.0, end=2.0, duration=0.5)
L.Trainer(max_steps=40, limit_val_batches=0, callbacks=[schedule, history], **quiet).fit(model, datamodule=data)

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for key in ("train/weight/router_confidence", "train/router_confidence", "train/diagnostics/router_largest"):
    axes.plot([row[key] for row in history.rows], label=key)
share = "train/loss_contrib/fraction_abs/router_confidence"
axes.plot([row[share] for row in history.rows], label="its share of the objective", linestyle="--")
axes.axhline(1 / 3, color="0.5", linestyle=":", label="1/K")
axes.set(xlabel="optimizer step")
_ = axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
# %% [markdown]
# The router became sure of itself, as the term asks. Whether this is *true* is another matter: here every algorithm is
# equally frequent for every x, so that a router that is sure is wrong, and the evidence pays for it.

# %%
records = data.records("val")[:128]
xs, ys = [r.x for r in records], [r.y for r in records]
L.seed_everything(1)
plain = SharedDiscreteCVAE(str(folder), terms(), **options)
L.Trainer(max_steps=40, limit_val_batches=0, **quiet).fit(plain, datamodule=data)
for name, one in (("with the term", model), ("without", plain)):
    router = one.route(xs).exp().amax(-1).mean()
    print(
        f"{name:14} largest p(z|x) {router:.2f}, log-evidence {one.log_evidence(xs, ys).mean():.2f} nats per solution"
    )

# %% [markdown]
# The same in YAML, with the class in a file `my_losses.py` in the folder you start from:
#
# ```yaml
# # cvae-lightning fit --config discrete_sorting_algorithms --config my.yaml
# trainer:
#   callbacks+:
#     - class_path: cvae_lightning.callbacks.WeightSchedule
#       init_args: {loss: router_confidence, kind: linear, start: 0.0, end: 2.0, duration: 0.5}
# model:
#   init_args:
#     losses:
#       router_confidence: {class_path: my_losses.RouterConfidence, init_args: {weight: 2.0}}
# ```
#
# ## Your own step
# The step of `SharedDiscreteCVAE` is a line of stages in the order of the mathematics: `encode`, `router`, `generator`,
# `amortized_posterior`, `posterior`, `objective`. Override one. This model knows that p(z|x) is uniform:


# %%
class UniformRouter(SharedDiscreteCVAE):
    """A router that prefers nothing."""

    def router(self, branches):  # [B, K] log-probabilities
        return (0 * super().router(branches)).log_softmax(-1)


# %%
L.seed_everything(1)
uniform = UniformRouter(str(folder), terms(), **options)
L.Trainer(max_steps=40, limit_val_batches=0, **quiet).fit(uniform, datamodule=data)
log_p = uniform.route(xs)
entropy = -(log_p.exp() * log_p).sum(-1).mean()
print(f"router entropy {entropy:.4f}, log K {math.log(3):.4f}")
print(f"log-evidence {uniform.log_evidence(xs, ys).mean():.2f} nats per solution")

# %% [markdown]
# Every use of the model goes through the same stages, so that `route`, `infer`, `generate` and `log_evidence` follow.
# From the command line: `--model my_models.UniformRouter`.
