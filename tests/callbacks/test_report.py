import json
import math

import pytest
import torch
from callback_fakes import FakeData, FakeModule, MirrorTask, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger

from cvae_lightning.callbacks.evaluation import StrategyEvaluation
from cvae_lightning.callbacks.report import Report
from cvae_lightning.metrics import LatentUsage


class ReportedModule(FakeModule):
    def __init__(self, num_latents=2):
        super().__init__(num_latents)
        self.usage = LatentUsage(max(1, num_latents))
        self.to_log = {
            "alignment/one_to_one": 0.75,
            "alignment/ami": 0.5,
            "alignment/purity": 0.875,
            "router/cross_entropy": 0.75,
            "router/expected_cross_entropy": 0.6875,
            "router/true_cross_entropy": 0.625,
            "router/calibration_error": math.inf,
            "rho_recon": 0.8,
            "marginal_nll": 0.2,
            "baseline_nll": 0.25,
            "diagnostics/latent_usage_perplexity": 1.75,
        }

    def test_step(self, batch, batch_idx):
        self.usage.update(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.75, 0.25]]).log())

    def on_test_epoch_end(self):
        super().on_test_epoch_end()
        self.usage.reset()


def test_table_and_summary(tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path / "logs", default_hp_metric=False)
    trainer = make_trainer(StrategyEvaluation(), Report(), logger=logger, default_root_dir=tmp_path)
    trainer.test(ReportedModule(), FakeData(MirrorTask()), verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = {
        "final_answer_accuracy": 7 / 8,
        "sampled_final_answer_accuracy": 1.0,
        "greedy_final_answer_accuracy": 1.0,
        "alignment_one_to_one": 0.75,
        "alignment_ami": 0.5,
        "alignment_purity": 0.875,
        "router_cross_entropy": 0.75,
        "router_expected_cross_entropy": 0.6875,
        "router_true_cross_entropy": 0.625,
        "alignment_ceiling": 0.875,
        "controlled_alignment_one_to_one": 0.75,
        "controlled_alignment_ceiling": 0.875,
        "rho_recon": 0.8,
        "marginal_nll": 0.2,
        "baseline_nll": 0.25,
        "nll_ratio": 0.8,
        "usage_perplexity": 1.75,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    assert summary["router_calibration_error"] is None  # JSON knows no infinity
    assert summary["usage"] == [1.0, 0.0]
    assert summary["dead_latents"] == [1]
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-3:] for line in printed.splitlines()}
    assert rows["alignment, posterior"] == ["0.7500", "0.8750", "0.8571"]
    assert rows["alignment, controlled"] == ["0.7500", "0.8750", "0.8571"]
    assert rows["NLL, marginal / entangled"][-1] == "0.8000"
    lines = [line.rstrip() for line in printed.splitlines()]
    assert "latent usage, posterior" in printed
    assert "z0 1.000  z1 0.000" in printed
    assert lines[lines.index("x = 12") + 1].split() == ["z0", "12=2", "correct", "keep"]
    assert lines[lines.index("x = 12") + 2].split() == ["z1", "21=2", "correct", "turn"]
    assert sum(line.startswith("x = ") for line in lines) == 2
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in printed


def test_without_verifier_or_evaluation(tmp_path, capsys):
    path = tmp_path / "new" / "folder" / "out.json"
    trainer = make_trainer(Report(path=str(path)), default_root_dir=tmp_path)
    trainer.test(ReportedModule(), FakeData(None), verbose=False)
    summary = json.loads(path.read_text())
    assert summary["final_answer_accuracy"] is None
    assert summary["alignment_ceiling"] is None
    assert summary["marginal_nll"] == pytest.approx(0.2)
    printed = capsys.readouterr().out
    assert "accuracy" not in printed
    assert "nan" not in printed.lower()


def test_module_without_latents(tmp_path, capsys):
    module = FakeModule(num_latents=0)
    module.generate = lambda x, **_: [MirrorTask().solve(a, "keep") for a in x]
    module.to_log = {"baseline_nll": 0.25}
    trainer = make_trainer(StrategyEvaluation(), Report(), default_root_dir=tmp_path)
    trainer.test(module, FakeData(MirrorTask()), verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_answer_accuracy"] == 1.0
    assert summary["nll_ratio"] is None
    printed = capsys.readouterr().out
    assert "latent" not in printed.split("x = ")[0]
    assert "  y   12=2  correct keep" in printed


@pytest.mark.parametrize("blocked", ["folder", "file"])
def test_unwritable_path_is_refused_before_the_test(tmp_path, blocked):
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.json").mkdir()
    path = tmp_path / "taken" / "x.json" if blocked == "folder" else tmp_path / "folder.json"

    class NeverTested(ReportedModule):
        def test_step(self, batch, batch_idx):
            raise AssertionError("the test ran")

    module = NeverTested()
    with pytest.raises(ValueError, match=r"Report: (cannot create folder|path .* cannot be written)"):
        make_trainer(Report(path=str(path))).test(module, FakeData(None), verbose=False)
