"""Results measured elsewhere: which cells they finish, what is still run, and which lines are refused."""

import collections
import json
from pathlib import Path

import pytest
import yaml
from benchmark_command.working_folder import CONFIG, NAMES, Folder

from cvae_lightning.benchmark.known import read_lines
from cvae_lightning.benchmark.plan import plan
from cvae_lightning.benchmark.settings import load_settings

COMMITTED = Path(__file__).parents[1] / "benchmarks/results/continuous.jsonl"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The lines of another machine's results.jsonl, by cell; like those that are committed, without the configs."""
    path = tmp_path_factory.mktemp("elsewhere") / "bench.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    row = json.loads(COMMITTED.read_text().splitlines()[1])
    row["metrics"] |= {"alignment_one_to_one": 0.45, "alignment_ceiling": 0.9}
    lines = {}
    for cell in plan(load_settings(path)):
        mine = {"task": cell.task, "recipe": cell.recipe, "seed": cell.seed, "hash": cell.hash, "commit": "elsewhere"}
        lines[cell.name] = json.dumps(row | mine)
    return lines


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def keep(folder, lines, file="known.jsonl"):
    (folder.path / file).write_text("".join(f"{line}\n" for line in lines))
    return file


def starting_with(lines, *starts):
    return [line for name, line in lines.items() if name.startswith(starts)]


def test_all_known_is_nothing_to_run_and_the_tables_are_whole(folder, elsewhere):
    out = folder.run("--known", keep(folder, elsewhere.values()))
    assert "14 results taken over from known.jsonl\n" in out
    assert not folder.calls()
    assert {*folder.results()} == {*NAMES}
    one = folder.results()["base_conversion/ours/seed2"]
    assert one["commit"] == "elsewhere"
    assert one["config"]["model"]["class_path"].endswith("SharedDiscreteCVAE")
    assert "| ours | base_conversion | 0.500 [0.500, 0.500] | 0.500 |" in (folder.path / "out/table.md").read_text()
    assert (folder.path / "out/heatmap.png").exists()

    folder.run()  # from now on the results folder holds them
    assert not folder.calls()
    assert len(folder.results()) == 14
    assert "0 results taken over" in folder.run("--known", "known.jsonl", "--list")


def test_an_entangled_model_is_trained_only_for_cells_that_have_yet_to_start_from_it(folder, elsewhere):
    files = [
        keep(folder, starting_with(elsewhere, "sorting_algorithms/ours", "sorting_algorithms/plain"), "one.jsonl"),
        keep(folder, starting_with(elsewhere, "base_conversion/entangled", "base_conversion/ours"), "two.jsonl"),
    ]
    out = folder.run("--known", *files)
    assert "9 results taken over from one.jsonl, two.jsonl" in out
    assert "trained again, for the cells that start from it: base_conversion/entangled\n" in out
    assert "all that starts from them is finished (--only runs them): sorting_algorithms/entangled\n" in out
    run = ["base_conversion/entangled", *(f"base_conversion/plain/seed{k}" for k in (1, 2, 3))]
    assert folder.calls() == collections.Counter(
        f"{word} {name}" for name in run for word in ("fit", "test", "finished")
    )
    results = folder.results()
    assert {*results} == {*NAMES} - {"sorting_algorithms/entangled"}
    assert {name for name, row in results.items() if row["commit"] == "elsewhere"} == {*results} - {*run}

    folder.run("--only", "sorting_algorithms/entangled")
    assert folder.calls()["fit sorting_algorithms/entangled"] == 1
    assert {*folder.results()} == {*NAMES}


def test_a_model_that_is_not_here_is_trained_when_a_later_recipe_needs_it(folder, elsewhere):
    folder.run("--known", keep(folder, elsewhere.values()))
    more = {"ours8": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}, "seeds": [1]}}
    folder.write({**CONFIG, "recipes": CONFIG["recipes"] | more})
    folder.run("--only", "base_conversion/ours8/seed1")
    assert {name for name in folder.calls() if name.startswith("fit")} == {
        "fit base_conversion/entangled",
        "fit base_conversion/ours8/seed1",
    }


def test_own_results_stay_and_stale_lines_are_named_once(folder, elsewhere):
    folder.run("--only", "base_conversion/ours/seed1")
    folder.calls()
    changed = {"ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}}}
    folder.write({**CONFIG, "recipes": {**CONFIG["recipes"], **changed}})
    kept = keep(folder, starting_with(elsewhere, "base_conversion"))
    out = folder.run("--known", kept, "--list")
    assert "3 results taken over" in out  # plain; the entangled model of this folder is its own
    assert (
        out.count("belong to no cell as it is configured now: base_conversion/ours/seed1, base_conversion/ours/s") == 1
    )
    states = {line.split()[0]: line.split()[1] for line in out.splitlines() if "/seed" in line.split()[0]}
    assert states["base_conversion/ours/seed1"] == "changed"
    assert states["base_conversion/plain/seed3"] == "done"
    folder.write(CONFIG)
    folder.run("--known", kept, "--report")
    commits = {name: row["commit"] for name, row in folder.results().items()}
    assert commits["base_conversion/ours/seed2"] == "elsewhere"
    assert "elsewhere" not in (commits["base_conversion/ours/seed1"], commits["base_conversion/entangled"])


def test_weights_of_another_configuration_are_no_model_to_start_from(folder, elsewhere):
    """The entangled model here is that of an earlier recipe, the known result that of the present one."""
    names = CONFIG["tasks"]
    options = {"trainer.max_steps": 500}
    earlier = {name: {"entangled": {"configs": [f"entangled_{name}"], "options": options}} for name in names}
    folder.write({**CONFIG, "tasks": earlier})
    folder.run("--only", "base_conversion/entangled")
    folder.calls()
    folder.write(CONFIG)
    words = (
        "--only",
        "base_conversion/ours/seed1",
        "--known",
        keep(folder, starting_with(elsewhere, "base_conversion/entangled")),
    )
    assert "1 finished cells were run with another configuration" in folder.run(*words, code=1)
    assert not folder.calls()
    out = folder.run(*words, "--rerun-changed")
    assert "trained again, for the cells that start from it: base_conversion/entangled" in out
    assert folder.calls()["fit base_conversion/entangled"] == 1
    assert folder.results()["base_conversion/entangled"]["commit"] != "elsewhere"


def test_a_result_of_another_configuration_is_replaced_only_if_asked(folder, elsewhere):
    name = "base_conversion/ours/seed1"
    other = {"ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}}}
    folder.write({**CONFIG, "recipes": {**CONFIG["recipes"], **other}})
    folder.run("--only", name)
    folder.write(CONFIG)
    words = ("--only", name, "--known", keep(folder, [elsewhere[name]]))
    assert "0 results taken over" in folder.run(*words, "--list")
    path = folder.path / f"out/{name}/result.json"
    assert json.loads(path.read_text())["config"]["model"]["init_args"]["num_latents"] == 8
    assert "1 results taken over" in folder.run(*words, "--rerun-changed")
    assert json.loads(path.read_text())["commit"] == "elsewhere"

    folder.calls()  # the checkpoint here is of the other one
    out = folder.run("--only", name, "--retest")
    assert f"not tested again, their trained models are not here: {name}\n" in out
    assert json.loads(path.read_text())["commit"] == "elsewhere"
    assert not [call for call in folder.calls() if name in call]


def test_lines_of_failed_cells_finish_nothing_and_retest_keeps_what_has_no_model(folder, elsewhere):
    name = "base_conversion/ours/seed1"
    failed = json.loads(elsewhere[name]) | {"status": "failed", "error": "fit: no disk", "attempt": "1"}
    known = keep(folder, [json.dumps(failed), *starting_with(elsewhere, "base_conversion/ours/seed2")])
    words = ("--only", "base_conversion/ours/seed[12]", "--known", known)
    assert "1 results taken over" in folder.run(*words)
    assert {call for call in folder.calls() if call.startswith("fit")} == {
        "fit base_conversion/entangled",
        f"fit {name}",
    }
    out = folder.run(*words, "--retest")
    assert "not tested again, their trained models are not here: base_conversion/ours/seed2\n" in out
    again = ("base_conversion/entangled", name)
    assert folder.calls() == collections.Counter(f"{word} {cell}" for cell in again for word in ("test", "finished"))


def test_another_ones_folder_is_not_written_into(folder, elsewhere):
    precious = folder.path / "out/base_conversion/ours/seed1/weights"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    out = folder.run("--known", keep(folder, elsewhere.values()), code=1)
    assert "holds files of something else" in out
    assert [path for path in (folder.path / "out").rglob("*") if path.is_file()] == [precious]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:-40], "expected a whole JSON object: "),
        (lambda line: "\xff", "expected a whole JSON object: "),
        (lambda line: "[1]", r"expected a line of a benchmark's results.jsonl: got \[1\]"),
        (lambda line: '{"x": "1", "y": "2"}', "expected a line of a benchmark's results.jsonl: it has no 'task'"),
        (
            lambda line: line.replace('"status": "done"', '"status": "good"'),
            ".*status: expected done or failed, got 'go",
        ),
        (lambda line: line.replace('"seed": 1', '"seed": "1"'), ".*seed: expected an integer or null, got '1'"),
        (lambda line: line.replace('"metrics": {', '"metrics": {"a": {}, '), ".*metrics: expected a mapping, got"),
        (lambda line: line.replace('"history": {', '"history": {"a": [1], '), ".*history: expected curves by name"),
        (lambda line: line.replace('"fit_seconds"', '"fit"'), ".*it has no 'fit_seconds'"),
        (
            lambda line: line.replace('"fit_seconds": ', '"fit_seconds": 1e999, "a": '),
            ".*fit_seconds: expected a number",
        ),
        (lambda line: "[" * 100_000, "expected a whole JSON object"),
    ],
)
def test_torn_and_foreign_lines_are_refused_by_file_and_line(tmp_path, elsewhere, change, message):
    good, bad = elsewhere["base_conversion/ours/seed2"], change(elsewhere["base_conversion/ours/seed1"])
    path = tmp_path / "known.jsonl"
    path.write_bytes(good.encode() + b"\r\n\n" + bad.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=rf"known\.jsonl:3: {message}"):
        read_lines(path)
    path.write_text(good)
    assert read_lines(path) == [json.loads(good)]


def test_committed_results_can_be_gone_on_from():
    rows = read_lines(COMMITTED)
    assert len({row["hash"] for row in rows}) == len(rows) == 19
    assert all(row["status"] == "done" for row in rows)
