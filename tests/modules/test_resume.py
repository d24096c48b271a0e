"""Runs of the command line that are killed (SIGKILL) and resumed: bit for bit the run that was never stopped."""

import json
import shutil
import signal

import pytest
import torch
import yaml
from forked_commands import end_state, exit_code, same, start
from tiny import ADDITION_LM, addition_artifact

OBSERVER = '''\
"""A user's own callbacks: one dies where it is told to, one keeps the metrics of every validation."""
import json, os, signal
from lightning.pytorch import Callback

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Observer(Callback):
    def __init__(self):
        self.hook, _, when = os.environ.get("DIE", "").partition(":")
        self.when = int(when or -1)

    def on_fit_start(self, trainer, pl_module):
        if self.hook == "write":  # the temporary file is written, but has not taken its name yet
            sync, calls = os.fsync, []
            def fsync(descriptor):
                calls.append(0)
                die() if len(calls) == self.when else sync(descriptor)
            os.fsync = fsync

    def on_before_backward(self, trainer, pl_module, loss):
        if self.hook == "backward" and trainer.global_step == self.when:
            die()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.hook == "batch" and trainer.fit_loop.epoch_loop.total_batch_idx == self.when:
            die()

    def on_validation_batch_end(self, trainer, *args):
        if self.hook == "validation" and trainer.global_step >= self.when:
            die()

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        with open(os.path.join(trainer.default_root_dir, "seen.jsonl"), "a") as file:
            file.write(json.dumps([trainer.global_step, metrics]) + "\\n")
'''

# 5 batches an epoch, two per optimizer step: steps straddle validations and epochs end in the middle of accumulation.
TRAINER = {
    "max_steps": 6,
    "accumulate_grad_batches": 2,
    "val_check_interval": 4,
    "check_val_every_n_epoch": None,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
}
DATA = {
    "class_path": "cvae_lightning.data.SyntheticDataModule",
    "init_args": {
        "task": {"class_path": "cvae_lightning.data.tasks.MultidigitAddition"},
        "train_size": 22,
        "val_size": 6,
        "batch_size": 4,
        "eval_batch_size": 4,
    },
}
LM = ADDITION_LM | {"attention_dropout": 0.2}


def losses():
    package = "cvae_lightning.losses"
    return {
        "free_energy_loss": {"class_path": f"{package}.FreeEnergyLoss"},
        "aggregate_posterior_balance_loss": {"class_path": f"{package}.AggregatePosteriorBalanceLoss"},
        "posterior_distillation_loss": {"class_path": f"{package}.PosteriorDistillationLoss"},
        "token_weighted_reconstruction_loss": {"class_path": f"{package}.TokenWeightedReconstructionLoss"},
        "kl_prior_loss": {"class_path": f"{package}.PriorKLLoss", "init_args": {"weight": 0.0}},
    }


def callbacks(discrete):
    package = "cvae_lightning.callbacks"
    checkpoints = {"dirpath": "every_validation", "monitor": "val/baseline_nll", "save_top_k": -1}
    chosen = [
        {"class_path": "observer.Observer"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
        {"class_path": f"{package}.StrategyEvaluation", "init_args": {"num_examples": 2, "max_new_tokens": 4}},
    ]
    schedules = [
        {"loss": "kl_prior_loss", "kind": "linear", "end": 0.5, "duration": 0.9},
        {"attribute": "posterior_temperature", "kind": "cosine", "start": 1.0, "end": 0.3, "duration": 4},
        {"loss": "aggregate_posterior_balance_loss", "kind": "cyclic", "cycles": 2, "begin": 1},
    ]
    if discrete:
        chosen += [{"class_path": f"{package}.WeightSchedule", "init_args": schedule} for schedule in schedules]
    return chosen


MODELS = {
    "entangled": {
        "class_path": "cvae_lightning.EntangledLM",
        "init_args": {"output_dir": "artifact", "config": LM, "warmup_steps": 3},
    },
    "discrete": {
        "class_path": "cvae_lightning.SharedDiscreteCVAE",
        "init_args": {
            "entangled": "../artifact",
            "num_latents": 3,
            "dropout": 0.2,
            "warmup_steps": 3,
            "losses": losses(),
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder: an artifact, an own callback, and a config per model."""
    here = tmp_path_factory.mktemp("resume")
    (here / "observer.py").write_text(OBSERVER)
    addition_artifact(here / "artifact", LM)
    for name, model in MODELS.items():
        config = {
            "seed_everything": 1,
            "trainer": TRAINER | {"default_root_dir": ".", "callbacks": callbacks(name == "discrete")},
            "checkpoint": {"dirpath": "every_step", "every_n_train_steps": 1, "save_top_k": -1},
            "model": model,
            "data": DATA,
        }
        (here / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return here


def run(here, name, folder, *words, die=""):
    """Fit in a process of its own, in ``folder`` below ``here``, and return its exit code (negative: the signal)."""
    return exit_code(start(here / folder, ["fit", "--config", f"../{name}.yaml", *words], DIE=die), 60)


def finish(here, name, folder, checkpoint=None):
    words = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
    code = run(here, name, folder, *words)
    assert code == 0, (here / folder / "log.txt").read_text()


def end_of(folder):
    """Return everything that the last checkpoint says about weights, optimizer and schedule."""
    return end_state(folder / "every_step/last.ckpt")


def validations(folder):
    """Return the metrics by step; steps that were validated again, after a resume, must have come out the same."""
    seen = {}
    for line in (folder / "seen.jsonl").read_text().splitlines():
        step, metrics = json.loads(line)
        assert same(seen.setdefault(step, metrics), metrics), step
    return seen


@pytest.fixture(scope="module", params=MODELS)
def whole(request, folder):
    """The run that is never stopped: (name, its folder)."""
    finish(folder, request.param, f"{request.param}-whole")
    return request.param, folder / f"{request.param}-whole"


def test_killed_again_and_again(whole, folder):
    name, reference = whole
    here = folder / f"{name}-killed"
    last = here / "every_step/last.ckpt"
    for die in ("backward:0", "batch:3", "write:2", "validation:3", "backward:5"):
        words = ["--ckpt_path", str(last)] if last.exists() else []
        assert run(folder, name, here.name, *words, die=die) == -signal.SIGKILL, (here / "log.txt").read_text()
        if last.exists():
            torch.load(last, weights_only=True)  # never torn
        if name == "entangled":
            assert not (here / "artifact/baseline.json").exists()
    finish(folder, name, here.name, last)
    assert end_of(reference)["global_step"] == 6
    assert same(end_of(reference), end_of(here))
    expected = validations(reference)
    assert len(expected) == 2
    assert all(same(expected[step], metrics) for step, metrics in validations(here).items())
    if name == "entangled":
        found, wanted = (json.loads((f / "artifact/baseline.json").read_text()) for f in (here, reference))
        assert found["c_base"] == wanted["c_base"]


def test_resume_from_every_checkpoint_file(whole, folder):
    name, reference = whole
    expected, metrics = end_of(reference), validations(reference)
    files = sorted([*reference.glob("every_step/*.ckpt"), *reference.glob("every_validation/*.ckpt")])
    assert len(files) >= 9
    for number, file in enumerate(files):
        here = folder / f"{name}-{number}"
        if (reference / "baseline_cache").exists():  # goes along with the checkpoint
            shutil.copytree(reference / "baseline_cache", here / "baseline_cache")
        finish(folder, name, here.name, file)
        steps_left = 6 - torch.load(file, weights_only=True)["global_step"]
        if steps_left:
            assert same(expected, end_of(here)), file
        if (here / "seen.jsonl").exists():
            assert all(same(metrics[step], found) for step, found in validations(here).items()), file
        shutil.rmtree(here)
