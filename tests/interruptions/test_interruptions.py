"""A few interruptions of each kind; ``run.py`` beside this file does many and prints figures."""

import re
import signal

import pytest
from forked_commands import same
from interruptions.killing import end_state, finish, interrupt, last_step, prepare, saved, seen
from interruptions.others import kill_benchmark, kill_cache


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("interruptions"))


@pytest.mark.parametrize(("name", "number"), [("entangled", signal.SIGKILL), ("discrete", signal.SIGTERM)])
def test_runs_ended_at_random_moments_come_out_the_same(here, name, number):
    figures = interrupt(here, name, 2, 2, number)
    assert figures.kills == 2
    if number == signal.SIGTERM:
        assert figures.exit_codes <= {143, -signal.SIGTERM}  # before and after Lightning listens to the signal


def test_a_disk_that_fills_up_costs_what_came_after_the_last_checkpoint(here):
    if not (here / "discrete-whole").exists():
        assert finish(here / "discrete-whole", "discrete")[0] == 0
    folder = here / "full"
    code, _ = finish(folder, "discrete", FULL_FROM_STEP="8")
    log = (folder / "log.txt").read_text()
    assert code == 1, log
    message = log.rstrip().splitlines()[-1]
    assert re.fullmatch(
        r"cvae-lightning: error: cannot write checkpoint .*checkpoints/epoch=\d-step=9\.ckpt: File too large; "
        r"epoch=\d-step=6\.ckpt, last\.ckpt, saved before, are unchanged",
        message,
    ), message
    assert saved(folder)["global_step"] == 6
    assert last_step(folder) == 9
    assert finish(folder, "discrete")[0] == 0  # there is room again
    assert same(seen(folder), seen(here / "discrete-whole"))
    assert same(end_state(folder), end_state(here / "discrete-whole"))


def test_a_killed_benchmark_finishes_every_cell(tmp_path):
    assert "1 times SIGKILL" in kill_benchmark(tmp_path, 1, 0)


@pytest.mark.filterwarnings("ignore:.*breaks off at byte.*")  # as it may, killed in the middle of a row
def test_a_killed_cache_reads_back_what_was_written(tmp_path):
    assert "6 times SIGKILL" in kill_cache(tmp_path, 6, 0)
