"""What a trial is judged by, and when it is ended, against values worked out by hand."""

import json
from pathlib import Path

import optuna
import pytest
from torch.utils.tensorboard import SummaryWriter

from cvae_lightning.benchmark.plan import Cell
from cvae_lightning.sweep.objective import Pruning, check_keys_of, figure, objective, ratio

RESULT = {
    "status": "done",
    "hash": "h",
    "metrics": {"nll_ratio": 0.5, "rho_recon": None, "usage": [0.5, 0.5]},
    "history": {"val/marginal_nll": [[99, 0.9], [199, 0.6]], "val/baseline_nll": [[99, 0.8], [199, 0.8]]},
}


def cell(root, seed, result=None):
    made = Cell("task", "ours", seed, "", root, {}, {}, None, root / "model", "f", "h")
    if result is not None:
        made.folder.mkdir(parents=True)
        (made.folder / "result.json").write_text(json.dumps(result))
    return made


def test_a_figure_is_the_end_of_a_curve_or_a_key_of_the_summary():
    assert figure(RESULT, "val/marginal_nll") == 0.6
    assert figure(RESULT, "nll_ratio") == 0.5
    assert [figure(RESULT, key) for key in ("rho_recon", "usage", "nothing", "val/rho_recon")] == [None] * 4
    assert figure({}, "val/marginal_nll") is None
    assert ratio([float("inf")]) is None
    assert ratio([float("nan"), 1.0]) is None


def test_a_trial_counts_by_the_mean_of_its_cells_if_all_are_finished(tmp_path):
    other = RESULT | {"metrics": {"nll_ratio": 0.7}, "history": {}}
    cells = [cell(tmp_path, None), cell(tmp_path, 1, RESULT), cell(tmp_path, 2, other)]
    assert objective(cells, ["nll_ratio"]) == pytest.approx(0.6)
    assert objective(cells[:2], ["val/marginal_nll", "val/baseline_nll"]) == pytest.approx(0.75)
    assert objective(cells, ["val/marginal_nll"]) is None
    assert objective([*cells, cell(tmp_path, 3, RESULT | {"status": "failed"})], ["nll_ratio"]) is None
    assert objective([*cells, cell(tmp_path, 4, RESULT | {"hash": "of another config"})], ["nll_ratio"]) is None
    assert objective([*cells, cell(tmp_path, 5)], ["nll_ratio"]) is None
    assert objective(cells[:1], ["nll_ratio"]) is None


def test_a_key_that_no_summary_has_is_misspelt(tmp_path):
    cells = [cell(tmp_path, None), cell(tmp_path, 1, RESULT), cell(tmp_path, 2)]
    check_keys_of(cells, ["nll_ratio", "rho_recon", "val/whatever"])
    with pytest.raises(
        ValueError, match=r"^objective: summary.json of task/ours/seed1 has no 'nll_ration'; it has nll_ratio$"
    ):
        check_keys_of(cells, ["nll_ratio", "nll_ration"])
    check_keys_of([cell(tmp_path, 3, RESULT | {"metrics": None})], ["nll_ration"])  # it failed


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_a_trial_worse_than_the_median_is_pruned_at_the_step_where_that_shows(tmp_path: Path, direction, sign):
    study = optuna.create_study(direction=direction, pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
    for last in (1, 2, 3):
        trial = study.ask()
        for step, value in ((99, 5), (199, last)):
            trial.report(sign * value, step)
        study.tell(trial, sign * last)
    curve = {}

    def look(values):
        one = cell(tmp_path / str(len(curve)), 1)
        curve[len(curve)] = one
        with SummaryWriter(str(one.folder)) as writer:
            for step, value in values:
                writer.add_scalar("val/marginal_nll", sign * value, step)
                writer.add_scalar("val/baseline_nll", 2.0, step)
        return one

    good, bad = (Pruning(study.ask(), ["val/marginal_nll"]) for _ in range(2))
    assert good(look([])) is None
    assert good(look([(99, 5)])) is None
    assert good(look([(99, 5), (199, 1.5)])) is None  # what was reported before is not reported again
    assert good.trial.storage.get_trial(good.trial._trial_id).intermediate_values == {99: sign * 5, 199: sign * 1.5}
    assert bad(look([(99, 4.5), (199, 4)])) == "pruned at step 200: worse than the median of the trials before it"
    assert bad.said
    quotient = Pruning(study.ask(), ["val/marginal_nll", "val/baseline_nll"])
    assert quotient(look([(199, 3)])) is None  # 1.5
    assert quotient(look([(299, 7)])) is None  # nothing to compare with
