"""SIGTERM to runs of several processes: all of them end after the same batch, and the run goes on as if it had not."""

import json
import signal

import pytest
import yaml
from forked_commands import end_state, exit_code, same, start_ranks
from interruptions.killing import prepare

SENDER = '''\
"""A user's own callback: sends the signal to its own process where it is told to, and keeps the validations."""
import json, os, signal
from lightning.pytorch import Callback

class Sender(Callback):
    def send(self, trainer, hook, when):
        if [trainer.global_rank, hook, when] in json.loads(os.environ.get("SEND", "[]")):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank in json.loads(os.environ.get("FAIL", "[]")):
            raise ValueError("the moon is full")
        self.send(trainer, "start", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_after_backward(self, trainer, *args):
        self.send(trainer, "backward", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *args):
        self.send(trainer, "validation", trainer.global_step if batch_idx == 0 else -1)

    def on_validation_end(self, trainer, pl_module):
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            with open("seen.jsonl", "a") as file:
                file.write(json.dumps([trainer.global_step, metrics]) + "\\n")
'''


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A user's folder: 5 batches an epoch, two to a step; after every 4 a validation, 4 records here and 3 there."""
    here = prepare(tmp_path_factory.mktemp("several"))
    (here / "sender.py").write_text(SENDER)
    config = yaml.safe_load((here / "discrete.yaml").read_text())
    config["trainer"] |= {"max_steps": 7, "devices": 2, "strategy": "ddp", "val_check_interval": 4}
    config["trainer"]["callbacks"] = [{"class_path": "sender.Sender"}]
    config["data"]["init_args"] |= {"val_size": 7, "eval_batch_size": 1}
    (here / "several.yaml").write_text(yaml.safe_dump(config))
    return here


def fit(here, name, *send, fail=()):
    words = ["fit", "--config", "../several.yaml", "--ckpt_path", "last"]
    ranks = start_ranks(here / name, words, 2, SEND=json.dumps(send), FAIL=json.dumps(fail))
    return [exit_code(rank, 200) for rank in ranks]


def end_of(folder):
    return end_state(folder / "checkpoints/last.ckpt")


def validations(folder):
    return dict(json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines())


INTERRUPTIONS = [
    ([(0, "start", 4), (1, "backward", 4)], 3),  # both, at different moments of the last batch of an epoch
    ([(1, "start", 6)], 4),  # one process alone
    ([(0, "validation", 4), (1, "validation", 4)], 4),  # nothing is saved: the validation is repeated
]


def test_all_ranks_end_after_the_same_batch_and_the_run_goes_on(here):
    assert fit(here, "whole") == [0, 0], (here / "whole/log.txt").read_text()
    term, log = 128 + signal.SIGTERM, here / "ended/log.txt"
    for send, saved in INTERRUPTIONS:
        assert fit(here, "ended", *send) == [term, term], log.read_text()
        assert end_of(here / "ended")["global_step"] == saved
    assert fit(here, "ended") == [0, 0], log.read_text()
    assert "Traceback" not in log.read_text()
    assert same(end_of(here / "ended"), end_of(here / "whole"))
    assert same(validations(here / "ended"), validations(here / "whole"))


@pytest.mark.parametrize("fail", [(0, 1), (1,)])
def test_an_error_is_shown_once_and_the_others_end_without_a_traceback(here, fail):
    folder = here / f"fail{len(fail)}"
    assert fit(here, folder.name, fail=fail) == [1, 1]
    log = (folder / "log.txt").read_text()
    said = [line for line in log.splitlines() if line.startswith("cvae-lightning: error: ")]
    expected = ["the moon is full"] + ["another process of this run has ended; what it said before says why"] * (
        len(fail) == 1
    )
    assert said == [f"cvae-lightning: error: {text}" for text in expected], log
    assert "Traceback" not in log
