"""Checkpoints of format 1, as version 0.1.0 wrote them before there was a format number: they load, and say the same.

Four steps each of a tiny model, `stored/*.ckpt`; what it said then is in `stored/expected.json`. The evidence of
Gaussian latents there is of today's noise: when records got other seeds, it was first found equal with those of then.
"""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import QUIET, TinyData

from cvae_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from cvae_lightning.export.restore import restore
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE

STORED = Path(__file__).parent / "stored"
EXPECTED = json.loads((STORED / "expected.json").read_text())
CLASSES = {"discrete": SharedDiscreteCVAE, "continuous": ContinuousCVAE}


def said(model):
    xs, ys = ["12", "80"], ["21=3", "0=8"]
    route = model.route(xs)
    amortized = {"posterior": "amortized"} if isinstance(model, SharedDiscreteCVAE) else {}
    found = {"route": route, "log_evidence": model.log_evidence(xs, ys), "infer": model.infer(xs, ys, **amortized)}
    return {key: torch.stack(value) if isinstance(value, tuple) else value for key, value in found.items()}


def check(model, kind):
    for key, value in said(model.eval()).items():
        torch.testing.assert_close(value, torch.tensor(EXPECTED[kind][key]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_it_loads_and_says_what_it_said(kind):
    path = STORED / f"{kind}_format_1.ckpt"
    model = CLASSES[kind].load_from_checkpoint(path)
    assert model.c_base == EXPECTED[kind]["c_base"]
    check(model, kind)
    check(restore(path).module, kind)


@pytest.mark.parametrize("kind", CLASSES)
def test_its_training_goes_on(kind, tmp_path):
    path = STORED / f"{kind}_format_1.ckpt"
    model = CLASSES[kind].load_from_checkpoint(path)
    trainer = L.Trainer(**QUIET, max_epochs=3, plugins=[AtomicCheckpointIO()], default_root_dir=tmp_path)
    trainer.fit(model, datamodule=TinyData(), ckpt_path=str(path))
    assert trainer.global_step == 6
    moments = trainer.optimizers[0].state.values()
    assert {int(state["step"]) for state in moments} == {6}  # of which 4 were taken over


def test_it_is_no_checkpoint_of_an_adapted_model():
    with pytest.raises(ValueError, match="trained with adaptation=full, this model has frozen"):
        SharedDiscreteCVAE.load_from_checkpoint(STORED / "discrete_format_1.ckpt", adaptation="frozen")
