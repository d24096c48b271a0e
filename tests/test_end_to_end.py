"""The public commands on a tiny model, in this process: fit, test and predict, with a user's own loss."""

import json
import math
import sys

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CONFIGS

from cvae_lightning import cli

MY_TERMS = '''\
"""A user's own loss and a user's own module, in a file of their own."""
from cvae_lightning import LossCallback, SharedDiscreteCVAE

class Collision(LossCallback):
    """Probability that two draws of z agree."""

    def __init__(self, weight: float = 1.0, power: int = 2) -> None:
        super().__init__(weight)
        self.power = power

    def forward(self, outputs):
        return outputs.router_log_probs.exp().pow(self.power).sum(-1)

    def diagnostics(self, outputs):
        return {"largest_prior": outputs.router_log_probs.exp().amax(-1).mean()}

class FlatRouter(SharedDiscreteCVAE):
    """A router that prefers nothing."""

    def router(self, branches):
        return (0 * super().router(branches)).log_softmax(-1)
'''
TRAINER = {
    "max_steps": 4,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
DATA = {
    "class_path": "cvae_lightning.data.SyntheticDataModule",
    "init_args": {
        "task": {"class_path": "cvae_lightning.data.tasks.MultidigitAddition"},
        "train_size": 32,
        "val_size": 6,
        "test_size": 5,
        "batch_size": 4,
        "eval_batch_size": 4,
    },
}
ENTANGLED = {
    "trainer": TRAINER | {"default_root_dir": "runs/entangled"},
    "model": {
        "class_path": "cvae_lightning.EntangledLM",
        "init_args": {"output_dir": "artifact", "config": CONFIGS["llama"] | {"max_position_embeddings": 256}},
    },
    "data": DATA,
}
TERMS = {
    "reconstruction_loss": ("ReconstructionLoss", 0.0),
    "baseline_normalized_reconstruction_loss": ("BaselineNormalizedReconstructionLoss", 0.0),
    "token_weighted_reconstruction_loss": ("TokenWeightedReconstructionLoss", 0.5),
    "free_energy_loss": ("FreeEnergyLoss", 1.0),
    "kl_prior_loss": ("PriorKLLoss", 0.1),
    "inter_latent_divergence_loss": ("InterLatentDivergenceLoss", 0.1),
    "router_marginal_kl_to_prior_loss": ("RouterMarginalKLLoss", 0.1),
    "posterior_entropy_loss": ("PosteriorEntropyLoss", 0.0),
    "router_support_loss": ("RouterSupportLoss", 0.0),
    "aggregate_posterior_balance_loss": ("AggregatePosteriorBalanceLoss", 1.0),
    "posterior_distillation_loss": ("PosteriorDistillationLoss", 0.1),
}
DISCRETE = {
    "trainer": TRAINER
    | {
        "default_root_dir": "runs/discrete",
        "callbacks": [
            {"class_path": "cvae_lightning.callbacks.StrategyEvaluation", "init_args": {"num_examples": 3}},
            {"class_path": "cvae_lightning.callbacks.TensorBoardFigures"},
            {"class_path": "cvae_lightning.callbacks.Report"},
        ],
    },
    "checkpoint": {"every_n_train_steps": 2, "save_top_k": -1},
    "model": {
        "class_path": "cvae_lightning.SharedDiscreteCVAE",
        "init_args": {
            "entangled": "artifact",
            "num_latents": 3,
            "losses": {
                name: {"class_path": f"cvae_lightning.losses.{cls}", "init_args": {"weight": weight}}
                for name, (cls, weight) in TERMS.items()
            },
        },
    },
    "data": DATA,
}
MORE = {
    "trainer": {
        "callbacks+": [
            {
                "class_path": "cvae_lightning.callbacks.WeightSchedule",
                "init_args": {"loss": "collision_loss", "start": 0.0, "end": 1.0, "duration": 4},
            }
        ]
    },
    "model": {
        "losses": {
            "collision_loss": {"class_path": "my_terms.Collision", "init_args": {"power": 3}},
            "posterior_entropy_loss": {"weight": -0.25},
            "router_support_loss": None,
        }
    },
}
CHECKPOINT = "runs/discrete/checkpoints/last.ckpt"
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty.*", "ignore:The dirpath has changed")


def run(command, *words):
    assert cli.main([command, *words]) == 0


def scalars(folder):
    """Return the scalars in the event files of a folder: {key: {step: value}}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return {key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]}


def last(values):
    """Return the value of the last step."""
    return values[max(values)]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The user's folder, after fit, fit, test and predict."""
    folder = tmp_path_factory.mktemp("end_to_end")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        (folder / "my_terms.py").write_text(MY_TERMS)
        for name, content in (("entangled", ENTANGLED), ("discrete", DISCRETE), ("more", MORE)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        run("fit", "--config", "entangled.yaml")
        both = ["--config", "discrete.yaml", "--config", "more.yaml"]
        run("fit", *both, "--model.init_args.losses.kl_prior_loss.init_args.weight", "0.3")
        run("test", *both, "--ckpt_path", CHECKPOINT)
        run("predict", *both, "--ckpt_path", CHECKPOINT)
        yield folder


def test_entangled_model_leaves_an_artifact(here):
    assert {"model.safetensors", "config.json", "tokenizer.json", "baseline.json"} <= {
        path.name for path in (here / "artifact").iterdir()
    }
    baseline = json.loads((here / "artifact/baseline.json").read_text())
    assert baseline["c_base"] == pytest.approx(last(scalars(here / "runs/entangled")["val/baseline_nll"]))


def test_configs_merge_by_name_and_options_win(here):
    config = yaml.safe_load((here / "runs/discrete/config.yaml").read_text())
    losses = config["model"]["init_args"]["losses"]
    assert losses.keys() == {*TERMS, "collision_loss"}
    assert losses["kl_prior_loss"]["init_args"]["weight"] == 0.3
    assert losses["posterior_entropy_loss"]["init_args"]["weight"] == -0.25
    assert losses["router_support_loss"] is None
    assert losses["collision_loss"]["init_args"] == {"weight": 1.0, "power": 3}
    assert len(config["trainer"]["callbacks"]) == 4


def test_tensorboard_holds_every_key(here):
    found = scalars(here / "runs/discrete")
    names = [*(TERMS.keys() - {"router_support_loss"}), "collision_loss"]
    expected = {f"{stage}/{name}" for stage in ("train", "val", "test") for name in names}
    expected |= {f"{stage}/loss_contrib/fraction_abs/{name}" for stage in ("train", "val", "test") for name in names}
    expected |= {f"train/weight/{name}" for name in names} | {"train/loss"}
    keys = "loss elbo marginal_nll baseline_nll rho_recon diagnostics/inter_latent_jsd/weighted_mean"
    keys += " diagnostics/posterior_entropy diagnostics/router_entropy diagnostics/latent_usage_perplexity"
    keys += " alignment/one_to_one alignment/ami alignment/nmi alignment/homogeneity"
    keys += " controlled/alignment_one_to_one controlled/local_strategy_coverage_mean"
    keys += " controlled/local_strategy_full_coverage_rate controlled/final_answer_accuracy"
    keys += " sampled/final_answer_accuracy diagnostics/largest_prior"
    expected |= {f"{stage}/{key}" for stage in ("val", "test") for key in keys.split()}
    assert expected <= found.keys(), sorted(expected - found.keys())
    assert all(math.isfinite(value) for key in expected for value in found[key].values())
    assert not any("router_support_loss" in key for key in found)
    shares = [last(found[f"val/loss_contrib/fraction_abs/{name}"]) for name in names]
    assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_tensorboard_holds_pictures_texts_and_hyperparameters(here):
    events = EventAccumulator(str(here / "runs/discrete"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    pictures = {"alignment_posterior", "alignment_controlled", "latent_usage", "token_strip", "loss_contributions"}
    assert {f"val/figures/{name}" for name in pictures} <= {*tags["images"]}
    assert {"val/generations/controlled/text_summary", "val/generations/sampled/text_summary"} <= {*tags["tensors"]}
    assert "custom_scalars__config__" in tags["tensors"]


def test_weights_in_the_log_are_those_of_the_option_and_of_the_schedule(here):
    found = scalars(here / "runs/discrete")
    assert list(found["train/weight/kl_prior_loss"].values()) == pytest.approx([0.3] * 4)
    assert list(found["train/weight/collision_loss"].values()) == [0.0, 0.25, 0.5, 0.75]
    first, *rest = found["train/loss_contrib/fraction_abs/collision_loss"].values()
    assert first == 0
    assert min(rest) > 0
    assert all(0 < value <= 1 for value in found["train/collision_loss"].values())


def test_summary_holds_the_figures_of_the_test_split(here):
    summary = json.loads((here / "runs/discrete/summary.json").read_text())
    keys = "final_answer_accuracy alignment_one_to_one controlled_alignment_one_to_one alignment_ceiling rho_recon"
    numbers = {key: summary[key] for key in f"{keys} marginal_nll baseline_nll".split()}
    assert all(isinstance(value, float) for value in numbers.values()), numbers
    found = scalars(here / "runs/discrete")
    assert summary["rho_recon"] == pytest.approx(last(found["test/rho_recon"]), rel=1e-5)
    assert summary["alignment_one_to_one"] == pytest.approx(last(found["test/alignment/one_to_one"]), rel=1e-5)
    assert summary["marginal_nll"] == pytest.approx(last(found["test/marginal_nll"]), rel=1e-5)
    assert summary["baseline_nll"] == pytest.approx(last(found["test/baseline_nll"]), rel=1e-5)


def test_predict_writes_one_row_per_record(here):
    rows = [json.loads(line) for line in (here / "runs/discrete/predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5))
    for row in rows:
        assert row["z"] == max(range(3), key=row["router"].__getitem__)
        assert sum(row["router"]) == pytest.approx(1, abs=1e-4)
        assert isinstance(row["y"], str)


def test_config_beats_the_checkpoint(here):
    saved = torch.load(here / CHECKPOINT, weights_only=True)["hyper_parameters"]
    assert saved["losses"]["kl_prior_loss"]["init_args"]["weight"] == 0.3
    words = ["--config", "discrete.yaml", "--config", "more.yaml", "--ckpt_path", CHECKPOINT]
    words += ["--trainer.default_root_dir", "runs/longer", "--trainer.max_steps", "6"]
    run("fit", *words, "--model.losses.kl_prior_loss.weight", "0.0625", "--model.learning_rate", "0.5e-3")
    weights = scalars(here / "runs/longer")["train/weight/kl_prior_loss"]
    assert set(weights.values()) == {0.0625}
    saved = torch.load(here / "runs/longer/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert saved["hyper_parameters"]["learning_rate"] == 0.5e-3


def test_a_users_own_stage_is_one_method(here):
    words = ["--config", "discrete.yaml", "--model", "my_terms.FlatRouter", "--trainer.default_root_dir", "runs/flat"]
    run("fit", *words, "--trainer.max_steps", "2")
    found = scalars(here / "runs/flat")
    assert list(found["val/diagnostics/router_entropy"].values()) == [pytest.approx(math.log(3), rel=1e-5)]
    assert list(found["val/router_marginal_kl_to_prior_loss"].values()) == [pytest.approx(0, abs=1e-6)]
