"""Several processes of one launch: what they are to each other, and errors that all of them meet."""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from cvae_lightning import cli, launch

LAUNCHERS = {
    "torchrun": lambda rank: {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "3", "RANK": rank, "LOCAL_RANK": rank},
    "srun": lambda rank: {"SLURM_NTASKS": "3", "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def start(environment, log, function):
    def child():
        os.environ.update(environment)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 2)
        os.close(1)
        import sys

        sys.stderr = os.fdopen(2, "w", buffering=1)
        os._exit(function())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def codes(processes):
    for process in processes:
        process.join(30)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_error_that_every_process_meets_is_shown_once(tmp_path, launcher, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    log = tmp_path / "log"
    for times in (1, 2):  # a second launch says it again
        ranks = [LAUNCHERS[launcher](str(rank)) for rank in range(3)]
        assert codes([start(rank, log, lambda: cli.main(["fitt"])) for rank in ranks]) == [1, 1, 1]
        lines = log.read_text().splitlines()
        assert len(lines) == times
        assert all(line.startswith("cvae-lightning: error: unknown command 'fitt'") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_errors_that_differ_are_all_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", 0.2)
    words = ("fitt", "tset")
    ranks = [(LAUNCHERS["torchrun"](str(rank)), word) for rank, word in enumerate(words)]
    processes = [start(rank, tmp_path / "log", lambda word=word: cli.main([word])) for rank, word in ranks]
    assert codes(processes) == [1, 1]
    lines = sorted((tmp_path / "log").read_text().splitlines())
    assert [line.split("'")[1] for line in lines] == sorted(words)


def test_one_process_alone_leaves_no_mark_and_does_not_wait(tmp_path):
    begun = time.monotonic()
    with launch.said_once("x") as first:
        assert first
        assert [*tmp_path.iterdir()] == []
    assert time.monotonic() - begun < 1


def test_the_mark_of_a_process_that_was_killed_silences_nobody(monkeypatch):
    for name, value in LAUNCHERS["torchrun"]("0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "PATIENCE", 0.05)
    with launch.said_once("x") as first, launch.said_once("x") as second:
        assert (first, second) == (True, False)
        with launch.said_once("y") as other:
            assert other
        (mark,) = Path(tempfile.gettempdir()).iterdir()
        os.utime(mark, (0, 0))
        with launch.said_once("x") as again:
            assert again
    assert [*Path(tempfile.gettempdir()).iterdir()] == []


def test_a_process_whose_peer_is_gone_says_so_in_a_line(monkeypatch, capsys):
    def lost(words):
        raise RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")

    monkeypatch.setattr(cli, "_run", lost)
    with pytest.raises(RuntimeError, match="gloo"):
        cli.main(["fit"])  # alone, it is no such thing
    monkeypatch.setattr(launch, "PATIENCE", 0.0)
    for name, value in LAUNCHERS["srun"]("1").items():
        monkeypatch.setenv(name, value)
    assert cli.main(["fit"]) == 1
    expected = "cvae-lightning: error: another process of this run has ended; what it said before says why\n"
    assert capsys.readouterr().err == expected
