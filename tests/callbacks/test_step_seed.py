import random

import numpy as np
import pytest
import torch
from cli_dummies import MeanSquare, TinyData, TinyModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cvae_lightning.callbacks.step_seed import StepSeed, batch_seed


class Draws(Callback):
    """Records one number of each generator per training batch, and wastes random numbers at validation."""

    def __init__(self, waste=0):
        self.waste = waste
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        key = (trainer.current_epoch, batch_idx)
        self.seen[key] = (torch.rand(1).item(), float(np.random.rand()), random.random())

    def on_validation_batch_start(self, *args):
        torch.rand(self.waste)


def fit(tmp_path, seed=1, waste=0, max_steps=8, ckpt_path=None, checkpoint=False):
    torch.manual_seed(0)
    module, draws = TinyModule({"square": MeanSquare()}), Draws(waste)
    callbacks = [StepSeed(seed), draws]
    if checkpoint:
        callbacks.append(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoint,
        num_sanity_val_steps=waste,
        callbacks=callbacks,
    )
    trainer.fit(module, TinyData(), ckpt_path=ckpt_path)
    return module, draws.seen


def test_draws_differ_between_batches_and_repeat_between_runs(tmp_path):
    _, first = fit(tmp_path)
    _, second = fit(tmp_path)
    assert len(first) == 8
    assert first == second
    assert all(len({draws[i] for draws in first.values()}) == 8 for i in range(3))
    assert first != fit(tmp_path, seed=2)[1]


def test_validation_cannot_disturb_training(tmp_path):
    assert fit(tmp_path, waste=0)[1] == fit(tmp_path, waste=5)[1]


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole, seen = fit(tmp_path, checkpoint=True)
    resumed, tail = fit(tmp_path, ckpt_path=tmp_path / "step=4.ckpt", checkpoint=True)
    assert tail == {key: seen[key] for key in seen if key[0] == 1}
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_seed_comes_from_seed_everything_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert fit(tmp_path, seed=None)[1] == fit(tmp_path, seed=7)[1]
    assert fit(tmp_path, seed=None)[1] != fit(tmp_path, seed=8)[1]


@pytest.mark.parametrize("position", range(4))
def test_seed_depends_on_each_argument_and_fits_int64(position):
    base = [3, 1, 2, 0]
    other = list(base)
    other[position] += 1
    assert batch_seed(*base) != batch_seed(*other)
    assert 0 <= batch_seed(*base) < 2**63
