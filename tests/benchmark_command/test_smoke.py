"""The whole path with real trainings: the smoke form on one task, with the shipped configs."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from cvae_lightning import cli

CONFIG = {
    "results": "runs/all",
    "jobs": 2,
    "tasks": {
        "sorting_algorithms": {"entangled": "entangled_sorting_algorithms"},
        "base_conversion": {"entangled": "entangled_base_conversion"},
    },
    "recipes": {
        "ours": {"configs": ["discrete_{task}"]},
        "gaussian": {"configs": ["continuous_{task}"], "group": "continuous"},
    },
}


@pytest.mark.slow
def test_smoke_trains_tests_and_reports(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    words = ["benchmark", "--config", "bench.yaml", "--smoke"]
    assert cli.main([*words, "--only", "sorting_algorithms"]) == 0, capfd.readouterr().out
    out = capfd.readouterr().out
    results = tmp_path / "runs/all-smoke"
    rows = {r["recipe"]: r for r in map(json.loads, (results / "results.jsonl").read_text().splitlines())}
    assert {*rows} == {"entangled", "ours", "gaussian"}
    assert all(row["status"] == "done" for row in rows.values())
    for name in ("ours", "gaussian"):
        row = rows[name]
        for key in ("alignment_one_to_one", "final_answer_accuracy", "rho_recon", "nll_ratio", "alignment_ceiling"):
            assert isinstance(row["metrics"][key], float), (name, key)
        assert [step for step, _ in row["history"]["val/alignment/one_to_one"]] == [3, 7]
        assert sum(row["loss_fractions"].values()) == pytest.approx(1, abs=1e-4)
        assert row["fit_seconds"] > 0
    assert rows["entangled"]["metrics"]["baseline_nll"] > 0
    assert rows["ours"]["metrics"]["num_latents"] == 4

    # both started from the one entangled model, and nothing lies outside of the cells' folders
    model = "runs/all-smoke/sorting_algorithms/entangled/model"
    for name in ("ours", "gaussian"):
        config = yaml.safe_load((results / f"sorting_algorithms/{name}/seed1/config.yaml").read_text())
        assert config["model"]["init_args"]["entangled"] == model
        assert config["seed_everything"] == 1
        assert (results / f"sorting_algorithms/{name}/seed1/step").read_text() == "8\n"
    assert {path.name for path in tmp_path.iterdir()} == {"bench.yaml", "runs"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"all-smoke"}
    outputs = {"results.jsonl", "table.md", "alignment_accuracy.png", "learning_curves.png", "heatmap.png"}
    assert {path.name for path in results.iterdir()} == {"sorting_algorithms", *outputs}
    assert "start   sorting_algorithms/ours/seed1" in out
    page = (results / "table.md").read_text()
    assert re.search(r"\| ours \| sorting_algorithms \| 0\.\d{3} \| 0\.\d{3} \|", page)
    assert page.startswith("`cvae-lightning benchmark --config bench.yaml --smoke`\n\n3 of 6 cells finished")

    assert cli.main([*words, "--only", "sorting_algorithms"]) == 0
    assert "start" not in capfd.readouterr().out
    assert not list(results.rglob("claim.*"))


def test_looking_at_a_benchmark_needs_no_torch(tmp_path):
    code = (
        "import sys; from cvae_lightning.cli import main; main(['benchmark', '--config', 'alignment', '--list']); "
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 24
    assert list(tmp_path.iterdir()) == []
