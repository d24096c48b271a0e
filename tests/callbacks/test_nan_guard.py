import pytest
import torch
from cli_dummies import MeanAbs, MeanSquare, TinyData, TinyModule
from lightning.pytorch import Trainer

from cvae_lightning.callbacks.nan_guard import NanGuard, NonFiniteLossError


class NanOnOneRank(TinyModule):
    """Its loss is NaN on rank 1 alone."""

    def on_fit_start(self):
        if self.trainer.global_rank != 1:
            self.nan_from_step = -1


def fit(module, guard, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[guard],
        **options,
    )
    trainer.fit(module, TinyData())
    return trainer


def test_names_the_term_and_the_step_and_leaves_the_weights_finite():
    module = TinyModule({"square": MeanSquare(), "abs": MeanAbs()}, nan_from_step=3)
    with pytest.raises(NonFiniteLossError, match=r"nan at optimizer step 3 .*not finite: square = nan\. Weights"):
        fit(module, NanGuard())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_an_overflow_of_the_weighted_total_is_told_apart():
    with pytest.raises(NonFiniteLossError, match=r"inf at optimizer step 0 .*no single term, but the weighted total"):
        fit(TinyModule({"square": MeanSquare(weight=float("inf"))}), NanGuard())


def test_checks_every_nth_batch_and_lets_healthy_runs_pass():
    assert fit(TinyModule({"square": MeanSquare()}), NanGuard()).global_step == 8
    with pytest.raises(NonFiniteLossError, match="optimizer step 4 "):
        fit(TinyModule({"square": MeanSquare()}, nan_from_step=3), NanGuard(every_n_batches=5))
    with pytest.raises(ValueError, match="every_n_batches must be >= 1"):
        NanGuard(every_n_batches=0)


def test_all_ranks_stop_when_one_of_them_meets_nan():
    module = NanOnOneRank({"square": MeanSquare()}, nan_from_step=1)
    with pytest.raises(Exception, match=r"nan at optimizer step 1 \(epoch 0, rank 1\); not finite: square = nan"):
        fit(module, NanGuard(), strategy="ddp_fork", devices=2)
