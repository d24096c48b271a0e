"""Runs that go wrong after they have begun: one clear message, and only whole files are left."""

import re

import pytest
import torch
import yaml
from tiny import CONFIGS
from user_folder import ROWS, enter_user_folder, failure, write_rows

from cvae_lightning import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore:.*are in train_path too.*")


@pytest.fixture
def here(tmp_path, monkeypatch):
    return enter_user_folder(tmp_path, monkeypatch)


def trained():
    """Train a model for a step, and return its checkpoint."""
    assert cli.main(["fit", "--config", "run.yaml", "--trainer.max_steps", "1"]) == 0
    return "out/checkpoints/last.ckpt"


def test_report_that_cannot_be_written(here, capfd):
    callbacks = "{trainer: {callbacks: [{class_path: Report, init_args: {path: file/summary.json}}]}}"
    checkpoint = ["--ckpt_path", trained()]
    message = failure(capfd, "test", "--config", "run.yaml", "--config", callbacks, *checkpoint)
    assert re.search(r"file", message), message


def test_split_that_is_not_there(here, capfd):
    message = failure(capfd, "test", "--config", "run.yaml", "--data.test_path", "null", "--ckpt_path", trained())
    assert re.search(r"test_path", message), message


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_model_that_was_not_trained_is_not_evaluated(here, capfd, command):
    (here / "out").mkdir()
    (here / "out/summary.json").write_text("of the trained model")
    for words, given in (([], "null"), (["--ckpt_path", "last"], "last")):
        message = failure(capfd, command, "--config", "run.yaml", *words)
        assert message == (
            f"{command} would use a SharedDiscreteCVAE that has not been trained: expected a checkpoint, got "
            f"--ckpt_path {given}; give --ckpt_path out/checkpoints/last.ckpt, once `fit` has written it"
        )
    assert "EntangledLM that has not been trained" in failure(capfd, command, "--config", "base.yaml")
    trained()
    assert failure(capfd, command, "--config", "run.yaml").endswith("give --ckpt_path out/checkpoints/last.ckpt")
    assert (here / "out/summary.json").read_text() == "of the trained model"
    assert cli.main([command, "--config", "run.yaml", "--ckpt_path", "last"]) == 0


def test_records_longer_than_the_positions_of_the_model(here, capfd):
    write_rows(here / "train.jsonl", [{"x": "1" * 90, "y": "2", "s": "a"}] * 12 + ROWS)
    config = yaml.safe_dump({"model": {"init_args": {"config": CONFIGS["gpt2"]}}})
    (here / "gpt2.yaml").write_text(config)
    message = failure(capfd, "fit", "--config", "base.yaml", "--config", "gpt2.yaml")
    assert re.search(r"begins with '1+' takes 100 tokens, more than the model's 64 positions: set", message), message


def test_nan_stops_the_run_and_names_term_and_step(here, capfd):
    words = ["--model.init_args.losses.sick_loss", "sick_terms.Sick", "--trainer.limit_val_batches", "0"]
    message = failure(capfd, "fit", "--config", "run.yaml", *words)
    assert re.search(r"nan at optimizer step 3 .*not finite: sick_loss = nan", message), message
    left = sorted(path.name for path in (here / "out/checkpoints").iterdir())
    assert "last.ckpt" in left
    for name in left:  # those of the healthy steps, whole
        saved = torch.load(here / "out/checkpoints" / name, weights_only=True)
        assert saved["global_step"] <= 3
        assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_checkpoint_of_another_model(here, capfd):
    words = ["--ckpt_path", trained(), "--model.init_args.num_latents", "3"]
    message = failure(capfd, "validate", "--config", "run.yaml", *words)
    assert re.search(
        r"checkpoint does not fit the model .*size mismatch for \S+\.weight: .*\(and \d+ more\)$", message
    ), message


def test_a_terminated_run_is_no_success(here):
    (here / "terminated.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\nclass Terminate(Callback):\n"
        "    def on_train_batch_end(self, *args):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    words = ["--config", "{trainer: {callbacks: [{class_path: terminated.Terminate}]}}"]
    assert cli.main(["fit", "--config", "run.yaml", *words]) == 143
