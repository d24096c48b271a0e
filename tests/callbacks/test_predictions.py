import json

import lightning as L
import torch
from tiny import RECORDS, TinyData, tiny_artifact

from cvae_lightning.callbacks import PredictionWriter
from cvae_lightning.losses import ReconstructionLoss
from cvae_lightning.modules import SharedDiscreteCVAE


def test_predict_writes_one_row_per_record_in_order(tmp_path):
    torch.manual_seed(0)
    artifact = tiny_artifact(tmp_path / "artifact")
    model = SharedDiscreteCVAE(artifact, {"reconstruction_loss": ReconstructionLoss()}, num_latents=3)
    model.longest_y.fill_(4)
    writer = PredictionWriter()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[writer],
    )
    trainer.predict(model, TinyData(list(reversed(RECORDS)), batch_size=2), return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [r.index for r in RECORDS]
    probs = model.route([r.x for r in RECORDS]).exp()
    assert [row["z"] for row in rows] == probs.argmax(-1).tolist()
    assert [row["y"] for row in rows] == model.generate([r.x for r in RECORDS], probs.argmax(-1).tolist())
    assert not list(tmp_path.glob(".predictions*"))
