import functools
import json

import lightning as L
import pytest
import torch
import yaml
from tiny import QUIET, RECORDS, TinyData, tiny_artifact

from cvae_lightning import cli
from cvae_lightning.callbacks import PredictionWriter
from cvae_lightning.callbacks.predictions import merge
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.modules import ContinuousCVAE, SharedDiscreteCVAE
from cvae_lightning.outputs import Record


def build(folder, cls=SharedDiscreteCVAE, **options):
    torch.manual_seed(0)
    artifact = tiny_artifact(folder / "artifact")
    model = cls(artifact, {"reconstruction_loss": ReconstructionLoss()}, **options)
    model.longest_y.fill_(4)
    return model


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predict(model, data, folder, **options):
    trainer = L.Trainer(**QUIET | options, default_root_dir=folder, callbacks=[PredictionWriter()])
    trainer.predict(model, data, return_predictions=False)
    return rows_of(folder / "predictions.jsonl")


def test_predict_writes_one_row_per_record_in_order(tmp_path):
    model = build(tmp_path, num_latents=3)
    rows = predict(model, TinyData(list(reversed(RECORDS)), batch_size=2), tmp_path)
    assert [row["index"] for row in rows] == [r.index for r in RECORDS]
    xs, ys = [r.x for r in RECORDS], [r.y for r in RECORDS]
    probs = model.route(xs).exp()
    assert [row["z"] for row in rows] == probs.argmax(-1).tolist()
    assert [row["y"] for row in rows] == model.generate(xs, probs.argmax(-1).tolist())
    assert not list(tmp_path.glob(".predictions*"))
    assert [row["target"] for row in rows] == ys
    for name, expected in (
        ("router", probs),
        ("log_likelihood", model.log_likelihood(xs, ys)),
        ("posterior", model.infer(xs, ys).exp()),
        ("log_evidence", model.log_evidence(xs, ys)),
    ):
        torch.testing.assert_close(torch.tensor([row[name] for row in rows]), expected, rtol=1e-4, atol=1e-4)


def test_records_without_a_solution_get_no_scores(tmp_path):
    model = build(tmp_path, num_latents=2)
    records = [Record("12", "21=3", 0, 0), Record("7", "", -1, 1)]
    known, unknown = predict(model, TinyData(records), tmp_path)
    names = ("target", "log_likelihood", "posterior", "log_evidence")
    assert all(known[name] is not None for name in names)
    assert all(unknown[name] is None for name in names)
    assert unknown["y"] == model.generate(["7"], "argmax")[0]
    only = predict(model, TinyData(records[1:]), tmp_path)
    assert only == [unknown]


def test_a_continuous_row_does_not_depend_on_its_batch(tmp_path):
    model = build(tmp_path, ContinuousCVAE, latent_dim=2, num_eval_samples=3)
    torch.nn.init.normal_(model.router_head.weight, std=0.1)
    rows = predict(model, TinyData(batch_size=4), tmp_path)
    singles = predict(model, TinyData(batch_size=1), tmp_path)
    xs, ys = [r.x for r in RECORDS], [r.y for r in RECORDS]
    for key, value in rows[0].items():
        column, other = [row[key] for row in rows], [row[key] for row in singles]
        if isinstance(value, float | list):
            torch.testing.assert_close(torch.tensor(column), torch.tensor(other), rtol=1e-4, atol=1e-4)
        else:
            assert column == other
    evidence = torch.tensor([row["log_evidence"] for row in rows])
    torch.testing.assert_close(evidence, model.log_evidence(xs, ys), rtol=1e-4, atol=1e-4)
    assert all(row["log_evidence_error"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_write_the_file_of_one(tmp_path):
    model = build(tmp_path, num_latents=2)
    one = predict(model, TinyData(batch_size=2), tmp_path)
    two = predict(model, TinyData(batch_size=2), tmp_path / "two", devices=2, strategy="ddp_fork")
    assert [row["index"] for row in two] == list(range(5))
    for a, b in zip(one, two, strict=True):
        assert (a["x"], a["z"], a["y"], a["target"]) == (b["x"], b["z"], b["y"], b["target"])
        assert b["log_evidence"] == pytest.approx(a["log_evidence"], rel=1e-4)
    assert not list((tmp_path / "two").glob(".predictions*"))


def test_merge_sorts_drops_the_copies_of_other_files_and_keeps_lines_without_an_index(tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    parts[0].write_text('{"index": 10, "y": "é"}\n{"index": 2}\n{"note": 1}\n{"index": 2, "second": true}\n')
    parts[1].write_text('{"index": 1}\n{"index": 2, "copy": true}\n{"note": 2}\n')
    assert merge(parts, tmp_path / "out") == 6
    assert rows_of(tmp_path / "out") == [
        {"index": 1},
        {"index": 2},
        {"index": 2, "second": True},
        {"index": 10, "y": "é"},
        {"note": 1},
        {"note": 2},
    ]


def test_a_prediction_cut_short_leaves_no_file_that_looks_whole(tmp_path):
    class Failing(SharedDiscreteCVAE):
        def predict_step(self, batch, batch_idx):
            if batch_idx:
                raise RuntimeError("cut short")
            return super().predict_step(batch, batch_idx)

    model = build(tmp_path, Failing, num_latents=2)
    with pytest.raises(RuntimeError, match="cut short"):
        predict(model, TinyData(batch_size=2), tmp_path)
    assert not (tmp_path / "predictions.jsonl").exists()
    assert len(rows_of(tmp_path / ".predictions.jsonl.0")) == 2


def test_the_command_keeps_no_prediction_in_memory(tmp_path, monkeypatch):
    calls, predict = [], L.Trainer.predict
    monkeypatch.setattr(L.Trainer, "predict", functools.wraps(predict)(lambda self, **options: calls.append(options)))
    task = "cvae_lightning.data.tasks.MultidigitAddition"
    losses = {"r": {"class_path": "cvae_lightning.losses.ReconstructionLoss"}}
    model = {"entangled": tiny_artifact(tmp_path / "artifact"), "losses": losses, "num_latents": 2}
    config = {
        "trainer": {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path / "run")},
        "model": {"class_path": "cvae_lightning.SharedDiscreteCVAE", "init_args": model},
        "data": {"class_path": "cvae_lightning.data.SyntheticDataModule", "init_args": {"task": {"class_path": task}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["predict", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", "some.ckpt"]) == 0
    assert [options["return_predictions"] for options in calls] == [False]
