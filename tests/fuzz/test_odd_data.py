"""Odd but lawful data through the public commands: trained on and tested, or refused in one message."""

import json

import pytest
import torch
from fuzz.targets import TASKS, templates
from user_folder import enter_user_folder, failure, write_rows

from cvae_lightning import cli
from cvae_lightning.outputs import Record

pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore:.*are in train_path too.*")

ONE = {"x": "7", "y": "7=0", "s": "a"}
ODD = ["مرحبا", "שלום\u202e1", "0\x001", "e\u0301\r\n1", "👩‍👩‍👧", "\ufeff1", "1\u20282"]
FILES = {
    "one label": [{"x": f"{i}", "y": f"{i}={i % 7}", "s": "a"} for i in range(8)],
    "unlabelled": [{"x": f"{i}", "y": f"{i}={i % 7}", "s": ""} for i in range(8)],
    "duplicates": [ONE] * 8,
    "one record": [ONE],
    "characters of every kind": [{"x": text, "y": text[::-1], "s": "ab"[i % 2]} for i, text in enumerate(ODD)],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    return enter_user_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize("case", FILES)
def test_odd_data_is_trained_on_and_tested(here, case):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in FILES[case])
    for name in ("train.jsonl", "val.jsonl"):
        (here / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert cli.main(["fit", "--config", "run.yaml", "--trainer.max_steps", "2"]) == 0
    assert cli.main(["test", "--config", "run.yaml", "--ckpt_path", "out/checkpoints/last.ckpt"]) == 0
    summary = json.loads((here / "out/summary.json").read_text())
    assert summary["marginal_nll"] > 0
    assert (summary["alignment_one_to_one"] is None) == (case == "unlabelled")
    saved = torch.load(here / "out/checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_one_record_cannot_be_divided(here, capfd):
    write_rows(here / "train.jsonl", [ONE])
    message = failure(capfd, "fit", "--config", "run.yaml", "--data.val_path", "null")
    assert message.startswith("train_path: 'train.jsonl' has 1 different inputs, too few to split off val_fraction=0.1")


@pytest.mark.parametrize("config", ["{a: 1", "{1: 2", "{null: 1}", "{a: &a [*a]}", "{model: {? [a] : b}}"])
def test_a_config_on_the_command_line_is_refused_in_one_message(here, capfd, config):
    assert failure(capfd, "fit", "--config", "run.yaml", "--config", config).startswith("--config")


def test_a_config_with_a_mark_of_its_byte_order_is_read(here):
    (here / "run.yaml").write_bytes(b"\xef\xbb\xbf" + (here / "run.yaml").read_bytes().replace(b"\n", b"\r\n"))
    assert cli.main(["fit", "--config", "run.yaml", "--trainer.max_steps", "1"]) == 0


def test_very_long_lines_are_read_from_csv_and_written_into_prompts(here):
    long = "12" * 100_000
    (here / "train.csv").write_text(f"x,y\n1,{long}\n2,3\n")
    from cvae_lightning.data import PairsDataModule

    records = PairsDataModule("train.csv", val_path="train.csv").records("train")
    assert records[0].y == long
    for template in templates():
        assert template.collate(records).y_mask.sum(-1)[0] >= 1


def test_half_a_character_is_refused_by_the_template():
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        templates()[0].collate([Record("\ud800", "1")])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_digits_of_other_scripts_are_no_digits(task):
    import random

    x = task.sample_input(random.Random(0))
    y = task.solve(x, task.strategies[0])
    for text in ("١", "１", "²"):
        other = "".join(text if c.isdigit() else c for c in x)
        assert not task.is_correct(other, y)
        assert task.final_answer(f"{y[:-1]}{text}") is None
