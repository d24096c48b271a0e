"""Runners in processes of their own, over cells that a stand-in trains in a fraction of a second."""

import collections
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from benchmark_command.working_folder import CONFIG, HERE, NAMES, Folder

from cvae_lightning.benchmark import records, runner
from cvae_lightning.benchmark.plan import plan, select
from cvae_lightning.benchmark.settings import load_settings


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_runs_every_cell_once_and_a_second_call_nothing(folder):
    out = folder.run("--jobs", "2")
    calls = folder.calls()
    assert calls == collections.Counter(f"{word} {name}" for name in NAMES for word in ("fit", "test", "finished"))
    results = folder.results()
    assert {*results} == {*NAMES}
    one = results["sorting_algorithms/plain/seed2"]
    assert one["status"] == "done"
    assert one["metrics"]["alignment_one_to_one"] == 0.9
    assert one["config"]["model"]["init_args"]["posterior"] == "amortized"
    assert {"hash", "versions", "commit", "fit_seconds", "test_seconds", "cpus", "threads", "sittings"} <= one.keys()
    assert str(folder.path) not in json.dumps(results)
    table = (folder.path / "out/table.md").read_text()
    assert "14 of 14 cells finished" in table
    assert "| plain | base_conversion | 1.000 [1.000, 1.000] | 1.000 |" in table
    assert out.index("done    sorting_algorithms/entangled ") < out.index("start   sorting_algorithms/ours/seed1")
    assert {path.name for path in (folder.path / "out").iterdir()} >= {"heatmap.png", "alignment_accuracy.png"}

    folder.run()
    assert not folder.calls()
    assert folder.results() == results
    (folder.path / "out/table.md").unlink()
    folder.run("--report")
    assert (folder.path / "out/table.md").read_text() == table


def test_only_runs_what_is_asked_for_and_list_says_where_all_stand(folder):
    folder.run("--only", "base_conversion/ours/seed[12]")
    assert {name for name in folder.calls() if name.startswith("fit")} == {
        "fit base_conversion/entangled",
        "fit base_conversion/ours/seed1",
        "fit base_conversion/ours/seed2",
    }
    states = {line.split()[0]: line.split()[1] for line in folder.run("--list").splitlines()}
    assert {*states} == {*NAMES}
    assert states["base_conversion/ours/seed1"] == "done"
    assert states["base_conversion/ours/seed3"] == "pending"
    assert states["sorting_algorithms/ours/seed1"] == "waiting"
    assert not folder.calls()


def test_two_runners_share_a_folder_and_run_nothing_twice(folder):
    (folder.path / "seconds").write_text("0.2")
    runners = [folder.start("--jobs", "2") for _ in range(2)]
    outs = [runner.communicate(timeout=120)[0] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], outs
    assert folder.calls() == collections.Counter(f"{w} {name}" for name in NAMES for w in ("fit", "test", "finished"))
    assert all("start " in out for out in outs)
    assert {*folder.results()} == {*NAMES}
    assert not list(folder.path.rglob("claim.*"))


def test_when_one_runner_is_killed_the_other_finishes_the_job(folder):
    (folder.path / "seconds").write_text("0.2")
    victim, survivor = folder.start("--jobs", "2"), folder.start("--jobs", "1")
    folder.wait_for("finished")
    victim.kill()
    victim.wait()  # until then it is a zombie, which still counts as a process
    left_behind = sum(name.startswith("fit") for name in (folder.path / "calls.txt").read_text().splitlines())
    out, _ = survivor.communicate(timeout=120)
    victim.communicate()
    assert survivor.returncode == 0, out
    assert left_behind < len(NAMES)
    assert {*folder.results()} == {*NAMES}
    calls = folder.calls()
    again = {name: calls[f"finished {name}"] - 1 for name in NAMES}  # tested, but killed before it was written down
    assert {*again.values()} <= {0, 1}, calls
    assert sum(again.values()) <= 2, calls  # of the victim's two jobs
    assert "lost" not in out


def test_children_die_with_a_killed_runner(folder):
    (folder.path / "seconds").write_text("60")
    runner = folder.start()
    folder.wait_for("fit")
    children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children")
    if not children.exists():
        runner.kill()
        runner.communicate()
        pytest.skip("needs Linux's list of children")
    child = children.read_text().split()[0]
    runner.kill()
    runner.communicate()
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def squeezed(text):
    return " ".join(text.split())


def is_running(pid):
    """Return whether the process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_runner_frees_its_cells_which_go_on_where_they_were(folder, number, code):
    (folder.path / "seconds").write_text("60")
    runner = folder.start("--only", "base_conversion/entangled")
    folder.wait_for("fit base_conversion/entangled")
    while not (folder.path / "out/base_conversion/entangled/checkpoints/last.ckpt").exists():
        time.sleep(0.02)
    runner.send_signal(number)
    out, _ = runner.communicate(timeout=60)
    assert runner.returncode == code, out
    assert "goes on where this one was" in out
    assert not list(folder.path.rglob("claim.*"))
    assert "base_conversion/entangled partial step 5 of 3000" in squeezed(folder.run("--list"))
    (folder.path / "seconds").write_text("0")
    folder.run("--only", "base_conversion/entangled")
    assert folder.calls()["fit base_conversion/entangled resumed"] == 1
    assert folder.results()["base_conversion/entangled"]["sittings"] == 2


def test_a_failing_cell_stops_no_other_and_is_tried_again_by_the_next_call(folder):
    (folder.path / "fail").write_text("fit sorting_algorithms/plain/seed2")
    out = folder.run(code=1)
    assert "FAILED  sorting_algorithms/plain/seed2" in out
    results = folder.results()
    assert {name for name, r in results.items() if r["status"] == "failed"} == {"sorting_algorithms/plain/seed2"}
    assert results["sorting_algorithms/plain/seed2"]["error"] == "fit: sorting_algorithms/plain/seed2 was told to fail"
    table = (folder.path / "out/table.md").read_text()
    assert "13 of 14 cells finished, 1 failed" in table
    assert "- sorting_algorithms/plain/seed2: fit: sorting_algorithms/plain/seed2 was told to fail" in table
    assert "2 (1 failed) |" in table
    folder.calls()
    folder.run(code=1)
    assert [name for name in folder.calls() if name.startswith("fit")] == ["fit sorting_algorithms/plain/seed2"]
    (folder.path / "fail").unlink()
    folder.run()
    assert folder.results()["sorting_algorithms/plain/seed2"]["status"] == "done"
    assert "failed" not in (folder.path / "out/table.md").read_text()


def test_without_its_entangled_model_no_cell_of_a_task_is_run(folder):
    (folder.path / "fail").write_text("fit base_conversion/entangled")
    folder.run(code=1)
    assert not [name for name in folder.calls() if "base_conversion" in name and "entangled" not in name]
    assert len(folder.results()) == 8


def test_a_failed_test_is_repeated_without_training_again(folder):
    (folder.path / "fail").write_text("test base_conversion/ours/seed1")
    folder.run("--only", "base_conversion/ours/seed1", code=1)
    (folder.path / "fail").unlink()
    folder.calls()
    folder.run("--only", "base_conversion/ours/seed1")
    assert [*folder.calls()] == ["test base_conversion/ours/seed1", "finished base_conversion/ours/seed1"]


def test_finished_cells_of_another_configuration_are_run_anew_only_if_asked(folder):
    folder.run("--only", "sorting_algorithms")
    folder.calls()
    changed = {**CONFIG["recipes"], "ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}}}
    folder.write({**CONFIG, "recipes": changed})
    out = folder.run("--only", "sorting_algorithms", code=1)
    assert "3 finished cells were run with another configuration" in out
    assert "model.init_args.num_latents: 4 then, 8 now" in out
    assert "--rerun-changed" in out
    assert "sorting_algorithms/ours/seed1 changed model.init_args.num_latents: 4 then" in squeezed(folder.run("--list"))
    assert not folder.calls()
    folder.run("--only", "sorting_algorithms", "--rerun-changed")
    ours = [f"sorting_algorithms/ours/seed{k}" for k in (1, 2, 3)]
    assert folder.calls() == collections.Counter(f"{word} {n}" for n in ours for word in ("fit", "test", "finished"))


def test_a_result_that_another_runner_leaves_meanwhile_is_not_deleted(folder):
    name = "base_conversion/ours/seed1"
    folder.run("--only", "base_conversion/entangled")
    (folder.path / "seconds").write_text("2")
    first = folder.start("--only", name)
    folder.wait_for(f"fit {name}")
    changed = {**CONFIG["recipes"], "ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}}}
    folder.write({**CONFIG, "recipes": changed})
    second = folder.start("--only", name)
    outs = [runner.communicate(timeout=120)[0] for runner in (first, second)]
    assert (first.returncode, second.returncode) == (0, 1), outs
    assert f"changed {name}: another runner has finished it with another configuration; its result is kept" in outs[1]
    result = json.loads((folder.path / f"out/{name}/result.json").read_text())
    assert result["config"]["model"]["init_args"]["num_latents"] == 4
    assert not list(folder.path.rglob("claim.*"))
    (folder.path / "seconds").write_text("0")
    folder.run("--only", name, "--rerun-changed")
    assert json.loads((folder.path / f"out/{name}/result.json").read_text())["config"]["model"]["init_args"] == {
        **result["config"]["model"]["init_args"],
        "num_latents": 8,
    }


def test_what_is_left_of_an_unfinished_training_is_not_cleared_in_silence(folder):
    name = "base_conversion/ours/seed1"
    folder.run("--only", "base_conversion/entangled")
    (folder.path / "seconds").write_text("60")
    runner = folder.start("--only", name)
    while not (folder.path / f"out/{name}/checkpoints/last.ckpt").exists():
        assert runner.poll() is None
        time.sleep(0.02)
    runner.send_signal(signal.SIGTERM)
    runner.communicate(timeout=60)
    changed = {**CONFIG["recipes"], "ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}}}
    folder.write({**CONFIG, "recipes": changed})
    (folder.path / "seconds").write_text("0")
    out = folder.run("--only", name)
    assert f"cleared {name}: a training of another configuration was there, at step 5" in out


def test_changed_test_options_and_retest_keep_the_trained_models(folder):
    folder.run("--only", "sorting_algorithms/ours/seed1")
    folder.calls()
    folder.write({**CONFIG, "test_options": {"callbacks.*Evaluation.num_examples": 99}})
    out = folder.run("--only", "sorting_algorithms/ours/seed1", code=1)
    assert "in tests trainer.callbacks: " in out
    folder.run("--only", "sorting_algorithms/ours/seed1", "--rerun-changed")
    again = {"test sorting_algorithms/ours/seed1", "finished sorting_algorithms/ours/seed1"}
    both = again | {"test sorting_algorithms/entangled", "finished sorting_algorithms/entangled"}
    assert {*folder.calls()} == both
    folder.run("--only", "sorting_algorithms/ours/seed1", "--retest")
    assert {*folder.calls()} == both


def test_a_folder_of_something_else_is_never_touched(folder):
    precious = folder.path / "out/base_conversion/entangled/weights"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    out = folder.run(code=1)
    assert "out/base_conversion/entangled is to be the folder of the cell base_conversion/entangled, but holds" in out
    assert not folder.calls()
    assert precious.read_text() == "mine"


def test_what_a_watcher_says_ends_a_cell_in_training(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.path)
    monkeypatch.setattr(runner, "COMMAND", (sys.executable, "-S", str(HERE / "stand_in.py")))
    monkeypatch.setattr(runner, "WATCH", 0.1)
    (folder.path / "seconds").write_text("0.5")
    cells = select(plan(load_settings(folder.path / "bench.yaml")), ["base_conversion/ours/seed1"])
    seen = []

    def watch(cell):
        seen.append(cell)
        return "it will not do" if cell.seed and len(seen) > 2 else None

    assert runner.Runner(cells, 1, 1, watch=watch).run() == 1
    assert {*seen} == {*cells}
    assert records.read_result(cells[0])["status"] == "done"  # looked at, and let alone
    ended = records.read_result(cells[1])
    assert (ended["status"], ended["error"]) == ("failed", "fit: it will not do")
    assert "ended   base_conversion/ours/seed1 after" in capsys.readouterr().out
    assert not folder.calls()["test base_conversion/ours/seed1"]
    assert not list(folder.path.rglob("claim.*"))


def test_bad_options_end_in_one_message(folder):
    assert folder.run("--jobs", "0", code=1) == (
        "cvae-lightning: error: --jobs: expected an integer of at least 1, got 0\n"
    )
    assert "--only nothing: names no cell" in folder.run("--only", "nothing", code=1)
    assert "unrecognized arguments: --job" in folder.run("--jobz", "1", code=2)
