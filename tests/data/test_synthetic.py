"""Synthetic records: pure, split by input, with the frequencies that were asked for."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from cvae_lightning.data import RecordDataModule, SyntheticDataModule
from cvae_lightning.data.synthetic import split_of
from cvae_lightning.data.tasks import GridPathfinding, LinearEquations, MultidigitAddition, SortingAlgorithms
from cvae_lightning.outputs import Record

DIGEST = """
import hashlib, json, sys
from cvae_lightning.data import SyntheticDataModule
from cvae_lightning.data.tasks import SortingAlgorithms
data = SyntheticDataModule(SortingAlgorithms(), seed=7, frequencies="x_dependent")
rows = [(s, r.x, r.y, r.strategy) for s in ("test", "val", "train") for r in data.records(s)[40:20:-1]]
print(json.dumps([hashlib.sha256(repr(rows).encode()).hexdigest(), data.fingerprint("val")]))
"""


class ListTemplate:
    """Stands in for the prompt template: batches are lists of records."""

    max_length = None

    def collate(self, records):
        return list(records)


def make(task=None, **options):
    data = SyntheticDataModule(task or SortingAlgorithms(), **options)
    data.template = ListTemplate()
    return data


def test_records_are_labelled_solutions_of_their_task():
    data = make(val_size=50)
    assert isinstance(data, RecordDataModule)
    assert data.strategy_names == ["bubble", "insertion", "selection", "merge"]
    records = data.records("val")
    assert len(records) == len(list(records)) == 50
    for i, record in enumerate(records):
        assert record.index == i
        assert data.strategy_names[record.strategy] in data.task.compatible_strategies(record.x, record.y)
    assert records[-1] == records[49]
    assert records[3:6] == [records[3], records[4], records[5]]
    with pytest.raises(IndexError):
        records[50]
    with pytest.raises(ValueError, match="must be one of train, val, test, got 'dev'"):
        data.records("dev")


def test_records_do_not_depend_on_order_size_or_global_randomness():
    data = make(seed=3)
    forward = [data.records("train")[i] for i in range(20)]
    random.seed(123)
    other = make(seed=3, train_size=25, batch_size=2)
    assert [other.records("train")[i] for i in reversed(range(20))] == forward[::-1]
    assert make(seed=4).records("train")[0:20] != forward


def test_records_and_fingerprints_are_the_same_in_another_process():
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", DIGEST]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    data = make(seed=7, frequencies="x_dependent")
    rows = [(s, r.x, r.y, r.strategy) for s in ("test", "val", "train") for r in data.records(s)[40:20:-1]]
    assert json.loads(printed) == [hashlib.sha256(repr(rows).encode()).hexdigest(), data.fingerprint("val")]


def test_fingerprints_tell_configurations_apart():
    prints = [
        make().fingerprint("val"),
        make().fingerprint("train"),
        make(seed=1).fingerprint("val"),
        make(SortingAlgorithms(length=4)).fingerprint("val"),
        make(frequencies=[1, 1, 1, 2]).fingerprint("val"),
        make(val_size=999).fingerprint("val"),
    ]
    assert len(set(prints)) == len(prints)
    assert make(batch_size=7, train_size=9).fingerprint("val") == prints[0]


@pytest.mark.parametrize("task", [SortingAlgorithms(length=4), LinearEquations(), GridPathfinding()])
def test_no_input_is_in_two_splits_under_any_seed(task):
    inputs = {split: set() for split in ("train", "val", "test")}
    for seed in (0, 1):
        data = make(task, train_size=2000, val_size=500, test_size=500, seed=seed)
        for split, xs in inputs.items():
            xs |= {record.x for record in data.records(split)}
    assert not inputs["train"] & inputs["val"]
    assert not inputs["train"] & inputs["test"]
    assert not inputs["val"] & inputs["test"]
    shares = Counter(split_of(str(i)) for i in range(20_000))
    assert shares["train"] / 20_000 == pytest.approx(0.8, abs=0.02)
    assert shares["val"] / 20_000 == pytest.approx(0.1, abs=0.02)


def test_a_task_with_too_few_inputs_is_refused():
    data = make(GridPathfinding(size=4, walls=0))
    with pytest.raises(ValueError, match=r"grid_pathfinding.*too few inputs for the split 'val'"):
        data.records("val")


@pytest.mark.parametrize(
    ("frequencies", "expected"),
    [("uniform", [0.25] * 4), ([4, 3, 2, 1], [0.4, 0.3, 0.2, 0.1]), ([0, 1, 0, 1], [0, 0.5, 0, 0.5])],
)
def test_frequencies_are_met_and_reported(frequencies, expected):
    data = make(MultidigitAddition(2), frequencies=[*frequencies, 0]) if isinstance(frequencies, list) else make()
    expected = [*expected, 0] if isinstance(frequencies, list) else expected
    counts = Counter(record.strategy for record in data.records("train")[:4000])
    assert [counts[s] / 4000 for s in range(len(expected))] == pytest.approx(expected, abs=0.03)
    assert data.strategy_probs("12+34") == pytest.approx(expected)


def test_x_dependent_frequencies_turn_with_the_first_character():
    data = make(frequencies="x_dependent")
    assert data.strategy_probs("00000") == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15])
    assert data.strategy_probs("10000") == pytest.approx([1 / 15, 8 / 15, 4 / 15, 2 / 15])
    assert data.strategy_probs("49999") == data.strategy_probs("00000")
    records = [r for r in data.records("train")[:8000] if r.x[0] in "159"]
    counts = Counter(r.strategy for r in records)
    assert [counts[s] / len(records) for s in range(4)] == pytest.approx([1 / 15, 8 / 15, 4 / 15, 2 / 15], abs=0.04)


@pytest.mark.parametrize("frequencies", [[1, 1], [1, 1, 1, -1], [0, 0, 0, 0], "skewed", [1, 1, 1, float("nan")]])
def test_bad_frequencies_are_refused(frequencies):
    with pytest.raises(ValueError, match="or 4 weights >= 0"):
        make(frequencies=frequencies)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match=r"data\.val_size must be at least 1, got 0"):
        make(val_size=0)
    with pytest.raises(ValueError, match=r"data\.batch_size must be at least 1, got 0"):
        make(batch_size=0)


@pytest.mark.parametrize("frequencies", ["uniform", "x_dependent"])
def test_ceiling_of_a_split_equals_a_count_over_its_records(frequencies):
    data = make(frequencies=frequencies, val_size=400)
    best = 0.0
    for record in data.records("val"):
        by_trace = {}
        for p, name in zip(data.strategy_probs(record.x), data.strategy_names, strict=True):
            by_trace.setdefault(data.task.solve(record.x, name), []).append(p)
        best += sum(map(max, by_trace.values())) / 400
    assert data.alignment_ceiling("val") == pytest.approx(best)
    assert data.ceiling("val").one_to_one == data.alignment_ceiling("val")
    assert 0.9 < best < 1


def test_the_ceiling_is_that_of_the_latents_there_are():
    data = make(val_size=400)
    every = data.alignment_ceiling("val")
    for latents, expected in ((2, 0.5), (4, every), (8, every), (0, every)):
        data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(num_latents=latents))
        assert data.alignment_ceiling("val") == pytest.approx(expected, abs=1e-9 if latents != 2 else 0.03)


def test_alphabet_and_texts_cover_the_records():
    data = make(train_size=300)
    texts = list(data.train_texts())
    assert texts[17] == (data.records("train")[17].x, data.records("train")[17].y)
    assert {c for x, y in texts for c in x + y} <= data.alphabet() == set("0123456789;=")


@pytest.mark.parametrize("bucketing", [False, True])
def test_workers_serve_what_the_process_itself_serves(bucketing):
    task = LinearEquations()
    loaders = [make(task, train_size=200, batch_size=16, num_workers=n, length_bucketing=bucketing) for n in (0, 2)]
    served = []
    for data in loaders:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        served.append([batch for batch in loader])
    assert served[0] == served[1]
    assert len(served[0]) == 12
    assert all(isinstance(record, Record) for batch in served[0] for record in batch)


def test_evaluation_serves_every_record_once_in_order():
    data = make(val_size=70, test_size=10, batch_size=8, eval_batch_size=32)
    batches = list(data.val_dataloader())
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert [r.index for batch in batches for r in batch] == list(range(70))
    assert sum(map(len, data.test_dataloader())) == sum(map(len, data.predict_dataloader())) == 10


def test_a_small_training_split_is_one_batch():
    data = make(train_size=5, batch_size=64)
    (batch,) = data.train_dataloader()
    assert sorted(record.index for record in batch) == [0, 1, 2, 3, 4]


def test_the_command_line_parser_builds_it():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SyntheticDataModule, "data")
    given = {"class_path": "cvae_lightning.data.tasks.SortingAlgorithms", "init_args": {"length": 4}}
    config = parser.parse_object({"data": {"task": given, "frequencies": [1, 2, 3, 4]}})
    data = parser.instantiate(config).data
    assert data.task.length == 4
    assert data.strategy_probs("0123") == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert data.task.spec() == {
        "class_path": "cvae_lightning.data.tasks.sorting_algorithms.SortingAlgorithms",
        "init_args": {"length": 4, "strategies": None},
    }
