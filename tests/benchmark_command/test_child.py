"""What a cell's process is told, and what is read from its output."""

import json
import sys

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
