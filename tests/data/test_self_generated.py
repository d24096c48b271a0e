"""Solutions drawn from the entangled model: what is drawn, what is kept, and that it is drawn once."""

import json
from dataclasses import fields

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from tiny import QUIET, tiny_artifact, tiny_lm
from user_folder import write_rows

from cvae_lightning import cli
from cvae_lightning.backbones import solutions
from cvae_lightning.backbones.solutions import draw_solutions
from cvae_lightning.data import PairsDataModule, SelfGeneration, SyntheticDataModule, self_generated
from cvae_lightning.data.solution_parts import SolutionParts
from cvae_lightning.data.tasks import SortingAlgorithms
from cvae_lightning.losses import FreeEnergyLoss
from cvae_lightning.modules import EntangledLM, SharedDiscreteCVAE
from cvae_lightning.outputs import UNLABELLED, Record
from cvae_lightning.template import PromptTemplate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fingerprint.*", "ignore:most solutions.*", "ignore:.*val_path are in train_path too.*"
)
FEW = {"num_solutions": 4, "batch_size": 16, "max_new_tokens": 20}  # four inputs a part


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture
def prompts(tmp_path):
    """A file of 30 inputs, and one of three solved ones."""
    write_rows(tmp_path / "prompts.jsonl", [{"x": str(i)} for i in range(30)])
    write_rows(tmp_path / "val.jsonl", [{"x": f"9{i}", "y": f"{i}=9"} for i in range(3)])
    return str(tmp_path / "prompts.jsonl"), str(tmp_path / "val.jsonl")


def fit(data, folder, module=None, **options):
    """Train for a step and return the data module."""
    options = QUIET | {"max_steps": 1, "default_root_dir": str(folder)} | options
    L.Trainer(**options).fit(module, data)
    return data


def attach(data, module, folder):
    """Give the data module a trainer that trains nothing."""
    data.trainer = L.Trainer(**QUIET, default_root_dir=str(folder))
    data.trainer.strategy._lightning_module = module
    data.template = module.template


def cvae(artifact):
    torch.manual_seed(0)
    return SharedDiscreteCVAE(artifact, {"free_energy_loss": FreeEnergyLoss()}, num_latents=2)


def never(*args, **kwargs):
    raise AssertionError("solutions were drawn again")


# What is drawn.


def exact_first_token(lm, template, x):
    """p(first token of y|x) from one plain forward pass, markers left out."""
    ids, _ = template.prefixes([x])
    ids = torch.cat([ids, torch.tensor([[template.marker_ids["<y>"]]])], -1)
    logits = lm.eval()(ids).logits[0, -1].double()
    logits[[i for token, i in template.marker_ids.items() if token != "</y>"]] = float("-inf")
    return logits.softmax(-1)


@pytest.fixture
def spy(monkeypatch):
    """What goes into generation, and what comes out."""
    seen = {}
    real = solutions.generate_within

    def record(lm, ids, mask, end, *args, **options):
        out = real(lm, ids, mask, end, *args, **options)
        seen.update(ids=ids, mask=mask, end=end, banned=options["banned"].tolist(), out=out)
        return out

    monkeypatch.setattr(solutions, "generate_within", record)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_solutions_have_the_probabilities_of_the_model(spy, family, temperature, top_p):
    lm, template = tiny_lm(family)
    probs = exact_first_token(lm, template, "12").log().div(temperature).softmax(-1)
    if top_p < 1:
        order = probs.argsort(descending=True)
        least = int((probs[order].cumsum(-1) < top_p).sum()) + 1
        probs = torch.zeros_like(probs).index_copy(0, order[:least], probs[order[:least]])
        probs /= probs.sum()
    ys = draw_solutions(lm, template, ["7", "12"], 1500, 6, 3, temperature=temperature, top_p=top_p)
    assert len(ys) == 3000
    found = torch.bincount(spy["out"][1500:, 0], minlength=len(probs)) / 1500
    assert 0.05 < probs.max() < 0.999
    error = (found - probs).abs() / (probs * (1 - probs) / 1500).sqrt().clamp_min(1 / 1500)
    assert error.max() < 4.5  # standard errors


def test_a_solution_ends_with_its_marker_and_fits_a_record():
    lm, template = tiny_lm()
    ys = draw_solutions(lm, template, ["1", "23"], 50, 20, 0)
    assert draw_solutions(lm, template, ["1", "23"], 50, 20, 0) == ys
    assert draw_solutions(lm, template, ["1", "23"], 50, 20, 1) != ys
    lengths = [len(y) for y in ys if y is not None]
    assert 0 < max(lengths) < 20  # with </y> at most 20 tokens
    assert {*"".join(y for y in ys if y)} <= {*"0123456789;="}
    assert all(y is None for y in draw_solutions(lm, template, ["1"], 50, 1, 0))  # none, or empty
    short = PromptTemplate(template.tokenizer, max_length=14)
    limited = [y for y in draw_solutions(lm, short, ["1"], 200, 20, 0) if y]
    assert limited
    assert max(map(len, limited)) == 14 - 8 - 2  # <bos> <x> 1 </x>, the latent section, and </y> <eos>


def test_inputs_without_room_are_refused_or_left_out():
    lm, template = tiny_lm()
    with pytest.raises(ValueError, match=r"begins with '55.*no room for a solution in the 64 tokens"):
        draw_solutions(lm, template, ["1", "5" * 60], 2, 20, 0)
    skipping = PromptTemplate(template.tokenizer, on_overflow="skip")
    ys = draw_solutions(lm, skipping, ["5" * 60, "1"], 30, 20, 0)
    assert ys[:30] == [None] * 30
    assert ys[30:] == draw_solutions(lm, template, ["1"], 30, 20, 0)
    assert draw_solutions(lm, skipping, ["5" * 60], 2, 20, 0) == [None] * 2


@pytest.mark.parametrize("options", [{}, {"prompt": "{x}=", "stop": ["0"]}], ids=["markers", "plain"])
def test_a_long_input_does_not_cut_short_the_solutions_of_others(options):
    lm, template = tiny_lm()
    short = [str(i) for i in range(8)]
    alone = [y for y in draw_solutions(lm, template, short, 12, 40, 0, **options) if y]
    longest = "7" * 46
    beside = draw_solutions(lm, template, [*short[:4], longest, *short[4:]], 12, 40, 0, **options)
    others = [y for y in beside[:48] + beside[60:] if y]
    assert max(map(len, alone)) > 12 < max(map(len, others))
    assert abs(len(others) - len(alone)) < 24
    fits = 64 - (4 + 46) - 4 - 2  # <bos> <x> x </x>, the latent section, and </y> <eos>
    assert max(len(y) for y in beside[48:60] if y) <= fits + 1 < 12


def test_a_plain_prompt_is_continued_without_markers(spy):
    lm, template = tiny_lm()
    stopped = draw_solutions(lm, template, ["1", "234"], 40, 30, 0, prompt="{x}=", stop=(";", "="))
    assert template.tokenizer.batch_decode(spy["ids"])[::40] == ["<pad><pad>1=", "234="]
    assert spy["mask"][0].tolist() == [False, False, True, True]
    assert spy["end"] == template.tokenizer.eos_token_id
    assert {*spy["banned"]} == {*template.marker_ids.values()}
    assert sum(y is not None for y in stopped) > 20
    assert not any(";" in y or "=" in y for y in stopped if y)
    ended = draw_solutions(lm, template, ["1", "234"], 40, 30, 0, prompt="{x}=")
    assert any(y and ";" in y for y in ended)


def test_a_plain_prompt_takes_no_room_of_the_record():
    lm, template = tiny_lm()
    options = {"prompt": "1+1=2;2+2=4;3+3=6;{x}=", "stop": (";", "=")}
    short = PromptTemplate(template.tokenizer, template.num_latents, max_length=24)
    free, limited = (draw_solutions(lm, t, ["1", "234"], 200, 20, 0, **options) for t in (template, short))
    drawn = [Record(x, y or "") for x, y in zip(["1"] * 200 + ["234"] * 200, free, strict=True)]
    lengths = [short.length(*segment) for segment in short.segments(drawn)]
    assert limited == [y if n <= 24 else None for y, n in zip(free, lengths, strict=True)]
    assert sum(y is not None for y in limited) > 50
    message = r"the plain prompt of the input that begins with '234' leaves no room .* in the model's 64 positions"
    with pytest.raises(ValueError, match=message):
        draw_solutions(lm, short, ["234"], 2, 20, 0, prompt="1" * 70 + "{x}=", stop=(";",))


def test_a_plain_prompt_needs_something_that_ends_it():
    lm, template = tiny_lm()
    template.tokenizer.eos_token = None
    template = PromptTemplate(template.tokenizer)
    with pytest.raises(ValueError, match="no end of text, so that a solution behind a plain prompt needs a `stop`"):
        draw_solutions(lm, template, ["1"], 2, 5, 0, prompt="{x}")
    assert any(draw_solutions(lm, template, ["1"], 40, 20, 0, prompt="{x}", stop=("=",)))


# Kept on disk.


def letters(xs, seed):
    """Two solutions of each input, which depend on the seed; that of 'c' does not end."""
    return [None if x == "c" else f"{x}{n}{seed % 97}" for x in xs for n in range(2)]


def parts_of(folder, seed=0):
    return SolutionParts(folder, "train", "abc", list("abcdefg"), 3, seed)


@pytest.mark.parametrize("word", ["other", "another", "third"])  # which file lies first is chance
def test_all_processes_take_the_same_part_where_two_runs_have_drawn_it(tmp_path, word):
    def one(xs, seed):
        return [f"{x} one" for x in xs]

    def other(xs, seed):
        if not list(parts_of(tmp_path).folder.glob("000002-*")):
            parts_of(tmp_path).fill(one, False)  # another run with the same folder is a little quicker
        return [f"{x} {word}" for x in xs]

    drawn = parts_of(tmp_path).fill(other, False)
    assert len(list(parts_of(tmp_path).folder.glob("000000-*"))) == 2
    assert drawn == parts_of(tmp_path).load()


def test_parts_are_drawn_once_and_a_killed_run_goes_on(tmp_path):
    whole = parts_of(tmp_path / "whole").fill(letters, False)
    assert [x for x, _ in whole] == list("aabbddeeffgg")
    calls = []

    def dies(xs, seed):
        calls.append(xs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return letters(xs, seed)

    with pytest.raises(KeyboardInterrupt):
        parts_of(tmp_path / "killed").fill(dies, False)
    with pytest.raises(ValueError, match=r"train-abc lacks solutions that rank zero has drawn"):
        parts_of(tmp_path / "killed").load()
    calls.append(None)
    assert parts_of(tmp_path / "killed").fill(dies, False) == whole
    assert calls == [list("abc"), list("def"), ["g"], None, ["g"]]
    assert parts_of(tmp_path / "killed").fill(never, False) == parts_of(tmp_path / "killed").load() == whole
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole/train-abc").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "killed/train-abc").iterdir()}
    assert parts_of(tmp_path / "other", seed=1).fill(letters, False) != whole


@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_torn_part_is_drawn_again(tmp_path, harm):
    whole = parts_of(tmp_path).fill(letters, False)
    (path,) = tmp_path.glob("train-abc/000001-*")
    before = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(before[:-3] if harm == "cut" else before.replace(b"d", b"D", 1))
    again = []

    def draw(xs, seed):
        again.append(xs)
        return letters(xs, seed)

    if harm == "gone":
        assert parts_of(tmp_path).fill(draw, False) == whole
    else:
        with pytest.warns(UserWarning, match=r"000001-\w+\.jsonl is not whole: its solutions are drawn again"):
            assert parts_of(tmp_path).fill(draw, False) == whole
    assert again == [list("def")]
    assert path.read_bytes() == before


# In training.


def test_training_reads_what_the_entangled_model_draws(tmp_path, artifact, prompts, monkeypatch):
    train, val = prompts
    options = SelfGeneration(**FEW)
    data = fit(PairsDataModule(train, val, batch_size=8, self_generated=options), tmp_path, cvae(artifact))
    records = data.records("train")
    counts = data.drawn_counts["train"]
    assert counts["inputs"] == 30
    assert len(records) == 120 - counts["unended"] > 50
    assert [r.index for r in records] == list(range(len(records)))
    assert {r.strategy for r in records} == {UNLABELLED}
    xs = [r.x for r in records]
    first = list(dict.fromkeys(xs))
    assert xs[: len(first)] == first  # one solution of every input before the second of any
    assert records[3:5] == [records[3], records[4]]
    assert records[-1] == records[len(records) - 1]
    assert [(r.x, r.y) for r in data.records("val")] == [("90", "0=9"), ("91", "1=9"), ("92", "2=9")]
    assert data.drawn_counts.keys() == {"train"}

    monkeypatch.setattr(self_generated, "draw_solutions", never)
    again = fit(PairsDataModule(train, val, batch_size=8, self_generated=options), tmp_path, cvae(artifact))
    assert list(again.records("train")) == list(records)
    assert again.fingerprint("train") == data.fingerprint("train") != data.given_fingerprint("train")
    assert again.fingerprint("val") == data.given_fingerprint("val")


def test_other_settings_are_drawn_anew(tmp_path, artifact, prompts):
    module, found = cvae(artifact), []
    changes = [{}, {"temperature": 0.7}, {"seed": 1}, {"num_inputs": 7}, {"top_p": 0.5}, {"max_new_tokens": 8}]
    for change in changes:
        data = PairsDataModule(*prompts, self_generated=SelfGeneration(**FEW | change))
        attach(data, module, tmp_path)
        found.append([(r.x, r.y) for r in data.records("train")])
    assert len({*map(tuple, found)}) == len(list(tmp_path.glob("self_generated/train-*"))) == len(changes)
    assert {x for x, _ in found[3]} <= {str(i) for i in range(7)}
    assert max(len(y) for _, y in found[5]) < 8 <= max(len(y) for _, y in found[0])


def test_another_model_or_other_inputs_are_drawn_anew(tmp_path, artifact, prompts):
    train, val = prompts
    kept = tmp_path / "kept"
    options = SelfGeneration(**FEW, folder=str(kept))
    other = cvae(tiny_artifact(tmp_path / "b", seed=5))
    for path, module in ((train, cvae(artifact)), (val, cvae(artifact)), (train, other), (train, cvae(artifact))):
        data = PairsDataModule(path, val, self_generated=options)
        attach(data, module, tmp_path)
        assert data.records("train")
    assert len(list(kept.iterdir())) == 3


def test_training_does_not_depend_on_whether_solutions_were_on_disk(tmp_path, artifact, prompts):
    states = []
    for _ in range(2):
        module = cvae(artifact)
        torch.manual_seed(1)
        data = PairsDataModule(*prompts, batch_size=8, self_generated=SelfGeneration(**FEW))
        fit(data, tmp_path, module, max_steps=2)
        states.append((torch.rand(3), module.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())


class Dump(L.Callback):
    """Writes what each process trains on, because nothing comes back from a forked process by itself."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        rows = [(r.x, r.y) for r in trainer.datamodule.records("train")]
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(rows))


def test_two_processes_train_on_the_solutions_of_one(tmp_path, artifact, prompts):
    alone = fit(PairsDataModule(*prompts, self_generated=SelfGeneration(**FEW)), tmp_path / "one", cvae(artifact))
    data = PairsDataModule(*prompts, batch_size=4, self_generated=SelfGeneration(**FEW))
    options = {"devices": 2, "strategy": "ddp_fork", "callbacks": [Dump(tmp_path)]}
    fit(data, tmp_path / "two", cvae(artifact), **options)
    expected = [[r.x, r.y] for r in alone.records("train")]
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
    names = [sorted(p.name for p in (tmp_path / run).glob("self_generated/*/*")) for run in ("one", "two")]
    assert names[0] == names[1]


def test_inputs_alone_have_a_validation_split_too_and_predictions_have_no_target(tmp_path, artifact):
    write_rows(tmp_path / "x.jsonl", [{"x": str(i)} for i in range(60)])
    data = PairsDataModule(str(tmp_path / "x.jsonl"), batch_size=8, self_generated=SelfGeneration(**FEW))
    module = cvae(artifact)
    module.c_base = None
    fit(data, tmp_path, module)
    assert module.c_base > 0  # measured on the drawn validation split
    inputs = {split: {r.x for r in data.given_records(split)} for split in ("train", "val")}
    assert not inputs["train"] & inputs["val"]
    for split, xs in inputs.items():
        assert all(r.x in xs and r.y for r in data.records(split))
        assert data.describe(split, 0) == f"record 0 of split {split!r}"
    rows = [row for batch in L.Trainer(**QUIET).predict(module, data) for row in batch]
    assert [row["x"] for row in rows] == [r.x for r in data.given_records("val")]
    assert {row["target"] for row in rows} == {None}


def test_an_entangled_model_is_trained_on_given_solutions_where_there_are_some(tmp_path, artifact, prompts):
    train, val = prompts
    options = SelfGeneration(**FEW)
    data = fit(PairsDataModule(val, val, self_generated=options), tmp_path, EntangledLM(str(tmp_path / "a"), artifact))
    assert not data.drawn_counts
    assert [r.y for r in data.records("train")] == ["0=9", "1=9", "2=9"]
    data = fit(
        PairsDataModule(train, val, self_generated=options), tmp_path, EntangledLM(str(tmp_path / "b"), artifact)
    )
    assert len(data.records("train")) == 120 - data.drawn_counts["train"]["unended"]
    scratch = EntangledLM(str(tmp_path / "c"), config={"model_type": "llama"})
    with pytest.raises(ValueError, match=r"inputs without solutions, and a model from scratch cannot draw any"):
        fit(PairsDataModule(train, val, self_generated=options), tmp_path, scratch)


def test_a_module_without_its_entangled_model_says_so(tmp_path, artifact, prompts):
    module = cvae(artifact)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    alone = cvae(checkpoint["hyper_parameters"]["entangled"])
    with pytest.raises(ValueError, match=r"this module was restored from a checkpoint alone: give model\.entangled"):
        fit(PairsDataModule(*prompts, self_generated=SelfGeneration(**FEW)), tmp_path, alone)


# Synthetic tasks.


def traces(task, xs):
    """Per input the trace of its first strategy, one of nobody with the right answer, and one with a wrong answer."""
    return [y for x in xs for y in (task.solve(x, task.strategies[0]), f"0={task.answer(x)}", "0=1")]


@pytest.mark.parametrize("keep", ["all", "verified"])
def test_the_verifier_labels_and_drops(tmp_path, artifact, monkeypatch, keep):
    task = SortingAlgorithms()
    options = SelfGeneration(num_inputs=20, num_solutions=3, batch_size=12, keep=keep)
    data = SyntheticDataModule(task, train_size=60, val_size=4, test_size=4, self_generated=options)
    monkeypatch.setattr(self_generated, "draw_solutions", lambda lm, template, xs, *a, **k: traces(task, xs))
    attach(data, cvae(artifact), tmp_path)
    records = data.records("train")
    xs = [r.x for r in data.given_records("train")][:20]
    assert [r.x for r in records[:20]] == xs
    for record in records[:20]:
        alone = task.compatible_strategies(record.x, record.y) == {task.strategies[0]}
        assert record.strategy == (0 if alone else UNLABELLED)
    assert {r.strategy for r in records[20:]} == {UNLABELLED}
    assert 0 in {r.strategy for r in records[:20]}
    wrong = {"wrong": 20} if keep == "verified" else {}
    assert data.drawn_counts == {"train": {"inputs": 20, "solutions": 60, "unended": 0} | wrong}
    assert len(records) == 60 - sum(wrong.values())
    assert data.records("val")[0].strategy >= 0


def test_a_verifier_is_asked_for_where_there_is_none(tmp_path, artifact, prompts):
    with pytest.raises(ValueError, match=r"keep: without a task there is no verifier: expected 'all', got 'verified'"):
        fit(PairsDataModule(*prompts, self_generated=SelfGeneration(keep="verified")), tmp_path, cvae(artifact))


# Bad options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inputs": 0}, r"data\.self_generated\.num_inputs must be at least 1, got 0"),
        ({"num_solutions": 0}, "num_solutions must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"top_p": 1.5}, "top_p must lie above 0 and not above 1, got 1.5"),
        ({"prompt": "no place"}, r"prompt must hold \{x\}.* got 'no place'"),
        ({"stop": ("\n",)}, r"give data\.self_generated\.prompt too"),
        ({"prompt": "{x}", "stop": ("",)}, "stop must hold texts that are not empty"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfGeneration(**options)


def test_nothing_that_can_be_used_is_an_error(tmp_path, artifact, prompts):
    options = SelfGeneration(num_solutions=4, max_new_tokens=1)
    with pytest.raises(
        ValueError, match=r"none of the 120 solutions drawn for split 'train' can be used \(120 did not"
    ):
        fit(PairsDataModule(*prompts, self_generated=options), tmp_path, cvae(artifact))


def test_a_source_is_solved_in_all_rows_or_in_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"x": "1", "y": "2"}) + "\n" + json.dumps({"x": "3", "y": None}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a source holds solutions in all rows or in none"):
        PairsDataModule(str(path), str(path), self_generated=SelfGeneration()).setup()
    with pytest.raises(ValueError, match=r"a\.jsonl:2: column 'y' must be a text"):
        PairsDataModule(str(path), str(path)).setup()


def test_one_line_of_yaml_switches_it_on():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(PairsDataModule, "data")
    config = parser.parse_object(
        {"data": {"train_path": "a", "self_generated": {"num_inputs": 5, "stop": ["\n"], "prompt": "{x}"}}}
    )
    data = parser.instantiate(config).data
    assert data.self_generated == SelfGeneration(num_inputs=5, prompt="{x}", stop=("\n",))
    assert parser.instantiate(parser.parse_object({"data": {"train_path": "a"}})).data.self_generated is None


def test_an_overlay_switches_a_recipe_to_what_its_entangled_model_draws(tmp_path, monkeypatch, artifact):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "discrete_multidigit_addition", "--config", "benchmark/self_generated"]
    options = {
        "data.init_args.self_generated.num_inputs": 5,
        "data.init_args.train_size": 20,
        "data.init_args.val_size": 4,
        "data.init_args.batch_size": 4,
        "model.init_args.entangled": artifact,
        "model.init_args.seeding": "null",
        "trainer.callbacks": "null",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert cli.main(["fit", *words]) == 0
    folder = tmp_path / "runs/multidigit_addition/discrete"
    kept = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["self_generated"]
    assert (kept["num_inputs"], kept["num_solutions"], kept["keep"]) == (5, 4, "all")
    assert kept.keys() == {option.name for option in fields(SelfGeneration)}
    assert len(list(folder.glob("self_generated/train-*/000000-*.jsonl"))) == 1
