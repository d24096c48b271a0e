"""The notebooks as plain Python, with a few steps in the place of many: do they fit the package as it is?

Whole, in a kernel, and with what they claim: ``tests/notebooks/run.py``.
"""

import logging
import math
import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALLER = {
    r"(max_steps(?:=|\": ))\d+": r"\g<1>4",
    r"(val_check_interval(?:=|\": ))\d+": r"\g<1>2",
    r"((?:val|test)_size=)\d+": r"\g<1>32",
    r"(records\(\"\w+\"\)\[:)(?:128|256)": r"\g<1>16",
    r"(num_examples=)\d+": r"\g<1>2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all: the first notebook trains the entangled model of the others."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture
def execute(folder, monkeypatch):
    """Return a function that runs a notebook and returns its variables; all that it sets for itself is undone."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that it is put back
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level

    def run(name):
        source = (NOTEBOOKS / f"{name}.py").read_text(encoding="utf-8")
        for pattern, smaller in SMALLER.items():
            source = re.sub(pattern, smaller, source)
        assert not re.search(r"max_steps\D{1,3}\d\d", source)
        variables = {"__name__": name}
        with warnings.catch_warnings():
            exec(compile(source, f"{name}.py", "exec"), variables)
        return variables

    yield run
    plt.close("all")
    lightning.setLevel(level)


def test_quickstart(execute, folder, capsys):
    found = execute("1_quickstart")
    assert (folder / "runs/notebooks/entangled/baseline.json").exists()
    assert [row["step"] for row in found["history"].rows] == [2, 4]
    assert all(math.isfinite(row[key]) for row in found["history"].rows for key in found["keys"])
    assert 1 / 3 <= found["agreement"] <= 1
    assert capsys.readouterr().out.count(" z2  ") == 3  # every latent writes something for each x


def test_your_own(execute, capsys):
    found = execute("2_your_own")
    weights = [row["train/weight/router_confidence"] for row in found["history"].rows]
    assert weights == pytest.approx([0.0, 1.0, 2.0, 2.0])
    assert all(-1 <= row["train/router_confidence"] <= -1 / 3 for row in found["history"].rows)
    assert float(found["entropy"]) == pytest.approx(math.log(3), abs=1e-5)
    assert capsys.readouterr().out.count("nats per solution") == 3


def test_collapsed_run(execute, capsys):
    found = execute("3_collapsed_run")
    lines = capsys.readouterr().out.splitlines()
    for label in found["keys"].values():
        (line,) = (line for line in lines if line.startswith(label))
        assert all(math.isfinite(float(value)) for value in line.removeprefix(label).split())
    assert len(found["axes"]) == 2
