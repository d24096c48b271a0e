"""One owner at a time, whoever dies, sleeps or comes at the same moment."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from cvae_lightning.benchmark import claims
from cvae_lightning.benchmark.claims import Claim, is_claimed


@pytest.fixture
def foreign(tmp_path):
    """Leaves a claim of another process behind, which gave its last sign of life so many seconds ago."""

    def leave(silence, number=0, host="elsewhere", pid=1):
        path = tmp_path / f"claim.{number}"
        path.write_text(json.dumps({"host": host, "pid": pid, "token": "x"}))
        os.utime(path, (time.time() - silence,) * 2)
        return path

    return leave


def test_a_cell_has_one_owner_until_it_is_released(tmp_path):
    claim = Claim.take(tmp_path / "cell")
    assert json.loads(claim.path.read_text())["pid"] == os.getpid()
    assert Claim.take(tmp_path / "cell") is None
    assert is_claimed(tmp_path / "cell")
    assert claim.beat()
    claim.release()
    assert not is_claimed(tmp_path / "cell")
    assert list((tmp_path / "cell").iterdir()) == []
    assert Claim.take(tmp_path / "cell") is not None
    assert not is_claimed(tmp_path / "nothing")


def test_a_silent_owner_is_outbid_and_stops_when_it_wakes(tmp_path, monkeypatch):
    sleeper = Claim.take(tmp_path)
    os.utime(sleeper.path, (0, 0))
    taker = Claim.take(tmp_path)
    assert taker.path.name == "claim.1"
    assert not sleeper.beat()
    assert taker.beat()
    sleeper.release()  # what a stopped owner does must not free the cell of the next one
    assert is_claimed(tmp_path)
    assert Claim.take(tmp_path) is None
    taker.release()
    assert list(tmp_path.iterdir()) == []


def test_a_live_owner_elsewhere_is_left_alone_and_a_stale_one_is_not(tmp_path, foreign):
    foreign(claims.STALE_AFTER - 20)
    assert is_claimed(tmp_path)
    assert Claim.take(tmp_path) is None
    foreign(claims.STALE_AFTER + 20)
    assert not is_claimed(tmp_path)
    assert Claim.take(tmp_path).path.name == "claim.1"


def test_an_owner_known_to_be_dead_is_replaced_sooner_but_not_at_once(tmp_path, foreign):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    here = socket.gethostname()
    foreign(claims.DEAD_AFTER - 20, host=here, pid=gone.pid)  # another container may have the same name
    assert Claim.take(tmp_path) is None
    foreign(claims.DEAD_AFTER + 20, host=here, pid=os.getpid())
    assert Claim.take(tmp_path) is None
    foreign(claims.DEAD_AFTER + 20, host=here, pid=gone.pid)
    assert Claim.take(tmp_path) is not None


def test_a_claim_torn_while_it_was_written_goes_stale_like_others(tmp_path, foreign):
    path = foreign(0)
    path.write_text("")
    assert Claim.take(tmp_path) is None
    os.utime(path, (0, 0))
    assert Claim.take(tmp_path) is not None


def test_a_late_comer_with_another_number_steps_back(tmp_path, foreign, monkeypatch):
    stale, real = foreign(1000, number=3), claims._claims
    seen = [real(tmp_path)]  # what a process saw long ago; since then the cell was run, freed and claimed again
    stale.unlink()
    foreign(1)
    monkeypatch.setattr(claims, "_claims", lambda folder: seen.pop() if seen else real(folder))
    monkeypatch.setattr(claims, "_alive", lambda path, alive=claims._alive: path.exists() and alive(path))
    assert Claim.take(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["claim.0"]


def race(folder, start, wins):
    start.wait()
    for round_ in range(60):
        if Claim.take(folder / str(round_)):
            wins.put(round_)
    wins.put(None)


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_processes_one_wins_each_cell(tmp_path, stale):
    if stale:
        for round_ in range(60):
            (tmp_path / str(round_)).mkdir()
            (tmp_path / str(round_) / "claim.0").write_text("{}")
            os.utime(tmp_path / str(round_) / "claim.0", (0, 0))
    context = multiprocessing.get_context("spawn")
    start, wins = context.Event(), context.Queue()
    takers = [context.Process(target=race, args=(tmp_path, start, wins)) for _ in range(3)]
    for taker in takers:
        taker.start()
    start.set()
    won, running = [], len(takers)
    while running:
        number = wins.get(timeout=60)
        running -= number is None
        won += [] if number is None else [number]
    for taker in takers:
        taker.join()
    assert sorted(won) == list(range(60))
