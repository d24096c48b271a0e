"""Runs killed behind an epoch's end, with the checkpoints that Lightning saves there by default, go on exactly."""

import signal

import pytest
import yaml
from forked_commands import same
from interruptions import killing


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return killing.prepare(tmp_path_factory.mktemp("epoch_ends"))


WATCH = """
    def on_train_batch_start(self, trainer, *args):
        if os.environ.get("END_AT") == str(trainer.fit_loop.epoch_loop.total_batch_idx):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
"""


@pytest.mark.parametrize("saved_at", ["epoch's end", "last batch"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_goes_on_behind_epochs_as_if_it_had_never_stopped(here, accumulated, saved_at):
    (here / "watcher.py").write_text(killing.WATCHER + WATCH)
    steps = -(-11 // accumulated)  # 11 batches an epoch
    config = yaml.safe_load((here / "entangled.yaml").read_text())
    config["checkpoint"] = {"dirpath": "checkpoints"}
    if saved_at == "last batch":
        config["checkpoint"]["every_n_train_steps"] = steps
    own = {"max_steps": 3 * steps, "accumulate_grad_batches": accumulated}
    config["trainer"] = {**config["trainer"], **own, "val_check_interval": None, "check_val_every_n_epoch": 1}
    name = f"{saved_at[-5:]}{accumulated}"
    (here / f"{name}.yaml").write_text(yaml.safe_dump(config))
    whole = here / f"{name}-whole"
    assert killing.finish(whole, name)[0] == 0
    for number, stops in ((signal.SIGKILL, [13]), (signal.SIGTERM, [10]), (signal.SIGKILL, [13, 23])):
        folder = here / f"{name}-{number.name}-{len(stops)}"
        for i, batch in enumerate(stops):
            code, _ = killing.finish(folder, name, END_AT=str(batch), SIGNAL=str(int(number)))
            assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL), (folder / "log.txt").read_text()
            assert killing.saved(folder)["global_step"] == (i + 1) * steps
        assert killing.finish(folder, name)[0] == 0
        assert same(killing.end_state(folder), killing.end_state(whole))
        values, expected = killing.seen(folder), killing.seen(whole)
        assert values.keys() <= expected.keys()
        assert all(values[key] == expected[key] for key in values)
        assert {key for key in expected if key[0] == "train"} <= values.keys()
