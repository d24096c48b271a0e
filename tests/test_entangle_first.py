import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cvae_lightning import entangle_first
from cvae_lightning.entangle_first import train_entangled_first

STAND_IN = """\
import os, pathlib, sys, time
assert "SLURM_JOB_ID" not in os.environ
with open("calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]))
if pathlib.Path("slow").exists():
    time.sleep(float(pathlib.Path("slow").read_text()))
if pathlib.Path("fail").exists():
    sys.exit(5)
if pathlib.Path("die").exists():
    os.kill(os.getpid(), int(pathlib.Path("die").read_text()))
pathlib.Path("runs/base").mkdir(parents=True, exist_ok=True)
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


def test_missing_model_is_trained_once_on_the_same_data(here, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
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


@pytest.mark.parametrize("own", [None, {"prompt": "Q: {x}", "stop": ["\n"]}])
def test_a_recipe_that_draws_its_solutions_draws_them_in_its_own_way(here, own):
    """The run's model is asked behind markers, which the one that the recipe starts from has never seen."""
    recipe = yaml.safe_load(Path("base.yaml").read_text()) | {"data": {"init_args": {"self_generated": own}}}
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    drawn = {"num_solutions": 8, "prompt": None}
    data = {"class_path": "D", "init_args": CONFIG["data"]["init_args"] | {"self_generated": drawn}}
    train_entangled_first("base.yaml", CONFIG | {"data": data})
    taken = yaml.safe_load(Path("runs/cvae/entangled_overrides.yaml").read_text())["data"]["init_args"]
    assert taken == {"train_path": "mine.jsonl"} | ({} if own else {"self_generated": drawn})


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
        Path("calls.txt").unlink()
    Path("base.yaml").write_text("model: {class_path: E, init_args: {output_dir: ./runs/base, warmup_steps: 1}}")
    Path("die").unlink()
    train_entangled_first("base.yaml", CONFIG)
    assert Path("calls.txt").read_text() == words
    assert [path.name for path in Path("runs/cvae").iterdir()] == ["entangled_overrides.yaml"]
    assert {path.name for path in Path("runs/base").iterdir()} == {"baseline.json", "trained_on.json"}


def on(path, **arguments):
    """The configuration of a run on the pairs of this file."""
    given = {"train_path": path, "val_path": None, "test_path": None, "seed": 1, **arguments}
    return {**CONFIG, "data": {"class_path": "cvae_lightning.data.PairsDataModule", "init_args": given}}


def test_a_model_of_other_data_is_refused(here):
    Path("a.jsonl").write_text("1")
    Path("b.jsonl").write_text("2")
    train_entangled_first("base.yaml", on("a.jsonl"))
    Path("same.jsonl").write_text("1")
    alike = {"seed": 2, "batch_size": 9, "test_path": "b.jsonl", "strategy_column": "s"}
    for config in (on("a.jsonl"), on("./a.jsonl"), on("same.jsonl"), on("a.jsonl", **alike)):
        train_entangled_first("base.yaml", config)
    message = (
        r"runs/base holds the entangled model of other data \(train_path: a\.jsonl \(content \w+\) then, {} .*now\)"
    )
    for config, named in ((on("b.jsonl"), r"b\.jsonl"), (on("gone.jsonl"), r"'gone\.jsonl'")):
        with pytest.raises(ValueError, match=message.format(named)):
            train_entangled_first("base.yaml", config)
    with pytest.raises(ValueError, match=r"val_path: False then, True now.*or remove runs/base"):
        train_entangled_first("base.yaml", on("a.jsonl", val_path="b.jsonl"))
    Path("a.jsonl").write_text("3")
    with pytest.raises(ValueError, match=message.format(r"a\.jsonl")):
        train_entangled_first("base.yaml", on("a.jsonl"))
    Path("runs/base/baseline.json").write_text('{"of": "a model that was trained by hand"}')
    train_entangled_first("base.yaml", on("b.jsonl"))
    Path("runs/base/trained_on.json").unlink()
    train_entangled_first("base.yaml", on("b.jsonl"))


def test_a_training_does_not_go_on_with_other_content_nor_from_an_older_checkpoint(here):
    last = Path("runs/checkpoints/last.ckpt")
    recipe = "{model: {init_args: {output_dir: runs/base}}, checkpoint: {dirpath: runs/checkpoints}}"
    Path("base.yaml").write_text(recipe)
    Path("a.jsonl").write_text("1")
    Path("die").write_text("9")
    for content, resumed, left in (("1", False, None), ("1", True, "1"), ("2", False, None), ("2", True, "2")):
        Path("a.jsonl").write_text(content)
        with pytest.raises(SystemExit):
            train_entangled_first("base.yaml", on("a.jsonl"))
        assert Path("calls.txt").read_text().endswith("--ckpt_path last") == resumed
        assert (last.read_text() if last.exists() else None) == left
        Path("calls.txt").unlink()
        last.parent.mkdir(exist_ok=True)
        last.write_text(content)
    assert last.with_name("earlier.ckpt").read_text() == "1"


def test_of_two_runs_one_trains_and_the_other_waits(here, monkeypatch, capfd):
    monkeypatch.setattr(entangle_first, "LOOK", 0.05)
    Path("slow").write_text("1.5")
    words = f"from cvae_lightning import entangle_first as e; e.program = lambda: {entangle_first.program()!r}; "
    words += f"e.train_entangled_first('base.yaml', {CONFIG!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(entangle_first.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", words], env=environment) as first:
        while not Path("calls.txt").exists():
            assert first.poll() is None
            time.sleep(0.02)
        train_entangled_first("base.yaml", {**CONFIG, "trainer": {**CONFIG["trainer"], "default_root_dir": "runs/2"}})
        assert first.wait() == 0
    assert Path("calls.txt").read_text().count("fit") == 1
    assert capfd.readouterr().out.count("waiting for it") == 1
    assert not Path("runs/2").exists()
    assert not list(Path("runs/base").glob("claim.*"))


def test_limits_of_records_precision_and_trials_are_handed_on(here):
    own = {"entangled": "runs/base", "max_length": 99, "on_overflow": "skip", "padding_side": "right"}
    trainer = {**CONFIG["trainer"], "precision": "bf16-mixed", "fast_dev_run": True}
    Path("runs/base").mkdir(parents=True)
    Path("stand_in.py").write_text("")
    with pytest.raises(ValueError, match=r"fast_dev_run has tried `base\.yaml`, .* --trainer\.fast_dev_run false`"):
        train_entangled_first("base.yaml", {**CONFIG, "model": {"init_args": own}, "trainer": trainer})
    assert not list(Path("runs/base").iterdir())
    assert yaml.safe_load(Path("runs/cvae/entangled_overrides.yaml").read_text()) == {
        "data": {"class_path": "D", "init_args": {"train_path": "mine.jsonl"}},
        "trainer": {"accelerator": "cpu", "devices": "auto", "precision": "bf16-mixed", "fast_dev_run": True},
        "model": {"init_args": {"max_length": 99, "on_overflow": "skip", "padding_side": "right"}},
    }


@pytest.mark.parametrize("launcher", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_several_processes_do_not_train_it_at_once(here, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "2")
    with pytest.raises(ValueError, match=r"train it first with `cvae-lightning fit --config base\.yaml`"):
        train_entangled_first("base.yaml", CONFIG)
    assert not Path("calls.txt").exists()
