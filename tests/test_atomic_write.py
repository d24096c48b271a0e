import json
import os
import resource
import signal
import stat

import pytest

from cvae_lightning.atomic_write import replacing, write_json, write_text


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "s.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a character: \ud800")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=r"cannot write .*s\.json: disk full; the old one is unchanged"):
        write_json(path, {"a": 2})
    with pytest.raises(OSError, match=r"cannot write .*other\.json: disk full$"):
        write_json(path.with_name("other.json"), {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["s.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.txt"
    write_text(path, "old")
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*s\.txt: File too large; the old one is unchanged"):
            write_text(path, "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["s.txt"]


def test_the_users_mask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "s.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s.txt").stat().st_mode) == 0o640


def test_what_is_being_written_has_another_name(tmp_path):
    path = tmp_path / "s.txt"
    with replacing(path, tmp_path / ".s.tmp") as file:
        file.write(b"half")
        file.flush()
        assert os.listdir(tmp_path) == [".s.tmp"]
    assert os.listdir(tmp_path) == ["s.txt"]
