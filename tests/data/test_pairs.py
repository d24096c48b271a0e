"""Pairs from files: what is read, and one clear message for everything that cannot be."""

import json
import sys
import types

import pytest

from cvae_lightning.data import PairsDataModule
from cvae_lightning.data.loader import hash_int
from cvae_lightning.outputs import UNLABELLED


def write(path, *rows, newline="\n", bom=b""):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(bom + newline.join(lines).encode() + newline.encode())
    return str(path)


def rows(*names, start=0):
    return [{"x": f"in {start + i}", "y": f"out {start + i}", "strategy": name} for i, name in enumerate(names)]


def load(tmp_path, *train, val=None, **options):
    train_path = write(tmp_path / "train.jsonl", *(train or rows("b", "a")))
    val_path = write(tmp_path / "val.jsonl", *(val or rows("a", start=100)))
    return PairsDataModule(train_path, val_path, **options)


def test_jsonl_rows_become_records_in_the_order_of_the_file(tmp_path):
    data = load(tmp_path, *rows("walk", "run", None, "walk", ""), strategy_column="strategy", val=rows("run", start=9))
    assert data.strategy_names == ["run", "walk"]
    records = data.records("train")
    assert [(r.x, r.y, r.strategy, r.index) for r in records] == [
        ("in 0", "out 0", 1, 0),
        ("in 1", "out 1", 0, 1),
        ("in 2", "out 2", UNLABELLED, 2),
        ("in 3", "out 3", 1, 3),
        ("in 4", "out 4", UNLABELLED, 4),
    ]
    assert [r.strategy for r in data.records("val")] == [0]
    assert list(data.train_texts())[1] == ("in 1", "out 1")
    assert data.alphabet() is None
    assert data.task is None
    assert data.alignment_ceiling("val") is None
    assert data.describe("train", 3).endswith("train.jsonl:4")
    assert not data.has_split("test")
    with pytest.raises(ValueError, match=r"no split 'test': set data\.test_path"):
        data.records("test")


def test_without_a_strategy_column_nothing_is_labelled(tmp_path):
    data = load(tmp_path, *rows("a", "b"))
    assert data.strategy_names == []
    assert {r.strategy for r in data.records("train")} == {UNLABELLED}


def test_byte_order_mark_carriage_returns_blank_lines_and_unicode_are_read(tmp_path):
    odd = "é\u2028☃ 𝔘"
    plain = [{"x": odd, "y": "1"}, {"x": "b", "y": "2"}]
    path = write(tmp_path / "a.jsonl", plain[0], "", "  ", plain[1], newline="\r\n", bom=b"\xef\xbb\xbf")
    table = tmp_path / "b.csv"
    table.write_bytes(b"\xef\xbb\xbf" + f'x,y\r\n"{odd}",1\r\n\r\nb,2\r\n'.encode())
    tabs = tmp_path / "c.tsv"
    tabs.write_bytes(f"y\tx\n1\t{odd}\n2\tb".encode())
    for source in (path, str(table), str(tabs)):
        with pytest.warns(UserWarning, match="2 inputs of val_path are in train_path too"):
            records = PairsDataModule(source, source).records("train")
        assert [(r.x, r.y) for r in records] == [(odd, "1"), ("b", "2")]


def test_csv_cells_may_hold_commas_quotes_and_newlines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('q,x,y\n0,"a,""b""\nc",1\n0,d,2\n')
    val = write(tmp_path / "v.jsonl", {"x": "e", "y": "f"})
    data = PairsDataModule(str(path), val)
    assert [(r.x, r.y) for r in data.records("train")] == [('a,"b"\nc', "1"), ("d", "2")]
    assert data.describe("train", 1).endswith("a.csv:4")


def test_a_share_of_the_inputs_becomes_validation_when_none_is_given(tmp_path):
    many = [{"x": f"question {i // 3}", "y": f"answer {i}"} for i in range(900)]
    path = write(tmp_path / "a.jsonl", *many)
    data = PairsDataModule(path, val_fraction=0.2)
    train, val = data.records("train"), data.records("val")
    assert len(train) + len(val) == 900
    assert len(val) == pytest.approx(180, abs=45)
    assert not {r.x for r in train} & {r.x for r in val}
    assert [r.index for r in val] == list(range(len(val)))
    line = int(data.describe("val", 5).rpartition(":")[2])
    assert many[line - 1] == {"x": val[5].x, "y": val[5].y}
    again = PairsDataModule(write(tmp_path / "b.jsonl", *reversed(many)), val_fraction=0.2, seed=5)
    assert {r.x for r in again.records("val")} == {r.x for r in val}


def test_fingerprints_follow_the_content(tmp_path):
    first = load(tmp_path, *rows("a", "b")).fingerprint("train")
    assert load(tmp_path, *rows("a", "b")).fingerprint("train") == first
    assert load(tmp_path, *rows("a", "b"), strategy_column="strategy").fingerprint("train") != first
    assert load(tmp_path, *rows("a", "b", "c")).fingerprint("train") != first


GOOD = {"x": "1", "y": "2"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"x": "1", "y'], r"train\.jsonl:2: broken JSON: .* at column"),
        ([GOOD, "", "[1]"], r"train\.jsonl:3: expected one JSON object per line, got list"),
        (["[" * 100_000], r"train\.jsonl:1: "),
        ([GOOD, {"x": "1", "z": "2"}], r"train\.jsonl:2: no column 'y'; the columns are 'x', 'z'"),
        ([GOOD, {"x": "", "y": "2"}], r"train\.jsonl:2: column 'x' is empty"),
        ([GOOD, {"x": "1", "y": " \n"}], r"train\.jsonl:2: column 'y' is empty"),
        ([{"x": 5, "y": "2"}], r"train\.jsonl:1: column 'x' must be a text, got int 5"),
        ([{"x": "1", "y": None}], r"train\.jsonl:1: column 'y' must be a text, got NoneType None"),
        (['{"x": "a\\ud800", "y": "b"}'], r"train\.jsonl:1: column 'x' holds half of a surrogate pair"),
        ([""], r"train_path: '.*train\.jsonl' holds no records"),
    ],
)
def test_a_broken_line_is_named(tmp_path, lines, message):
    data = load(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        data.setup()
    with pytest.raises(ValueError, match=message):  # nothing half-read is left behind
        data.records("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x,y\na,b\nc\n", r"t\.csv:3: 1 cells, but the header has 2 columns"),
        (b"x,y\na,b,c\n", r"t\.csv:2: 3 cells"),
        (b'x,y\na,"b\nc\n', r"t\.csv:2: broken CSV: unexpected end"),
        (b'x,y\na,"b"c\n', r"t\.csv:2: broken CSV"),
        (b"x,y\n,b\n", r"t\.csv:2: column 'x' is empty"),
        (b"x,y\na,b\n,\n", r"t\.csv:3: column 'x' is empty"),
        (b"x,x\na,b\n", r"t\.csv:1: a column name appears twice"),
        (b"x;y\na;b\n", r"t\.csv:2: no column 'x'; the columns are 'x;y'"),
        (b"x,y\na,b\n\xff\xfe,c\n", r"t\.csv:3: not UTF-8 text \(byte 0xff\)"),
        (b"", r"holds no records"),
        (b"x,y\n", r"holds no records"),
    ],
)
def test_a_broken_table_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        PairsDataModule(str(path)).setup()


def test_missing_and_unreadable_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"train_path: cannot read '.*none\.jsonl': No such file or directory"):
        PairsDataModule(str(tmp_path / "none.jsonl")).setup()
    with pytest.raises(ValueError, match=r"val_path: cannot read '.*none\.csv'"):
        PairsDataModule(write(tmp_path / "a.jsonl", GOOD), str(tmp_path / "none.csv")).setup()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"cannot tell the format of '.*notes\.txt'.*\.jsonl"):
        PairsDataModule(str(tmp_path / "notes.txt")).setup()


def test_a_strategy_unseen_in_training_has_a_name_and_is_pointed_at(tmp_path):
    data = load(tmp_path, *rows("a", "b"), val=rows("a", "zen", start=9), strategy_column="strategy")
    with pytest.warns(UserWarning, match=r"val\.jsonl:2: strategy 'zen' does not appear in .*; there are 'a', 'b'"):
        data.setup()
    assert data.strategy_names == ["a", "b", "zen"]
    assert [record.strategy for record in data.records("val")] == [0, 2]


def test_a_label_whose_inputs_all_become_validation_does_not_stop_the_run(tmp_path):
    held_out = next(f"q{i}" for i in range(1000) if hash_int(f"val/q{i}") < 0.1 * 2**63)
    given = [*rows(*["common"] * 50), {"x": held_out, "y": "1", "strategy": "rare"}]
    data = PairsDataModule(write(tmp_path / "a.jsonl", *given), strategy_column="strategy")
    with pytest.warns(UserWarning, match=r"a\.jsonl:51: strategy 'rare' does not appear in the training records"):
        data.setup()
    assert data.strategy_names == ["common", "rare"]


def test_labels_may_be_in_the_validation_and_test_sources_alone(tmp_path):
    test_path = write(tmp_path / "test.jsonl", *rows("b", start=200))
    train = [{**row, "strategy": None} for row in rows("a", "a")]
    data = load(tmp_path, *train, val=rows("a", start=100), test_path=test_path, strategy_column="strategy")
    data.setup()
    assert data.strategy_names == ["a", "b"]
    assert [data.records(split)[0].strategy for split in ("train", "val", "test")] == [UNLABELLED, 0, 1]


def test_inputs_of_the_test_source_in_training_are_counted(tmp_path):
    data = load(tmp_path, *rows("a", "a", "a"), test_path=write(tmp_path / "test.jsonl", *rows("a", "a")))
    with pytest.warns(UserWarning, match="2 inputs of test_path are in train_path too, such as 'in 0'"):
        data.setup()


def test_a_missing_strategy_column_is_named(tmp_path):
    data = load(tmp_path, GOOD, strategy_column="method")
    with pytest.raises(ValueError, match=r"train\.jsonl' has no column 'method' for strategy_column; .* 'x', 'y'"):
        data.setup()
    data = load(tmp_path, {**GOOD, "method": 3}, strategy_column="method")
    with pytest.raises(ValueError, match="column 'method' must be a text, got int 3"):
        data.setup()


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"val_fraction must lie between 0 and 1, got 1\.0"):
        PairsDataModule("a.jsonl", val_fraction=1.0)
    with pytest.raises(ValueError, match="must differ"):
        PairsDataModule("a.jsonl", x_column="y")
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"has 1 different inputs, too few to split off val_fraction=0\.1"):
        PairsDataModule(path).setup()


def test_without_the_datasets_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'someone/pairs' is no \.jsonl or \.csv file.*cvae-lightning\[datasets\]"):
        PairsDataModule("someone/pairs").setup()


def test_hugging_face_names_and_folders_are_read(monkeypatch, tmp_path):
    table = {
        "train": [{"x": "1", "y": "a"}, {"x": "2", "y": "b"}],
        "validation": [{"x": "3", "y": "c"}],
        "odd": [{"x": "4", "y": ""}],
    }
    calls = []
    fake = types.ModuleType("datasets")

    def load_dataset(name, config):
        calls.append((name, config))
        if name == "someone/none":
            raise FileNotFoundError("no such data set")
        return table

    fake.load_dataset, fake.load_from_disk = load_dataset, lambda path: table["train"]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = PairsDataModule("someone/pairs:en", "someone/pairs")
    assert [(r.x, r.y) for r in data.records("train")] == [("1", "a"), ("2", "b")]
    assert [r.x for r in data.records("val")] == ["3"]
    assert calls == [("someone/pairs", "en"), ("someone/pairs", None)]
    (tmp_path / "state.json").touch()
    assert [r.x for r in PairsDataModule(str(tmp_path), "someone/pairs").records("train")] == ["1", "2"]
    for source, message in [
        ("someone/pairs#odd", "someone/pairs#odd:1: column 'y' is empty"),
        ("someone/pairs#dev", "has no split 'dev'; it has train, validation, odd"),
        ("someone/none", "train_path: cannot load the data set 'someone/none': no such data set"),
    ]:
        with pytest.raises(ValueError, match=message):
            PairsDataModule(source).setup()


def test_folders_are_read_by_the_real_package(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {name: {"x": [name], "y": ["b"], "label": ["u"]} for name in ("train", "validation")}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"x": "1", "y": "a"}\n')
    data = PairsDataModule(str(tmp_path / "saved"), str(tmp_path / "saved"), strategy_column="label")
    assert [(r.x, r.strategy) for split in ("train", "val") for r in data.records(split)] == [
        ("train", 0),
        ("validation", 0),
    ]
    assert [r.x for r in PairsDataModule(str(tmp_path / "files"), str(tmp_path / "saved")).records("train")] == ["1"]


def test_a_broken_file_in_a_folder_is_named(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"x": "1", "y": \n')
    with pytest.raises(ValueError, match=r"train_path: cannot load the data set '.*files': .*JSON"):
        PairsDataModule(str(tmp_path / "files")).setup()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_objects_is_called_what_it_is(tmp_path, indent):
    (tmp_path / "a.json").write_text(json.dumps(rows("a", "b"), indent=indent))
    with pytest.raises(ValueError, match=r"a\.json:1: expected one JSON object per line, got a list"):
        PairsDataModule(str(tmp_path / "a.json")).setup()
