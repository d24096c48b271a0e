"""ContinuousCVAE on two processes: validation of uneven shards, probes and clusters, and a few training steps."""

import json

import lightning as L
import pytest
import torch
from tiny import addition_artifact

from cvae_lightning import losses as losses_
from cvae_lightning.callbacks import ContinuousEvaluation
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import MultidigitAddition
from cvae_lightning.modules import ContinuousCVAE

pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*")

# Samples differ between processes; these keys read no sample of z.
EXACT = (
    "kl_prior_loss",
    "router_marginal_kl_to_prior_loss",
    "diagnostics/active_units",
    "diagnostics/posterior_std",
    "diagnostics/prior_kl",
    "router_marginal/mean_d0",
    "router_marginal/variance_d1",
    "probe/posterior_accuracy",
    "probe/floor",
    "alignment/one_to_one",
    "clusters/min_distance",
    "controlled/final_answer_accuracy",
    "controlled/mean_distance",
    "baseline_nll",
)


def data():
    return SyntheticDataModule(MultidigitAddition(), train_size=64, val_size=21, test_size=2, batch_size=4)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return addition_artifact(tmp_path_factory.mktemp("artifact"), c_base=2.0)


class Dump(L.Callback):
    """Writes the metrics of rank zero: nothing comes back from a forked process by itself."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            self.path.write_text(json.dumps({k: float(v) for k, v in trainer.callback_metrics.items()}))


def run(artifact, path, processes, method, **options):
    torch.manual_seed(3)
    chosen = {
        "free_energy_loss": losses_.FreeEnergyLoss(),
        "posterior_distillation_loss": losses_.PosteriorDistillationLoss(),
        "kl_prior_loss": losses_.PriorKLLoss(0.1),
        "router_marginal_kl_to_prior_loss": losses_.RouterMarginalKLLoss(),
    }
    model = ContinuousCVAE(artifact, chosen, latent_dim=2, num_eval_samples=2)
    torch.nn.init.normal_(model.router_head.weight, std=0.2)
    torch.nn.init.normal_(model.posterior_network.project.weight)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Dump(path), ContinuousEvaluation(num_examples=5, max_new_tokens=8)],
        **({"devices": processes, "strategy": "ddp_fork"} if processes > 1 else {"devices": 1}),
        **options,
    )
    getattr(trainer, method)(model, data())
    return json.loads(path.read_text())


def test_validation_of_uneven_shards_equals_one_process(artifact, tmp_path):
    one, two = (run(artifact, tmp_path / f"{n}.json", n, "validate") for n in (1, 2))
    assert one.keys() == two.keys()
    for key in EXACT:
        assert two[f"val/{key}"] == pytest.approx(one[f"val/{key}"], rel=1e-4, abs=1e-5), key


def test_two_processes_train(artifact, tmp_path):
    logged = run(artifact, tmp_path / "fit.json", 2, "fit", max_steps=3, val_check_interval=3)
    assert logged["train/loss"] == logged["train/loss"]
    assert logged["val/diagnostics/num_eval_samples"] == 4
