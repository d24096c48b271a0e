"""The command line, run in this process on a module of four parameters; a few cases in a process of their own."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cvae_lightning import cli, recipes

BASE = """\
# A tiny run.
trainer:
  max_steps: 6
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: out
model:
  class_path: cli_dummies.TinyModule
  init_args:
    losses:
      square: {class_path: cli_dummies.MeanSquare}
      abs: {class_path: cli_dummies.MeanAbs, init_args: {weight: 0.5, shift: 0.25}}
data: {class_path: cli_dummies.TinyData}
"""
pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty.*")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder of the user's own that holds base.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("CVAE_LIGHTNING_TRACEBACK", raising=False)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def config(capsys, *words):
    """Return the configuration that these options amount to."""
    assert cli.main(["fit", *words, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def losses(capsys, *words):
    return config(capsys, *words)["model"]["init_args"]["losses"]


def failure(capsys, *words):
    """Return the one line on stderr with which these words fail."""
    assert cli.main(list(words)) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cvae-lightning: error:")]
    assert len(lines) == 1
    return lines[0].removeprefix("cvae-lightning: error: ")


SQUARE = {"class_path": "cli_dummies.MeanSquare", "init_args": {"weight": 1.0, "power": 2.0}}
ABS = {"class_path": "cli_dummies.MeanAbs", "init_args": {"weight": 0.5, "power": 1.0, "shift": 0.25}}


def with_args(loss, **changes):
    return {**loss, "init_args": loss["init_args"] | changes}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("model: {init_args: {losses: {abs: {init_args: {weight: 3}}}}}", (SQUARE, with_args(ABS, weight=3.0))),
        ("model: {losses: {abs: {weight: 3}}}", (SQUARE, with_args(ABS, weight=3.0))),
        ("model: {losses: {square: null}}", (None, ABS)),
        ("model: {losses: {abs: {class_path: cli_dummies.MeanSquare}}}", (SQUARE, SQUARE)),
        ("model: {learning_rate: 0.5}", (SQUARE, ABS)),
        ("trainer: {max_steps: 1}", (SQUARE, ABS)),
    ],
)
def test_second_config_merges_losses_by_name(here, capsys, second, expected):
    (here / "more.yaml").write_text(second)
    assert losses(capsys, "--config", "base.yaml", "--config", "more.yaml") == dict(
        zip(("square", "abs"), expected, strict=True)
    )


def test_configs_and_options_apply_from_left_to_right(here, capsys):
    (here / "two.yaml").write_text("model: {losses: {new: {class_path: cli_dummies.MeanSquare}, abs: {weight: 2}}}")
    (here / "three.yaml").write_text("model: {losses: {new: {power: 4}}}\ntrainer: {max_steps: 9}")
    words = ["--config", "base.yaml", "--config", "two.yaml", "--config", "three.yaml"]
    result = config(capsys, *words, "--model.losses.abs.weight", "7", "--model.losses.square", "null")
    assert result["model"]["init_args"]["losses"] == {
        "square": None,
        "abs": with_args(ABS, weight=7.0),
        "new": with_args(SQUARE, power=4.0),
    }
    assert result["trainer"]["max_steps"] == 9
    assert result["trainer"]["default_root_dir"] == "out"


def test_a_class_alone_is_completed_by_a_later_file(here, capsys):
    (here / "class.yaml").write_text("model: {class_path: cli_dummies.TinyModule}")
    expected = losses(capsys, "--config", "base.yaml")
    for words in (["--config", "class.yaml"], ["--model", "cli_dummies.TinyModule"]):
        assert losses(capsys, *words, "--config", "base.yaml") == expected
        assert losses(capsys, "--config", "base.yaml", *words) == expected


def test_defaults_of_every_run(here, capsys):
    result = config(capsys, "--config", "base.yaml")
    assert result["seed_everything"] == 1
    assert result["checkpoint"]["save_last"] is True
    assert result["trainer"]["plugins"][0]["class_path"].endswith("AtomicCheckpointIO")
    assert result["step_seed"] == {"seed": None}
    assert "weights_only" not in result
    assert (
        config(capsys, "--config", "base.yaml", "--checkpoint.save_last", "link")["checkpoint"]["save_last"] == "link"
    )


def test_recipe_is_found_by_name_but_a_file_of_the_user_comes_first(here, capsys, monkeypatch):
    folder = here / "shipped"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(BASE.replace("max_steps: 6", "max_steps: 77"))
    monkeypatch.setattr(recipes, "recipe_folder", lambda: folder)
    assert config(capsys, "--config", "tiny")["trainer"]["max_steps"] == 77
    assert config(capsys, "--config", "base.yaml")["trainer"]["max_steps"] == 6
    assert "did you mean tiny" in failure(capsys, "fit", "--config", "tinny")


def fit(*words):
    assert cli.main(["fit", "--config", "base.yaml", *words]) == 0


def test_run_folder_holds_config_checkpoints_and_curves(here):
    fit()
    names = {re.sub(r"events\..*", "events", path.name) for path in (here / "out").iterdir()}
    assert names == {"config.yaml", "checkpoints", "events", "hparams.yaml"}
    assert sorted(path.name for path in (here / "out/checkpoints").iterdir()) == ["epoch=1-step=6.ckpt", "last.ckpt"]
    fit("--model.learning_rate", "0.5")  # a second run into the same folder must not leave a stale last.ckpt
    assert "last-v1.ckpt" not in {path.name for path in (here / "out/checkpoints").iterdir()}
    saved = torch.load(here / "out/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["learning_rate"] == 0.5


def test_config_beats_what_the_checkpoint_remembers(here, capsys):
    fit()
    saved = torch.load(here / "out/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["losses"]["abs"]["init_args"]["weight"] == 0.5
    capsys.readouterr()
    words = ["--config", "base.yaml", "--ckpt_path", "out/checkpoints/last.ckpt", "--model.losses.abs.weight", "0.125"]
    assert cli.main(["test", *words]) == 0
    bias = saved["state_dict"]["layer.bias"].item()
    assert f"TEST {{'square': 1.0, 'abs': 0.125}} bias={bias:.6f}" in capsys.readouterr().out
    assert yaml.safe_load((here / "out/config.yaml").read_text())["model"]["init_args"]["losses"]["abs"] == ABS
    assert (here / "out/config_test.yaml").exists()


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(here):
    fit("--trainer.max_steps", "8")
    shutil.move("out", "whole")
    fit("--trainer.max_steps", "4")
    fit("--trainer.max_steps", "8", "--ckpt_path", "out/checkpoints/last.ckpt")
    whole, resumed = (torch.load(f"{f}/checkpoints/last.ckpt", weights_only=True) for f in ("whole", "out"))
    assert whole["global_step"] == resumed["global_step"] == 8
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())


def test_saved_config_runs_again(here):
    fit()
    assert cli.main(["validate", "--config", "out/config.yaml", "--ckpt_path", "out/checkpoints/last.ckpt"]) == 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_evaluation_is_logged_at_the_step_of_its_checkpoint(here):
    saving = ["--checkpoint.every_n_train_steps", "4", "--checkpoint.save_top_k", "-1"]
    fit(*saving)
    (checkpoint,) = Path("out/checkpoints").glob("*step=4.ckpt")
    words = ["--trainer.default_root_dir", "evaluated", "--ckpt_path", str(checkpoint)]
    assert cli.main(["validate", "--config", "base.yaml", *saving, *words]) == 0
    events = EventAccumulator("evaluated")
    events.Reload()
    (logged,) = events.Scalars("val/loss")
    during = EventAccumulator("out")
    during.Reload()
    assert logged.step == 3  # counted from 0, as in the fit
    assert logged.step in {event.step for event in during.Scalars("val/loss")}


def test_any_logger_leaves_checkpoints_where_last_finds_them(here):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "csv"]
    fit("--trainer.max_steps", "4", *logger)
    fit("--trainer.max_steps", "8", *logger, "--ckpt_path", "last")
    assert torch.load("out/checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    counts = torch.load("out/checkpoints/last.ckpt", weights_only=True)["loops"]["fit_loop"][
        "epoch_loop.batch_progress"
    ]
    assert counts["total"]["ready"] == 8  # it went on, and did not begin afresh
    assert not list(Path("csv").rglob("*.ckpt"))
    saved = next(Path("csv").rglob("config.yaml"))
    assert yaml.safe_load(saved.read_text())["checkpoint"]["dirpath"] is None
    fit("--config", str(saved), "--trainer.default_root_dir", "moved", "--trainer.max_steps", "1")
    assert Path("moved/checkpoints/last.ckpt").exists()


def test_interrupt_is_no_traceback(monkeypatch):
    def interrupt(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert cli.main(["quickstart"]) == 130


def test_checkpointing_and_logging_can_be_switched_off(here):
    fit("--trainer.enable_checkpointing", "false", "--trainer.logger", "false")
    assert {path.name for path in (here / "out").iterdir()} == {"config.yaml"}


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--config", "nope.yaml"], r"no config file and no shipped recipe is named 'nope\.yaml'"),
        (["--config", "broken.yaml"], r"broken\.yaml:3: not valid YAML"),
        (["--config", "list.yaml"], r"list\.yaml: expected a mapping"),
        (["--config", "latin.yaml"], r"latin\.yaml: not a text file in UTF-8"),
        (["--trainer.max_stepss", "3"], r"--trainer\.max_stepss 3; did you mean 'trainer\.max_steps'\?"),
        (["--config", "typo.yaml"], r"'trainer\.max_stepz'; did you mean 'trainer\.max_steps'\?"),
        (["--trainer.max_steps", "three"], r"trainer\.max_steps.*Got value: three"),
        (["--model.learning_rat", "1"], r"'learning_rat' is not accepted.*did you mean 'learning_rate'\?"),
        (["--model.losses.abs.weigth", "1"], r"MeanAbs.*'weigth' is not accepted.*did you mean 'weight'\?"),
        (["--model.losses.asb.weight", "1"], r"losses\.asb\.weight = 1\); a new entry needs its own class_path"),
        (["--model.losses.asb", "null"], r"losses\.asb is new and needs a class_path; did you mean 'abs'\?"),
        (["--config", "new.yaml"], r"new\.yaml: losses\.asb is new and needs a class_path; did you mean 'abs'\?"),
        (["--model", "cli_dummies.TinyModul"], r"no attribute 'TinyModul'; did you mean 'TinyModule'\?"),
        (["--model", "cli_dummy.TinyModule"], r"No module named 'cli_dummy'"),
        (["--data.size", "0"], r"^size must be at least 1, got 0$"),
        (["--ckpt_path", "no.ckpt"], r"Checkpoint file not found: no\.ckpt"),
        (["--ckpt_path", "base.yaml"], r"cannot read checkpoint base\.yaml"),
        (["--model.nan_from_step", "3"], r"nan at optimizer step 3 .*not finite: square = nan"),
        (["--trainer.default_root_dir", "null"], r"^trainer\.default_root_dir: expected the folder .* got null"),
        (["--trainer.default_root_dir", "base.yaml/out"], r"cannot write to the output folder base\.yaml/out"),
        (["--trainer.default_root_dir", "/proc/out"], r"cannot write to the output folder /proc/out"),
    ],
)
def test_mistake_ends_in_one_clear_line_and_leaves_nothing_half_written(here, capsys, words, pattern):
    (here / "broken.yaml").write_text("model:\n  losses: [1,\n")
    (here / "list.yaml").write_text("- model\n")
    (here / "latin.yaml").write_bytes("# café".encode("latin-1"))
    (here / "typo.yaml").write_text("trainer: {max_stepz: 3}")
    (here / "new.yaml").write_text("model: {losses: {asb: {weight: 3}}}")
    line = failure(capsys, "fit", "--config", "base.yaml", *words)
    assert re.search(pattern, line), line
    assert not (here / "out/checkpoints/last.ckpt").exists()


def test_missing_options_and_commands_are_named(here, capsys):
    assert "data, fit.model" in failure(capsys, "fit")
    assert "unknown command 'fti'" in failure(capsys, "fti")
    assert "quickstart takes --force" in failure(capsys, "quickstart", "--fast")


def test_traceback_on_request(here, monkeypatch):
    monkeypatch.setenv("CVAE_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="nope"):
        cli.main(["fit", "--config", "nope"])


def test_a_bug_keeps_its_traceback(here):
    (here / "buggy.py").write_text(
        "from cli_dummies import TinyData\n"
        "class Buggy(TinyData):\n    def train_dataloader(self):\n        return {}['missing']\n"
    )
    with pytest.raises(KeyError, match="missing"):
        cli.main(["fit", "--config", "base.yaml", "--data", "buggy.Buggy"])


def test_help_documents_trainer_classes_and_losses(here, capsys):
    assert cli.main(["fit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--trainer.max_steps" in text
    assert "repeatable: later files win, `losses` merge by name" in text
    assert "=== losses (model.init_args.losses.<name>.class_path): cvae_lightning.losses." in text
    assert "WeightSchedule" in text
    assert "share of each cycle, in (0, 1]" in text
    for shown in ("modules.LatentSeeding", "modules.LoRA", "tasks.GridPathfinding", "modules.SharedDiscreteCVAE"):
        assert f"cvae_lightning.{shown} " in text or f"cvae_lightning.data.{shown} " in text
    assert "cvae_lightning.modules.CVAEModule" not in text


USER_LOSS = """\
from cvae_lightning.losses.base import LossCallback
class Mine(LossCallback):
    def __init__(self, weight: float = 1.0, bonus: float = 0.0) -> None:
        super().__init__(weight)
        self.bonus = bonus
    def forward(self, outputs):
        return outputs.square().mean() + self.bonus
"""


def test_a_users_own_loss_file_works_from_the_working_folder(here):
    """In a process of its own, through the console script's module."""
    (here / "my_loss.py").write_text(USER_LOSS)
    (here / "mine.yaml").write_text("model: {losses: {mine: {class_path: my_loss.Mine, init_args: {bonus: 2.5}}}}")
    shutil.copy(Path(__file__).with_name("cli_dummies.py"), here)
    words = ["fit", "--config", "base.yaml", "--config", "mine.yaml", "--model.losses.mine.weight", "0.75"]
    command = [sys.executable, "-P", "-m", "cvae_lightning.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "litlogger" not in done.stderr
    saved = torch.load(here / "out/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["losses"]["mine"]
    assert saved == {"class_path": "my_loss.Mine", "init_args": {"weight": 0.75, "bonus": 2.5}}


@pytest.mark.parametrize("words", [["recipes"], ["export", "--help"]])
def test_a_reader_who_has_seen_enough_meets_no_error(words, monkeypatch):
    """As ``cvae-lightning recipes | head`` does."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is left is written at the end
    command = [sys.executable, "-m", "cvae_lightning.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (128 + signal.SIGPIPE, "")


def test_no_stdout_is_no_error():
    done = subprocess.run(f"exec {sys.executable} -m cvae_lightning.cli recipes >&-", shell=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
