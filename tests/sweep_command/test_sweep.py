"""Sweeps in processes of their own, over trials that a stand-in trains in a fraction of a second."""

import collections
import re
import signal
import time

import pytest
from benchmark_command.working_folder import Folder

from cvae_lightning import cli
from cvae_lightning.benchmark import records
from cvae_lightning.sweep.search import Search
from cvae_lightning.sweep.settings import load_sweep

CONFIG = {
    "results": "out",
    "tasks": {"sorting_algorithms": {"entangled": "entangled_sorting_algorithms"}},
    "recipes": {"ours": {"configs": ["discrete_{task}"]}},
    "space": {
        "model.posterior_temperature": {"low": 0.1, "high": 1.0, "log": True},
        "model.seeding": {"choices": [None, {"class_path": "cvae_lightning.modules.LatentSeeding"}]},
    },
    "objective": "marginal_nll",  # the stand-in's is the temperature
    "trials": 4,
}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path, CONFIG, ("sweep",))


def trials(folder):
    """Return the rows of trials.md: (trial, objective, temperature, seeding, folder)."""
    lines = [line for line in (folder.path / "out/trials.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def fits(calls):
    return {call.removeprefix("fit sorting_algorithms/"): n for call, n in calls.items() if call.startswith("fit")}


def test_runs_its_trials_once_and_shows_the_best_first(folder):
    out = folder.run()
    run = fits(folder.calls())
    assert len(run) == 5
    assert {*run.values()} == {1}
    assert out.index("done    sorting_algorithms/entangled") < out.index("start   sorting_algorithms/ours_")
    rows = trials(folder)
    assert {f"{row[4]}/seed1" for row in rows} == {*run} - {"entangled"}
    objectives = [float(row[1]) for row in rows]
    assert objectives == sorted(objectives)
    for _, objective, temperature, seeding, name in rows:
        row = folder.results()[f"sorting_algorithms/{name}/seed1"]
        arguments = row["config"]["model"]["init_args"]
        assert float(objective) == pytest.approx(arguments["posterior_temperature"], rel=1e-5)
        assert float(temperature) == pytest.approx(arguments["posterior_temperature"], rel=1e-3)
        assert 0.1 <= arguments["posterior_temperature"] <= 1.0
        assert (arguments["seeding"] is None) == (seeding == "null")
    assert "4 of" not in (folder.path / "out/table.md").read_text()  # five cells: with the entangled model
    assert "5 of 5 cells finished" in (folder.path / "out/table.md").read_text()
    assert "note: marginal_nll chooses by the test split" in out

    folder.run()
    assert not folder.calls()
    folder.run("--trials", "5")
    assert len(fits(folder.calls())) == 1
    page = (folder.path / "out/trials.md").read_text()
    (folder.path / "out/trials.md").unlink()
    folder.run("--report")
    assert (folder.path / "out/trials.md").read_text() == page


def test_processes_share_the_trials_and_end_together(folder):
    (folder.path / "seconds").write_text("0.3")
    processes = [folder.start("--trials", "6") for _ in range(2)]
    outs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outs
    run = fits(folder.calls())
    assert {*run.values()} == {1}, outs
    assert 6 <= len(trials(folder)) <= 7  # both may have asked for the last one at the same moment
    assert len(run) == len(trials(folder)) + 1
    assert all("trial " in out for out in outs)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_trial_that_was_broken_off_goes_on_where_it_was(folder, number):
    folder.run("--trials", "1")
    folder.calls()
    (folder.path / "seconds").write_text("60")
    process = folder.start("--trials", "2")
    folder.wait_for("fit sorting_algorithms/ours")
    (name,) = fits(folder.calls())
    checkpoint = folder.path / f"out/sorting_algorithms/{name}/checkpoints/last.ckpt"
    while not checkpoint.exists():
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number), out
    (folder.path / "seconds").write_text("0")
    folder.run("--trials", "2")
    assert fits(folder.calls()) == {f"{name} resumed": 1}
    assert collections.Counter(row[1] == "fail" for row in trials(folder)) == {False: 2, True: 1}
    assert folder.results()[f"sorting_algorithms/{name}"]["sittings"] == 2


def test_three_failures_in_a_row_end_it(folder):
    (folder.path / "fail").write_text("fit sorting_algorithms/ours")
    out = folder.run(code=1)
    assert len(fits(folder.calls())) == 4
    assert out.count("failed, or without marginal_nll") == 3
    assert "ours_" in out
    assert "was told to fail" in out
    assert [row[1] for row in trials(folder)] == ["fail"] * 3
    (folder.path / "fail").unlink()
    folder.run("--trials", "1")
    assert len(fits(folder.calls())) == 1


def test_without_the_entangled_model_nothing_is_tried(folder):
    (folder.path / "fail").write_text("fit sorting_algorithms/entangled")
    folder.run(code=1)
    assert [*fits(folder.calls())] == ["entangled"]
    assert trials(folder) == []


def test_options_that_do_not_fit_one_another_fail_their_trial_alone(folder):
    space = {
        "model.seeding": {"choices": [{"class_path": "cvae_lightning.modules.LatentSeeding"}, None]},
        "model.seeding.init_args.hold_steps": {"low": 1, "high": 400},
    }
    folder.write({**CONFIG, "space": space, "trials": 3})
    first = {"model.seeding": "null", "model.seeding.init_args.hold_steps": 7}
    search = Search(load_sweep(folder.path / "bench.yaml"), smoke=False)
    search.root = folder.path / "out"
    search.open_study().enqueue_trial(first)
    out = folder.run()
    assert "trial 0: failed: recipe ours_" in out
    assert "model.seeding is None, which has no init_args" in out
    rows = trials(folder)
    assert collections.Counter(row[1] == "fail" for row in rows)[False] == 3
    assert next(row for row in rows if row[0] == "0")[1:4] == ["fail", "null", "7"]
    assert "trials   out/trials.md" in folder.run("--report")
    assert trials(folder) == rows


def test_where_no_options_fit_one_another_it_ends(folder):
    space = {"model.seeding": {"choices": [None]}, "model.seeding.init_args.hold_steps": {"low": 1, "high": 10_000}}
    folder.write({**CONFIG, "space": space})
    assert "which has no init_args" in folder.run(code=1)  # before anything is tried
    space["model.seeding"] = {"choices": [{"class_path": "cvae_lightning.modules.LatentSeeding"}, None]}
    folder.write({**CONFIG, "space": space})
    search = Search(load_sweep(folder.path / "bench.yaml"), smoke=False)
    search.root = folder.path / "out"
    study = search.open_study()
    for steps in range(1, 51):
        study.enqueue_trial({"model.seeding": "null", "model.seeding.init_args.hold_steps": steps})
    out = folder.run(code=1)
    assert "stopped: 50 trials could not be run one after the other; see their errors above" in out
    assert [*fits(folder.calls())] == ["entangled"]


def test_the_recipes_own_entangled_model_is_trained_once_for_all_trials(folder):
    recipe = CONFIG["recipes"]["ours"] | {"entangled": {"options": {"trainer.max_steps": 1000}}}
    folder.write({**CONFIG, "recipes": {"ours": recipe}})
    folder.run()
    run = fits(folder.calls())
    assert len(run) == 5
    assert run["entangled"] == 1
    assert folder.results()["sorting_algorithms/entangled"]["config"]["trainer"]["max_steps"] == 1000


def test_a_trial_that_has_just_ended_is_left_to_its_process(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    one, other = (Search(load_sweep(folder.path / "bench.yaml"), smoke=False) for _ in range(2))
    study = one.open_study()
    trial = study.ask(one._distributions())
    monkeypatch.setattr("cvae_lightning.sweep.search.FRESH", 0.5)
    time.sleep(0.6)  # it was asked for long ago
    (cell,) = (cell for cell in one.cells([trial.params]) if cell.seed is not None)
    cell.folder.mkdir(parents=True)
    records.write_result(cell, {"status": "done", "hash": cell.hash, "metrics": {"marginal_nll": 0.5}})
    other._revive(other.open_study())
    assert [t.state.name for t in study.get_trials()] == ["RUNNING"]
    time.sleep(0.6)
    other._revive(other.open_study())
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "WAITING"]
    assert one._tell(study, trial, [cell], None)  # too late for it, and no reason to stop


def test_another_sweep_or_a_torn_journal_in_the_same_folder_is_refused(folder):
    folder.run("--trials", "1")
    folder.calls()
    folder.write({**CONFIG, "objective": "val/marginal_nll"})
    out = folder.run(code=1)
    assert out.startswith(
        "cvae-lightning: error: out/journal.jsonl is that of another sweep: objective: 'marginal_nll' "
    )
    options = {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}}
    folder.write({**CONFIG, "recipes": {"ours": options}})
    assert re.search(
        r"another sweep: .*num_latents: 4 then, 8 now.*Give another folder with --results", folder.run(code=1)
    )
    folder.write(CONFIG)
    journal = folder.path / "out/journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0][:40], *lines[1:]]))
    assert "out/journal.jsonl: not a whole journal of Optuna: " in folder.run(code=1)
    assert not folder.calls()


def test_what_a_user_gets_wrong_ends_in_one_message(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.path)

    def error(*words):
        assert cli.main(["sweep", *words]) == 1
        return capsys.readouterr().err

    assert "there is no sweep in out yet" in error("--config", "bench.yaml", "--report")
    assert "--trials: expected an integer of at least 1, got 0" in error("--config", "bench.yaml", "--trials", "0")
    assert "no shipped recipe is named 'nothing'" in error("--config", "nothing")
    folder.write({**CONFIG, "space": {"trainer.max_steps.more": {"low": 1, "high": 2}}})
    message = error("--config", "bench.yaml")
    assert "option trainer.max_steps.more: trainer.max_steps is " in message
    assert message.rstrip().endswith("which has no more")
    folder.write({**CONFIG, "objective": "val/marginal_nll", "prune": True, "seeds": [1, 2]})
    assert "prune: expected one task and one seed" in error("--config", "bench.yaml")
    monkeypatch.setattr("cvae_lightning.sweep.command.find_spec", lambda name: None)
    assert "needs Optuna: pip install 'cvae-lightning[sweep]'" in error("--config", "bench.yaml")
    assert [path.name for path in folder.path.iterdir()] == ["bench.yaml"]
