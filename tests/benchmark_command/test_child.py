"""What a cell's process is told, and what is read from its output."""

import json
import sys

import pytest

from cvae_lightning.benchmark.child import Child


def test_a_cell_knows_nothing_of_the_launch_that_the_runner_belongs_to(tmp_path, monkeypatch):
    launch = "SLURM_NTASKS SLURM_PROCID SLURM_JOB_ID RANK LOCAL_RANK WORLD_SIZE GROUP_RANK LOCAL_WORLD_SIZE NODE_RANK"
    names = [*launch.split(), "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
    for name in names:
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("CVAE_LIGHTNING_TEST", "kept")
    words = [sys.executable, "-S", "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    child = Child(words, tmp_path / "log.txt", 2)
    while child.poll() is None:
        pass
    given = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert not given.keys() & set(names)
    assert (given["CVAE_LIGHTNING_TEST"], given["OMP_NUM_THREADS"]) == ("kept", "2")


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -9 $$", "killed by SIGKILL (out of memory?): reading"),
        ("kill -15 $$", "killed by SIGTERM: reading"),
        ("exit 3", "ended with exit code 3: reading"),
        ("echo 'cvae-lightning: error: no disk'; exit 1", "no disk"),
    ],
)
def test_a_failure_says_first_how_it_ended(tmp_path, ending, said):
    child = Child(["sh", "-c", f"echo starting; echo reading; {ending}"], tmp_path / "log.txt", 1)
    while child.poll() is None:
        pass
    assert child.error().splitlines() == [said, *([] if said == "no disk" else ["starting"])]
