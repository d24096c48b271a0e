"""The folder of a user who trains on pairs of their own, and what the command line says when something is wrong."""

import json
import sys

import torch
import yaml
from tiny import CONFIGS

from cvae_lightning import cli
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.modules.language_model import describe_lm
from cvae_lightning.template import PromptTemplate

ROWS = [{"x": f"{i}", "y": f"{i}={i % 7}", "s": "ab"[i % 2]} for i in range(24)]
NAN = """\
from cvae_lightning import LossCallback
class Sick(LossCallback):
    def __init__(self, weight: float = 1.0, after: int = 3) -> None:
        super().__init__(weight)
        self.after, self.calls = after, 0
    def forward(self, outputs):
        self.calls += 1
        return outputs.posterior_log_probs.sum(-1) * (float("nan") if self.calls > self.after else 0.0)
"""
LOSSES = {
    "free_energy_loss": {"class_path": "cvae_lightning.losses.FreeEnergyLoss"},
    "kl_prior_loss": {"class_path": "cvae_lightning.losses.PriorKLLoss", "init_args": {"weight": 0.1}},
}
TRAINER = {
    "max_steps": 4,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "default_root_dir": "out",
    "callbacks": [{"class_path": "cvae_lightning.callbacks.Report"}],
}
DATA = {
    "class_path": "cvae_lightning.data.PairsDataModule",
    "init_args": {
        "train_path": "train.jsonl",
        "val_path": "val.jsonl",
        "test_path": "val.jsonl",
        "strategy_column": "s",
        "batch_size": 4,
    },
}
RUN = {
    "trainer": TRAINER,
    "checkpoint": {"every_n_train_steps": 1},
    "model": {
        "class_path": "cvae_lightning.SharedDiscreteCVAE",
        "init_args": {"entangled": "artifact", "num_latents": 2, "losses": LOSSES},
    },
    "data": DATA,
}
BASE = {
    "trainer": TRAINER,
    "model": {
        "class_path": "cvae_lightning.EntangledLM",
        "init_args": {"output_dir": "out/artifact", "config": CONFIGS["llama"]},
    },
    "data": DATA,
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def enter_user_folder(here, monkeypatch):
    """Fill ``here`` with data, an artifact and configs in which all is right, make it the working folder."""
    template = PromptTemplate(build_tokenizer(["0123456789="], "char"))
    torch.manual_seed(0)
    lm = build_causal_lm(CONFIGS["llama"], len(template), template.pad_id)
    save_artifact(here / "artifact", lm, template.tokenizer, Baseline(2.5, 10, "-", template.fingerprint()))
    write_rows(here / "train.jsonl", ROWS)
    write_rows(here / "val.jsonl", ROWS[:6])
    (here / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    (here / "base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    (here / "sick_terms.py").write_text(NAN)
    (here / "file").write_text("not a folder")
    description = describe_lm(lm, template.tokenizer)
    (here / "alone.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"entangled": description}}}))
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("CVAE_LIGHTNING_TRACEBACK", raising=False)
    return here


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def failure(capfd, *words):
    """Return the one message on stderr, and check that it is the only one."""
    capfd.readouterr()
    assert cli.main(list(words)) in (1, 2)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    messages = [line for line in captured.err.splitlines() if line.startswith("cvae-lightning: error: ")]
    assert len(messages) == 1, captured.err
    assert captured.err.rstrip().splitlines()[-1] == messages[0]  # nothing comes after it
    assert len(messages[0]) < 600
    return messages[0].removeprefix("cvae-lightning: error: ")
