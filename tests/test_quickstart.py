"""The quickstart with a stand-in for ``cvae-lightning`` that leaves the same files behind."""

import json
import sys

import pytest

from cvae_lightning import quickstart as module
from cvae_lightning import recipes
from cvae_lightning.quickstart import quickstart

STAND_IN = """\
import json, os, pathlib, sys
assert "RANK" not in os.environ and "SLURM_NTASKS" not in os.environ
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if pathlib.Path("fail").exists() and "quickstart_discrete" in sys.argv:
    sys.exit(3)
root = pathlib.Path("runs/quickstart")
product = "discrete/checkpoints/last.ckpt"
if sys.argv[3] == "quickstart_entangled":
    product = "entangled/artifact/baseline.json"
if sys.argv[1] == "test":
    product = "summary.json"
(root / product).parent.mkdir(parents=True, exist_ok=True)
(root / product).write_text(json.dumps({"rho_recon": 0.5}))
"""
COMMANDS = [
    "fit --config quickstart_entangled",
    "fit --config quickstart_discrete",
    "test --config quickstart_discrete --ckpt_path runs/quickstart/discrete/checkpoints/last.ckpt",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs the quickstart and returns the exit code and the commands it called."""
    monkeypatch.chdir(tmp_path)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name in ("quickstart_entangled", "quickstart_discrete"):
        (shipped / f"{name}.yaml").write_text("# recipe\n")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: shipped)
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def call(*args):
        calls = tmp_path / "calls.txt"
        calls.unlink(missing_ok=True)
        code = quickstart(args, command=[sys.executable, "-S", "stand_in.py"])
        return code, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_runs_the_commands_that_it_prints_and_nothing_twice(run, capfd, tmp_path, monkeypatch):
    for name in ("RANK", "SLURM_NTASKS"):  # it may itself be part of a launch
        monkeypatch.setenv(name, "1")
    assert run() == (0, COMMANDS)
    out = capfd.readouterr().out
    assert [line[2:] for line in out.splitlines() if line.startswith("$ ")] == [
        *(f"cvae-lightning {command}" for command in COMMANDS),
        "tensorboard --logdir runs/quickstart",
    ]
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    assert summary["rho_recon"] == 0.5
    assert summary["seconds"] > 0

    assert run() == (0, [])
    assert "finished earlier" in capfd.readouterr().out
    assert json.loads((tmp_path / "runs/quickstart/summary.json").read_text()) == summary
    assert run("--force") == (0, COMMANDS)


def test_a_changed_recipe_runs_its_step_and_those_after_it(run, tmp_path):
    run()
    (tmp_path / "shipped/quickstart_discrete.yaml").write_text("# changed\n")
    assert run() == (0, COMMANDS[1:])
    (tmp_path / "shipped/quickstart_entangled.yaml").write_text("# changed\n")
    assert run() == (0, COMMANDS)
    (tmp_path / "runs/quickstart/discrete/checkpoints/last.ckpt").unlink()
    assert run() == (0, COMMANDS[1:])


def test_a_failed_step_stops_and_is_run_again(run, capfd, tmp_path):
    (tmp_path / "fail").touch()
    assert run() == (3, COMMANDS[:2])
    assert "exit code 3" in capfd.readouterr().err
    (tmp_path / "fail").unlink()
    assert run() == (0, COMMANDS[1:])


def test_a_step_that_is_broken_off_leaves_none_behind_it_finished(run, tmp_path):
    run()
    (tmp_path / "runs/quickstart/entangled/artifact/baseline.json").unlink()
    (tmp_path / "fail").touch()
    assert run() == (3, COMMANDS[:2])
    (tmp_path / "fail").unlink()
    assert run() == (0, COMMANDS[1:])


def test_steps_name_public_commands_only():
    from cvae_lightning.cli import TRAINING

    assert {step.words[0] for step in module.STEPS} <= set(TRAINING)
