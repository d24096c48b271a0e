"""The numbers of the table, the figures and the estimate of the time left, against values worked out by hand."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from cvae_lightning.benchmark.history import read_history
from cvae_lightning.benchmark.pictures import alignment_accuracy, draw_all, heatmaps, learning_curves
from cvae_lightning.benchmark.plan import ENTANGLED_GROUP, Cell
from cvae_lightning.benchmark.progress import seconds_left
from cvae_lightning.benchmark.table import cell_text, markdown, median_interval


def row(task, recipe, seed, alignment=0.9, group="", status="done", **metrics):
    known = {
        "num_latents": 4,
        "alignment_one_to_one": alignment,
        "alignment_ceiling": 0.9,
        "controlled_alignment_one_to_one": alignment / 2,
        "controlled_alignment_ceiling": 1.0,
        "final_answer_accuracy": 0.5,
        "nll_ratio": 0.8,
    }
    return {
        "task": task,
        "recipe": recipe,
        "seed": seed,
        "group": group,
        "status": status,
        "metrics": known | metrics,
        "history": {"val/alignment/one_to_one": [[99, 0.25], [199, alignment]]},
        "loss_fractions": {"kl_prior_loss": 0.25, "reconstruction_loss": 0.75, "router_support_loss": 0.001},
        "fit_seconds": 100.0 * (seed or 1),
        "test_seconds": 20.0,
        "versions": {"torch": "2"},
        "commit": "abc",
        "cpus": 2,
        "threads": 1,
        "error": "fit: no disk\nspace",
    }


def table_of(page, heading=None):
    """Return the cells of the first table (below a heading) of a page."""
    lines = page.splitlines()
    lines = lines[lines.index(f"## {heading}") if heading else 0 :]
    rows = list(
        itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda a: a[:1] != "|", lines))
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [rows[0], *rows[2:]]]


@pytest.mark.parametrize("values", [[0.2, 0.9, 0.5], [1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.7, 0.8, 0.9]])
def test_interval_is_that_of_all_resamples(values):
    every = [np.median(drawn) for drawn in itertools.product(values, repeat=len(values))]
    low, high = np.quantile(every, [0.025, 0.975])
    assert median_interval(values) == pytest.approx((np.median(values), low, high))
    assert median_interval(values) == median_interval(values)


def test_numbers_are_medians_ratios_or_dashes():
    assert cell_text([]) == "–"
    assert cell_text([0.5]) == "0.500"
    assert cell_text([0.3, 0.1, 0.2]) == "0.200 [0.100, 0.300]"


def test_table_has_a_row_per_task_one_for_all_and_the_worst_seed():
    rows = [
        row(task, "ours", seed, value)
        for task, *values in (("a", 0.9, 0.45, 0.63), ("b", 0.81, 0.81, 0.81))
        for seed, value in enumerate(values, 1)
    ]
    rows += [row("a", "theirs", 1, 0.27)]
    head, *lines = table_of(markdown(rows, 9, {}, "cmd"))
    assert head == [
        "recipe",
        "task",
        "posterior / ceiling",
        "worst seed",
        "controlled / ceiling",
        "accuracy, forced",
        "NLL / entangled",
        "minutes",
        "n",
    ]
    assert lines[0] == [
        "ours",
        "a",
        "0.700 [0.500, 1.000]",
        "0.500",
        "0.315 [0.225, 0.450]",
        "0.500 [0.500, 0.500]",
        "0.800 [0.800, 0.800]",
        "3.7",
        "3",
    ]
    assert lines[1][:4] == ["ours", "b", "0.900 [0.900, 0.900]", "0.900"]
    assert lines[2][:2] == ["ours", "**all**"]
    assert lines[2][2].startswith("0.900 [")
    assert lines[2][3] == "0.500"
    assert lines[2][-1] == "6"
    assert lines[3][:4] == ["theirs", "a", "0.300", "0.300"]


def test_groups_continuous_models_extra_columns_and_failures():
    rows = [
        row("a", "entangled", None, group=ENTANGLED_GROUP, baseline_nll=0.05, greedy_final_answer_accuracy=1.0),
        row("a", "ours", 1, group="tokens", purity=0.5, ce=1.1, entropy=1.0),
        row("a", "ours", 2, group="tokens", status="failed", purity=0.9),
        row("a", "gauss", 1, group="vectors", num_latents=0, linear_probe_accuracy=0.45),
    ]
    page = markdown(rows, 4, {"purity": "purity", "router": "ce / entropy", "nothing": "unknown"}, "the command")
    assert page.startswith("`the command`\n\n3 of 4 cells finished, 1 failed, 6 min of wall time")
    tokens, vectors = table_of(page, "tokens"), table_of(page, "vectors")
    assert tokens[0][-5:] == ["NLL / entangled", "purity", "router", "minutes", "n"]
    assert tokens[1][-4:] == ["0.500", "1.100", "2.0", "1 (1 failed)"]
    assert vectors[0][-4:] == ["IW NLL / entangled", "linear probe / ceiling", "minutes", "n"]
    assert vectors[1][-4:-2] == ["0.800", "0.500"]
    entangled = table_of(page, ENTANGLED_GROUP)
    assert entangled[0] == ["recipe", "task", "accuracy, greedy", "NLL (nats per token)", "minutes", "n"]
    assert "- a/ours/seed2: fit: no disk space" in page
    assert "| ours | reconstruction 0.75, kl_prior 0.25 |" in page
    assert "No summary.json holds what these columns are to show: nothing (unknown)." in page
    assert "No summary" not in markdown(rows, 4, {"purity": "purity", "router": "ce / entropy"}, "the command")
    assert "another configuration" not in page
    assert "now says: a/ours/seed1." in markdown([rows[1] | {"changed": True}], 1, {}, "")
    assert "0 of 4 cells finished" in markdown([], 4, {}, "cmd")


def test_points_lie_where_the_numbers_are_and_medians_are_large():
    rows = [row("a", "ours", s, v) for s, v in ((1, 0.9), (2, 0.72), (3, 0.81))] + [row("a", "theirs", 1, 0.45)]
    (ax,) = alignment_accuracy(rows).axes
    small = sorted(float(line.get_xdata()[0]) for line in ax.lines if line.get_markersize() == 4)
    large = sorted(float(line.get_xdata()[0]) for line in ax.lines if line.get_markersize() == 10)
    assert small == pytest.approx([0.5, 0.8, 0.9, 1.0])
    assert large == pytest.approx([0.5, 0.9])
    assert {float(line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "o"} == {0.5}


def test_curves_have_a_panel_per_task_and_group():
    rows = [row(task, recipe, s, group=g) for task in "ab" for s in (1, 2) for recipe, g in (("x", "g"), ("y", "h"))]
    panels = [ax for ax in learning_curves(rows).axes if ax.get_visible()]
    assert [ax.get_title() for ax in panels] == ["g: a", "h: a", "g: b", "h: b"]
    for ax in panels:
        *seeds, ceiling = ax.lines
        assert [list(line.get_xdata()) for line in seeds] == [[100, 200]] * 2
        assert list(ceiling.get_ydata()) == [0.9, 0.9]
    one = learning_curves([row("a", "x", 1, group="g"), row("b", "x", 1, group="g")])
    assert [ax.get_title() for ax in one.axes] == ["a", "b"]


def test_heatmap_shows_medians_and_dashes():
    figure = heatmaps([row("a", "x", 1, 0.9), row("a", "x", 2, 0.45), row("a", "x", 3, 0.45), row("b", "y", 1, 0.27)])
    posterior, controlled, _ = figure.axes
    assert [text.get_text() for text in posterior.texts] == ["0.500", "–", "–", "0.300"]
    assert [text.get_text() for text in controlled.texts] == ["0.225", "–", "–", "0.135"]


def test_figures_are_files_and_those_without_numbers_are_left_out(tmp_path):
    paths = draw_all([row("a", "ours", 1), row("a", "a_b%c", 1, group="5$ % & $more_")], tmp_path)
    assert [path.name for path in paths] == ["alignment_accuracy.png", "learning_curves.png", "heatmap.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    unlabelled = row("a", "ours", 1) | {"metrics": {"final_answer_accuracy": 1.0}, "history": {}}
    assert draw_all([unlabelled], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_history_of_a_run_that_went_on_is_one_curve(tmp_path):
    for first, values in ((0, [0.1, 0.2, float("nan")]), (1, [0.3, 0.4])):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{first}") as writer:
            for i, number in enumerate(values):
                writer.add_scalar("val/alignment/one_to_one", number, 100 * (first + i))
                writer.add_scalar("val/unknown", number, i)
    with SummaryWriter(str(tmp_path), filename_suffix=".2") as writer:
        writer.add_scalar("test/loss_contrib/fraction_abs/kl_prior_loss", 0.25, 300)
    curves, shares = read_history(tmp_path)
    assert [*curves] == ["val/alignment/one_to_one"]
    assert curves["val/alignment/one_to_one"] == [[0, 0.1], [100, 0.3], [200, 0.4]]
    assert shares == {"kl_prior_loss": 0.25}
    (tmp_path / "nothing").mkdir()
    assert read_history(tmp_path / "nothing") == ({}, {})


@dataclass
class Here:
    """A cell that runs here."""

    cell: Cell
    seconds: float
    fraction: float


def test_time_left_follows_cells_of_the_same_kind(tmp_path):
    def cell(task, recipe, seed):
        return Cell(task, recipe, seed, "", tmp_path, {}, {}, None, tmp_path, "", "")

    a1, a2, b1, b2 = (cell(task, "ours", seed) for task in "ab" for seed in (1, 2))
    model = cell("a", "entangled", None)
    assert seconds_left([a1], [], {}, 1) is None
    assert seconds_left([a2, b2], [], {a1: 100.0, b1: 300.0}, 2) == pytest.approx(200)
    assert seconds_left([b2], [], {a1: 100.0, model: 900.0}, 1) == pytest.approx(100)  # the recipe elsewhere
    assert seconds_left([cell("c", "other", 1)], [], {a1: 100.0, b1: 200.0, model: 900.0}, 1) == pytest.approx(150)
    assert seconds_left([], [Here(a2, 30.0, 0.0)], {a1: 100.0}, 1) == pytest.approx(70)
    # a quarter of its training took 50 s: 150 s are left, and the next of its kind takes 200 s
    assert seconds_left([a2], [Here(a1, 50.0, 0.25)], {}, 1) == pytest.approx(350)
    assert seconds_left([], [Here(a1, 500.0, 0.0)], {a2: 100.0}, 1) == 0
