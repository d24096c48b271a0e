"""What is fuzzed: for every way in for data of a user or a stranger, a strategy and a function that takes an input.

A target returns "accepted" or "refused". Refused means a ``ValueError`` or ``OSError`` with a message of bounded length
that names the file, where there is one; any other exception, or an accepted input that comes out wrong, is a bug.
"""

import csv
import io
import itertools
import json
import os
import tempfile
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path

import yaml
from hypothesis import strategies as st

from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.benchmark.compose import compose
from cvae_lightning.benchmark.plan import plan, select
from cvae_lightning.benchmark.settings import load_settings
from cvae_lightning.config_merge import merge_model, parse_config, read_config, rewrite_nulls
from cvae_lightning.data import PairsDataModule, tasks
from cvae_lightning.outputs import UNLABELLED, Record
from cvae_lightning.recipes import find_recipe
from cvae_lightning.template import PromptTemplate

LONGEST_MESSAGE = 2000

SPECIAL = [
    *("", " ", "\t", "\0", "a\0b", "\ufeff", "\ufeffx", "\r\n", "a\r\nb", "\n", "\x1a", "\x85", "\u2028", "\u2029"),
    *("مرحبا بالعالم", "שלום", "\u202eabc", "\u2066x\u2069", "e\u0301", "👩‍👩‍👧", "\U0010ffff", "ﬁ", "İ", "ß", "１２"),
    *("<z_0>", "<z>", "</y>", "</x>", "<y>", "<pad>", "<eos>", "<bos>", "<unk>", "<z_0></z><y>1</y>", "<|endoftext|>"),
    *('"', '""', "'", ",", ";", "\t,", "\\", "\\u0000", "{", "}", "[", "]", "NaN", "null", "-0", "1e999", "0x1f", "~"),
    *("a" * 70_000, "ab " * 50_000, "9" * 5_000, "é" * 70_000, "[" * 2_000, "{a: " * 200),
]
TEXT = st.one_of(st.text(max_size=30), st.sampled_from(SPECIAL), st.text("0123456789;=,+-*>#v", max_size=20))
HALF = st.one_of(TEXT, st.sampled_from(["\ud800", "a\udfffb", "\ud83d", "\udc00\ud800"]))
"""Texts that may hold half of a surrogate pair, as JSON can write it."""


def refused(error, *names):
    """Check that an error says what is wrong, and where, in a few words."""
    text = str(error)
    assert isinstance(error, ValueError | OSError), repr(error)
    assert not isinstance(error, UnicodeError), repr(error)
    assert text.strip(), repr(error)
    assert len(text) <= LONGEST_MESSAGE, f"a message of {len(text)} characters: {text[:300]}"
    assert all(name in text for name in names), f"{names} not in {text[:300]}"
    text.encode()  # can be printed
    return "refused"


@cache
def folder():
    """Return a folder for the files of this process, in memory where that is possible."""
    root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = tempfile.TemporaryDirectory(prefix="fuzz-", dir=root)
    _FOLDERS.append(made)
    return Path(made.name)


_FOLDERS = []


# Files of records.

VALUE = st.one_of(HALF, HALF, HALF, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.integers()))
COLUMN = st.one_of(st.sampled_from(["x", "y", "s", "x", "y", "X", " x", "\ufeffx"]), HALF)
ROW = st.one_of(
    st.fixed_dictionaries({"x": TEXT, "y": TEXT}, optional={"s": TEXT}),
    st.fixed_dictionaries({"x": st.sampled_from("123"), "y": TEXT, "s": st.sampled_from(["", "a", "b"])}),
    st.dictionaries(COLUMN, VALUE, max_size=5),
)
JSON_LINE = st.one_of(
    st.builds(lambda row, ascii: json.dumps(row, ensure_ascii=ascii), ROW, st.booleans()),
    st.builds(lambda row: json.dumps(row), ROW),
    st.sampled_from(
        ["", " ", "{", "[]", "1", '"x"', "{}", '{"x": ', '{"x": 1e999}', "[" * 100_000, "9" * 5_000, "nul"]
    ),
    TEXT,
)
CSV_LINE = st.one_of(
    st.lists(TEXT, max_size=4).map(lambda cells: _csv([cells])),
    st.sampled_from(["x,y", "x,y,s", "1,2", "1,2,a", '"1","2', '1,"2"3', "1,2,3,4", ",", "", '"a\nb",c', "x,x"]),
)
END = st.sampled_from(["\n", "\n", "\r\n", "\r"])
ENCODING = st.sampled_from(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "latin-1"])


def _csv(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().removesuffix("\n")


@st.composite
def damaged(draw, texts):
    """Bytes of a text, one in three with something cut out, put in or changed."""
    raw = draw(texts).encode(draw(ENCODING), errors="replace")
    if draw(st.integers(0, 2)):
        return raw
    place, length = draw(st.integers(0, len(raw))), draw(st.integers(0, 8))
    return raw[:place] + draw(st.binary(max_size=8)) + raw[place + length :]


@st.composite
def lines_of(draw, good, any_line):
    """Lines that are right, all but one at most, or anything."""
    kind = draw(st.sampled_from(["right", "right", "all but one", "any"]))
    lines = draw(st.lists(any_line if kind == "any" else good, max_size=8))
    if kind == "all but one":
        lines.insert(draw(st.integers(0, len(lines))), draw(any_line))
    return lines


FILLED = TEXT.filter(str.strip)
GOOD_JSON = st.builds(
    lambda x, y, s, ascii: json.dumps({"x": x, "y": y, "s": s}, ensure_ascii=ascii),
    FILLED, FILLED, st.sampled_from(["", "a", "b"]), st.booleans(),
)  # fmt: skip
GOOD_CSV = st.builds(lambda x, y, s: _csv([[x, y, s]]), FILLED, FILLED, st.sampled_from(["", "a", "b"]))
JSONL = damaged(st.builds(lambda lines, end: end.join(lines), lines_of(GOOD_JSON, JSON_LINE), END))
CSV = damaged(
    st.builds(
        lambda head, lines, end: end.join([head, *lines]),
        st.sampled_from(["x,y,s"] * 4 + ["x,y", "\ufeffx,y,s", "y", ""]),
        lines_of(GOOD_CSV, CSV_LINE),
        END,
    )
)
OPTIONS = st.fixed_dictionaries(
    {"strategy_column": st.sampled_from([None, None, "s"]), "val_fraction": st.sampled_from([0.1, 0.5])}
)


def load(train, suffix, options, val=None):
    """Load files of records through the data module, and check what it makes of them."""
    path = folder() / f"train{suffix}"
    path.write_bytes(train)
    if val is not None:
        (folder() / f"val{suffix}").write_bytes(val)
        options = options | {"val_path": str(folder() / f"val{suffix}")}
    data = PairsDataModule(str(path), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data.setup()
        except ValueError as error:
            return refused(error, f"{suffix}")
    xs = {}
    for split in ("train", "val"):
        records = data.records(split)
        assert records
        xs[split] = {record.x for record in records}
        for i, record in enumerate(records):
            assert record.index == i
            assert record.x.strip()
            assert record.y.strip()
            assert record.strategy == UNLABELLED or 0 <= record.strategy < len(data.strategy_names)
            assert suffix in data.describe(split, i)
        assert len(data.fingerprint(split)) == 16
    assert val is not None or not xs["train"] & xs["val"]
    return "accepted"


def jsonl(given):
    """Load JSONL."""
    return load(given[0], ".jsonl", given[1], given[2])


def comma_separated(given):
    """Load CSV or TSV."""
    return load(given[0], given[3], given[1], given[2])


WHOLE = st.lists(st.tuples(*[TEXT.filter(str.strip)] * 2, st.sampled_from(["", "a", "b", "ж"])), min_size=1, max_size=6)


def round_trip(given):
    """Write whole records as JSONL and CSV; they must come back as they are."""
    rows, ascii, bom, end = given
    lines = [json.dumps(dict(zip("xys", row, strict=True)), ensure_ascii=ascii) for row in rows]
    table = io.StringIO()
    csv.writer(table, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([list("xys"), *rows])
    for suffix, text in ((".jsonl", end.join(lines)), (".csv", table.getvalue())):
        path = folder() / f"whole{suffix}"
        path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
        data = PairsDataModule(str(path), val_path=str(path), strategy_column="s")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = data.records("train")
        names = [*data.strategy_names, ""]
        assert [(r.x, r.y, names[r.strategy]) for r in records] == [*rows], suffix
    return "accepted"


# Prompts.


@cache
def templates():
    """Return a template for each kind of tokenizer."""
    texts = ["0123456789;=,+-*>#v <z_0> </y>", "sort the list: 5 3 1, then 12+7=19.", "é ж ש"]
    built = [build_tokenizer(texts, kind, 300) for kind in ("char", "word", "bpe")]
    return [PromptTemplate(tokenizer, num_latents=3, padding_side="right") for tokenizer in built]


def prompts(given):
    """Write prompts of any texts: no text may become a marker or latent, and byte pairs must decode to y."""
    records = [Record(x, y, UNLABELLED, i) for i, (x, y) in enumerate(given)]
    outcome = "accepted"
    for template in templates():
        special = {*template.marker_ids.values(), *template.all_latent_ids, *template.bos, *template.eos}
        try:
            batch = template.collate(records)
        except ValueError as error:
            outcome = refused(error)
            continue
        for (prefix, y), ids, mask in zip(template.segments(records), batch.y_ids, batch.y_mask, strict=True):
            assert not special & {*prefix[len(template.bos) + 1 : -1]}
            assert not special & {*y[: -1 - len(template.eos)]}
            assert ids[mask].tolist() == y
            assert max([*prefix, *y]) < len(template)
        decoded = template.decode(batch.y_ids)
        if template is templates()[-1]:
            assert decoded == [record.y for record in records]
    return outcome


# Verifiers.

TASKS = [
    tasks.SortingAlgorithms(),
    tasks.SortingAlgorithms(7, ["merge_levels", "reverse_selection"]),
    tasks.GridPathfinding(),
    tasks.MultidigitAddition(),
    tasks.LinearEquations(),
    tasks.BaseConversion(),
    tasks.IntegerMultiplication(),
]


@st.composite
def solved(draw):
    """A task, and two texts that may be an input and a solution of it, a damaged one, or anything."""
    task = draw(st.sampled_from(TASKS))
    x = task.sample_input(draw(st.randoms(use_true_random=False)))
    y = task.solve(x, draw(st.sampled_from(task.strategies)))
    texts = []
    for text in (x, y):
        kind = draw(st.sampled_from(["whole", "whole", "damaged", "alphabet", "any"]))
        if kind == "damaged":
            place = draw(st.integers(0, len(text)))
            put = draw(st.one_of(st.text(task.alphabet, max_size=3), st.sampled_from(SPECIAL)))
            text = text[:place] + put + text[place + draw(st.integers(0, 3)) :]
        elif kind == "alphabet":
            text = draw(st.text(task.alphabet, max_size=20))
        elif kind == "any":
            text = draw(HALF)
        texts.append(text)
    return task, *texts, x, y


def verifier(given):
    """Judge any two texts."""
    task, x, y, whole_x, whole_y = given
    correct, found = task.is_correct(x, y), task.compatible_strategies(x, y)
    assert isinstance(correct, bool)
    assert found <= {*task.strategies}
    assert correct or not found
    assert task.final_answer(y) is None or y.endswith(task.final_answer(y))
    if (x, y) == (whole_x, whole_y):
        assert correct
        assert found
    try:
        task.parse(x)
    except ValueError as error:
        assert not correct
        return refused(error)
    assert task.is_correct(x, f"={task.answer(x)}")
    assert len(task.groups(x)) == len(task.strategies)
    return "accepted"


# Configs.

WORD = st.sampled_from(
    [
        "model",
        "data",
        "trainer",
        "checkpoint",
        "class_path",
        "init_args",
        "dict_kwargs",
        "losses",
        "callbacks",
        "callbacks+",
        "seeds",
        "tasks",
        "recipes",
        "results",
        "options",
        "configs",
        "entangled",
        "folder",
        "group",
        "jobs",
        "threads",
        "test_options",
        "columns",
        "seed_everything",
        "max_steps",
        "every_n_train_steps",
        "default_root_dir",
        "num_latents",
        "weight",
        "kl_prior_loss",
        "free_energy_loss",
        "train_size",
    ]
)
DOTTED = st.one_of(
    st.lists(WORD, min_size=1, max_size=4).map(".".join), st.sampled_from([".", "a.", ".a", "callbacks.*.x"])
)
LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.just(10**40),
    st.floats(),
    TEXT.filter(lambda text: len(text) < 1000),
    WORD,
    st.sampled_from(
        ["discrete_{task}", "entangled_{task}", "discrete_sorting_algorithms", "benchmark/alignment", "/", ".."]
    ),
    st.dates(),
    st.binary(max_size=4),
)
KEY = st.one_of(WORD, WORD, WORD, DOTTED, st.text(max_size=5), st.integers(), st.none(), st.booleans(), st.dates())
TREE = st.recursive(
    LEAF, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEY, inner, max_size=4)), max_leaves=12
)
SEEDS = {
    "recipe": read_config(find_recipe("discrete_sorting_algorithms")),
    "entangled": read_config(find_recipe("entangled_sorting_algorithms")),
    "change": {"model": {"losses": {"kl_prior_loss": {"weight": 0.3}, "router_support_loss": None}}},
    "benchmark": {
        "results": "out",
        "seeds": [1, 2],
        "tasks": {
            "sorting_algorithms": {"entangled": "entangled_sorting_algorithms", "options": {"model.dropout": 0.1}}
        },
        "recipes": {
            "ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}, "group": "ours"},
            "plain": {"configs": ["discrete_{task}", "benchmark/plain_elbo"], "entangled": {"options": {"a.b": 1}}},
        },
        "test_options": {"callbacks.*Evaluation.num_examples": 99},
        "columns": {"NLL": "marginal_nll / baseline_nll"},
    },
}


def _nodes(tree, path=()):
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _nodes(value, (*path, key))


@st.composite
def changed(draw, name):
    """A config that is right, with a few of its entries replaced, renamed, added or taken away."""
    tree = deepcopy(SEEDS[name])
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from([*_nodes(tree)]))
        if not path:
            continue
        node = tree
        for key in path[:-1]:
            node = node[key]
        kind = draw(st.sampled_from(["replace", "replace", "rename", "add", "remove"]))
        value = node.get(path[-1])
        if kind == "replace":
            node[path[-1]] = draw(TREE)
        elif kind == "rename":
            node[draw(KEY)] = node.pop(path[-1])
        elif kind == "remove":
            del node[path[-1]]
        elif isinstance(value, dict):
            value[draw(KEY)] = draw(TREE)
    return tree


YAML_TEXT = st.sampled_from(
    [
        *(
            "a: [",
            "{a: 1",
            "- a",
            "a: &x [*x]",
            "&a {b: *a}",
            "? [a]\n: b",
            "a: !!python/object:os.system x",
            "2001-99-99",
        ),
        *(
            "a: 2001-99-99",
            "a: !!binary x",
            "a: !!int x",
            "a: !!float x",
            "!!set {a}",
            "a: !!timestamp x",
            "%TAG",
            "---",
        ),
        *(
            "a: 1\n---\nb: 2",
            "\t",
            "a:\n\tb",
            "*a",
            "a: *b",
            "<<: 1",
            "<<: [1]",
            "a: {<<: {b: 1}}",
            "'",
            "|",
            "a: 1e999",
        ),
        *("[" * 3000, "{a: " * 3000, "a: " + "9" * 5000, "a: 1:2:3", "a: =", "=: a", "a: !!omap [1]", "!!pairs [1]"),
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    ]
)


DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _dump(tree):
    return yaml.dump(tree, Dumper=DUMPER, sort_keys=False, allow_unicode=True)


CONFIG_FILE = damaged(
    st.one_of(
        YAML_TEXT,
        TEXT,
        st.one_of([changed(name) for name in SEEDS]).map(_dump),
        TREE.map(_dump),
        st.dictionaries(st.text(max_size=4), st.text(max_size=4)).map(json.dumps),
    )
)


def config_file(raw):
    """Read a config file, and the same text from the command line."""
    path = folder() / "config.yaml"
    path.write_bytes(raw)
    try:
        content = read_config(path)
    except ValueError as error:
        outcome = refused(error, "config.yaml")
    else:
        assert isinstance(content, dict)
        outcome = "accepted"
    text = raw.decode(errors="replace")
    try:
        assert isinstance(parse_config(text, "--config"), dict)
    except ValueError as error:
        refused(error, "--config")
    return outcome


MERGED = st.tuples(
    st.lists(st.one_of(changed("recipe"), changed("change"), st.dictionaries(KEY, TREE, max_size=3)), max_size=3),
    st.dictionaries(st.one_of(DOTTED, TEXT), TREE, max_size=2),
)


def merge(given):
    """Merge configs, and set options on top."""
    configs, options = given
    try:
        configs = [parse_config(_dump(config), "--config") for config in configs]
        for before, config in itertools.pairwise(configs):
            merge_model(deepcopy(config), before.get("model"))
        result = compose(configs, options)
    except ValueError as error:
        return refused(error)
    assert isinstance(result, dict)
    return "accepted"


def benchmark(given):
    """Read the config of a benchmark and plan its cells."""
    raw, smoke = given
    path = folder() / "bench.yaml"
    path.write_bytes(raw)
    try:
        settings = load_settings(path)
    except ValueError as error:
        return refused(error, "bench.yaml")
    try:
        cells = plan(settings, smoke)
        select(cells, ["*"])
    except (ValueError, OSError) as error:
        return refused(error)
    names = [cell.name for cell in cells]
    assert len({*names}) == len(names)
    return "accepted"


def words(given):
    """Rewrite a command line."""
    found = rewrite_nulls(given)
    assert len(found) >= len(given) - sum(word == "null" for word in given)
    return "accepted"


OPTION = st.sampled_from(
    ["--model.losses.kl", "--model.init_args.losses.a", "null", "--model.losses.a=null", "fit", "="]
)

TARGETS = {
    "jsonl": (st.tuples(JSONL, OPTIONS, st.one_of(st.none(), JSONL)), jsonl),
    "csv": (
        st.tuples(CSV, OPTIONS, st.one_of(st.none(), CSV), st.sampled_from([".csv"] * 5 + [".tsv"])),
        comma_separated,
    ),
    "round_trip": (st.tuples(WHOLE, st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"])), round_trip),
    "prompts": (st.lists(st.tuples(HALF, HALF), min_size=1, max_size=3), prompts),
    "verifier": (solved(), verifier),
    "config_file": (CONFIG_FILE, config_file),
    "merge": (MERGED, merge),
    "benchmark": (st.tuples(damaged(changed("benchmark").map(_dump)), st.booleans()), benchmark),
    "words": (st.lists(st.one_of(OPTION, TEXT), max_size=6), words),
}
SHARES = {
    "jsonl": 4,
    "csv": 4,
    "round_trip": 2,
    "prompts": 3,
    "verifier": 4,
    "config_file": 4,
    "merge": 4,
    "benchmark": 1,
    "words": 1,
}
"""Relative number of inputs of each target in the long form."""
