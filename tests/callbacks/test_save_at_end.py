"""What is left in last.ckpt when a training ends between two checkpoints."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from cvae_lightning import cli

BASE = """\
trainer:
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: out
  logger: false
checkpoint: {every_n_train_steps: 3, dirpath: out/checkpoints}
model:
  class_path: cli_dummies.TinyModule
  init_args: {losses: {square: {class_path: cli_dummies.MeanSquare}}}
data: {class_path: cli_dummies.TinyData}
"""  # 4 batches an epoch
STOP = """\
from lightning.pytorch import Callback
class Stop(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= 5
"""
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty.*", "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("base.yaml").write_text(BASE)
    Path("stopping.py").write_text(STOP)
    return tmp_path


def fit(*words):
    assert cli.main(["fit", "--config", "base.yaml", *words]) == 0
    return torch.load("out/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["--trainer.max_steps", "5"], 5),
        (["--trainer.max_steps", "6"], 6),
        (["--trainer.max_steps", "2"], 2),
        (["--trainer.max_epochs", "2"], 8),
        (["--trainer.max_steps", "99", "--trainer.callbacks", "stopping.Stop"], 5),
        (["--trainer.max_steps", "5", "--checkpoint.save_last", "link"], 5),
    ],
)
def test_last_is_the_model_of_the_last_step(words, step, monkeypatch):
    seen = []
    from lightning.pytorch import Trainer

    whole = Trainer.fit

    def watched(self, model, **options):
        whole(self, model, **options)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(Trainer, "fit", watched)
    saved = fit(*words)
    assert saved["global_step"] == step
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in seen[0].items())


def test_a_training_that_has_ended_keeps_its_file():
    fit("--trainer.max_steps", "5")
    before = Path("out/checkpoints/last.ckpt").read_bytes()
    fit("--trainer.max_steps", "5", "--ckpt_path", "last")
    assert Path("out/checkpoints/last.ckpt").read_bytes() == before


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_more_steps_go_on_as_if_it_had_never_ended(steps):
    whole = fit("--trainer.max_steps", "11")
    shutil.rmtree("out")
    fit("--trainer.max_steps", str(steps))
    resumed = fit("--trainer.max_steps", "11", "--ckpt_path", "last")
    assert whole["global_step"] == resumed["global_step"] == 11
    for counts in ("epoch_progress", "epoch_loop.batch_progress"):
        assert whole["loops"]["fit_loop"][counts] == resumed["loops"]["fit_loop"][counts]


def test_a_stopped_training_goes_on():
    fit("--trainer.max_steps", "99", "--trainer.callbacks", "stopping.Stop")
    assert fit("--trainer.max_steps", "11", "--ckpt_path", "last")["global_step"] == 11


def test_no_file_is_written_where_none_is_asked_for():
    assert cli.main(["fit", "--config", "base.yaml", "--trainer.fast_dev_run", "true"]) == 0
    assert not list(Path("out").rglob("*.ckpt"))
    assert cli.main(["fit", "--config", "base.yaml", "--trainer.max_steps", "5", "--checkpoint.save_last", "null"]) == 0
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["epoch=0-step=3.ckpt"]
