import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from cvae_lightning.callbacks.checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def disk_limit():
    """Lets files grow to 100 kB only, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_round_trip_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path, io = tmp_path / "new" / "last.ckpt", AtomicCheckpointIO()
    for value in (1.0, 2.0):
        io.save_checkpoint({"state": torch.full((3,), value), "step": 5, "names": ["a"]}, path)
    loaded = io.load_checkpoint(path)
    assert torch.equal(loaded["state"], torch.full((3,), 2.0))
    assert (loaded["step"], loaded["names"]) == (5, ["a"])
    assert os.listdir(path.parent) == ["last.ckpt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_full_disk_keeps_the_old_file_and_says_so(tmp_path, disk_limit):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*last\.ckpt: File too large.* last save is unchanged"):
        io.save_checkpoint({"step": 2, "state": torch.zeros(100_000)}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_error_that_is_not_the_disks_passes_unchanged_and_keeps_the_old_file(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        io.save_checkpoint({"step": 2, "closure": lambda: None}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write checkpoint .*file/last\.ckpt"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_pickled_objects_and_truncated_files_are_refused_with_the_file_named(tmp_path):
    class Planted:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"x": Planted()}, tmp_path / "planted.ckpt")
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*planted\.ckpt: it holds posix\.mkdir"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "planted.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()

    AtomicCheckpointIO().save_checkpoint({"state": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cannot read checkpoint .*cut\.ckpt: it is truncated"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "cut.ckpt")


WRITER = """
import sys, torch
from cvae_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
for step in range(1, 10**6):
    AtomicCheckpointIO().save_checkpoint({"step": step, "state": torch.full((500_000,), float(step))}, sys.argv[1])
    print(step, flush=True)
"""


def test_kill_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    for _ in range(3):
        process.stdout.readline()
        time.sleep(0.003)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["state"].eq(loaded["step"]).all()
    assert set(os.listdir(tmp_path)) <= {"last.ckpt", ".last.ckpt.tmp"}
