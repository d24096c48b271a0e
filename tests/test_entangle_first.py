import sys
from pathlib import Path

import pytest
import yaml

from cvae_lightning import entangle_first
from cvae_lightning.entangle_first import train_entangled_first

STAND_IN = """\
import os, pathlib, sys
pathlib.Path("calls.txt").write_text(" ".join(sys.argv[1:]))
if pathlib.Path("fail").exists():
    sys.exit(5)
if pathlib.Path("die").exists():
    os.kill(os.getpid(), int(pathlib.Path("die").read_text()))
pathlib.Path("runs/base").mkdir(parents=True)
pathlib.Path("runs/base/baseline.json").write_text("{}")
"""
CONFIG = {
    "model": {"class_path": "M", "init_args": {"entangled": "runs/base"}},
    "data": {"class_path": "D", "init_args": {"train_path": "mine.jsonl", "batch_size": 4, "eval_batch_size": 8}},
    "trainer": {"default_root_dir": "runs/cvae", "accelerator": "cpu", "devices": "auto", "max_steps": 9},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with an entangled recipe and a stand-in for ``cvae-lightning``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(entangle_first, "program", lambda: [sys.executable, "-S", "stand_in.py"])
    Path("stand_in.py").write_text(STAND_IN)
    Path("base.yaml").write_text("model: {class_path: E, init_args: {output_dir: ./runs/base}}")
    return tmp_path


def test_missing_model_is_trained_once_on_the_same_data(here, capsys):
    train_entangled_first("base.yaml", CONFIG)
    expected = "fit --config base.yaml --config runs/cvae/entangled_overrides.yaml"
    assert Path("calls.txt").read_text() == expected
    assert f"$ cvae-lightning {expected}\n" in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/cvae/entangled_overrides.yaml").read_text()) == {
        "data": {"class_path": "D", "init_args": {"train_path": "mine.jsonl"}},
        "trainer": {"accelerator": "cpu", "devices": "auto"},
    }
    Path("calls.txt").unlink()
    train_entangled_first("base.yaml", CONFIG)
    assert not Path("calls.txt").exists()


@pytest.mark.parametrize("entangled", ["gpt2", "runs/other", {"model_type": "llama"}])
def test_a_model_that_the_user_names_is_left_alone(here, entangled):
    train_entangled_first("base.yaml", CONFIG | {"model": {"init_args": {"entangled": entangled}}})
    assert not Path("calls.txt").exists()


def test_failure_ends_the_run_with_its_exit_code_and_leaves_nothing(here):
    Path("fail").touch()
    with pytest.raises(SystemExit) as stop:
        train_entangled_first("base.yaml", CONFIG)
    assert stop.value.code == 5
    assert not Path("runs/cvae/entangled_overrides.yaml").exists()


@pytest.mark.parametrize("number", [9, 15])
def test_a_killed_training_goes_on_where_it_was_unless_something_changed(here, number):
    words = "fit --config base.yaml --config runs/cvae/entangled_overrides.yaml"
    Path("die").write_text(str(number))
    for expected in (words, f"{words} --ckpt_path last"):
        with pytest.raises(SystemExit) as stop:
            train_entangled_first("base.yaml", CONFIG)
        assert stop.value.code == 128 + number
        assert Path("calls.txt").read_text() == expected
    Path("base.yaml").write_text("model: {class_path: E, init_args: {output_dir: ./runs/base, warmup_steps: 1}}")
    Path("die").unlink()
    train_entangled_first("base.yaml", CONFIG)
    assert Path("calls.txt").read_text() == words
    assert [path.name for path in Path("runs/cvae").iterdir()] == ["entangled_overrides.yaml"]


@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_several_processes_do_not_train_it_at_once(here, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "2")
    with pytest.raises(ValueError, match=r"train it first with `cvae-lightning fit --config base\.yaml`"):
        train_entangled_first("base.yaml", CONFIG)
    assert not Path("calls.txt").exists()
