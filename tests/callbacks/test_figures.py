import io
import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cvae_lightning.callbacks import figures

RANDOM = np.random.default_rng(0)


def pixels(figure: Figure) -> tuple[int, int]:
    """Render with warnings as errors and return (width, height)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png")
    buffer.seek(0)
    image = pyplot.imread(buffer)
    assert image.std() > 0.01
    return image.shape[1], image.shape[0]


def cell_texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def outlined(ax) -> set[tuple[int, int]]:
    """Return the (row, column) of every outlined cell."""
    frames = [p for p in ax.patches if isinstance(p, Rectangle)]
    return {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in frames}


def test_heatmap_annotates_counts_and_outlines_the_best_matching():
    table = np.array([[1, 90, 4], [80, 70, 0], [2, 3, 5], [0, 0, 0]])
    fig = figures.latent_strategy_heatmap(table, ["bubble", "in$ertion_$", "merge"], "posterior", 0.87, 0.95)
    ax = fig.axes[0]
    assert cell_texts(ax) == [str(v) for v in table.ravel()]
    assert outlined(ax) == {(0, 1), (1, 0), (2, 2)}  # greedy by row would give the same row 1 to column 0 only by luck
    assert "0.870 of 0.950" in ax.get_title()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["bubble", "in$ertion_$", "merge"]
    np.testing.assert_allclose(ax.images[0].get_array()[1], [80 / 150, 70 / 150, 0])
    assert 500 <= pixels(fig)[0] <= 900


def test_matching_is_global_not_greedy():
    fig = figures.latent_strategy_heatmap(np.array([[10, 9], [9, 1]]), ["a", "b"])
    assert outlined(fig.axes[0]) == {(0, 1), (1, 0)}  # 18 beats 11


def test_heatmap_of_shares_and_large_tables():
    fig = figures.latent_strategy_heatmap(np.array([[0.5, 0.25], [0.0, 1.0]]), ["a", "b"])
    assert cell_texts(fig.axes[0]) == ["0.50", "0.25", "0.00", "1.00"]
    large = figures.latent_strategy_heatmap(RANDOM.integers(0, 9, (32, 6)), list("abcdef"))
    assert cell_texts(large.axes[0]) == []
    assert pixels(large)[0] <= 900


@pytest.mark.parametrize("count", [2, 4, 16])
def test_usage_bars(count):
    router, posterior = RANDOM.dirichlet(np.ones(count), 2)
    fig = figures.usage_bars(router, posterior, dead_below=0.1 / count)
    ax = fig.axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [*router, *posterior])
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([1 / count, 0.1 / count])
    assert 400 <= pixels(fig)[0] <= 900


def test_token_strip_has_one_column_per_token():
    lengths, latents = (6, 3), 4
    nll = [RANDOM.exponential(1, (latents, n)) for n in lengths]
    weights = [RANDOM.exponential(1, n) for n in lengths]
    jsd = [RANDOM.random(n) for n in lengths]
    tokens = [["<", "a$", "\n", "Ġthe", "</y>", "averyverylongtoken"], ["1", "_", "</y>"]]
    fig = figures.token_weight_strip(tokens, nll, weights, jsd, ["x = 1$2$", "second"])
    strips = fig.axes[:6]
    for i in range(2):
        shown = [ax.images[0].get_array() for ax in strips[3 * i : 3 * i + 3]]
        np.testing.assert_allclose(shown[0], weights[i][None])
        np.testing.assert_allclose(shown[1], jsd[i][None])
        np.testing.assert_allclose(shown[2], nll[i])
    labels = [t.get_text() for t in strips[2].get_xticklabels()]
    assert labels == ["<", "a$", "↵", "␣the", "</y>", "averyvery…"]
    assert pixels(fig)[0] == 900


def test_token_strip_without_options_and_cut():
    fig = figures.token_weight_strip([["t"] * 50], [RANDOM.random((1, 50))], titles=["long"], max_tokens=10)
    assert fig.axes[0].images[0].get_array().shape == (1, 10)
    assert "first 10 of 50" in fig.axes[0].get_title(loc="left")
    pixels(fig)
    pixels(figures.token_weight_strip([["t"]], [np.zeros((2, 1))], [np.zeros(1)], [np.zeros(1)]))


@pytest.mark.parametrize("steps", [[10], [10, 20, 30]])
def test_contribution_stack_fills_the_unit_interval(steps):
    shares = RANDOM.dirichlet(np.ones(3), len(steps))
    fractions = {name: list(shares[:, i]) for i, name in enumerate(("a", "b", "c"))}
    fig = figures.loss_contribution_stack(steps, {**fractions, "never": [0.0] * len(steps)})
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in fig.axes[0].collections]
    assert len(tops) == 3
    assert max(tops) == pytest.approx(1.0)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [
        f"{name}  {fractions[name][-1]:.2f}" for name in ("c", "b", "a")
    ]
    assert 600 <= pixels(fig)[0] <= 900


def test_empty_contribution_stack_and_distance_heatmap():
    pixels(figures.loss_contribution_stack([], {}))
    distance = np.array([[0.0, 0.25], [0.25, 0.0]])
    fig = figures.latent_distance_heatmap(distance)
    np.testing.assert_allclose(fig.axes[0].images[0].get_array(), distance)
    pixels(fig)


@pytest.mark.parametrize("count", [2, 4, 40])
def test_seed_scatter_shows_every_point_in_the_colour_of_its_latent(count):
    clusters = np.concatenate([np.arange(count), RANDOM.integers(count, size=300)])
    points = RANDOM.normal(size=(len(clusters), 2)) + clusters[:, None]
    fig = figures.seed_scatter(points, clusters)
    (dots,) = fig.axes[0].collections
    shown = {(*at, *colour[:3]) for at, colour in zip(dots.get_offsets(), dots.get_facecolors(), strict=True)}
    patches = fig.legends[0].get_patches()
    colours = [patch.get_facecolor()[:3] for patch in patches]
    assert len(set(colours)) == count
    assert shown == {(*at, *colours[k]) for at, k in zip(points, clusters, strict=True)}
    texts = [t.get_text() for t in fig.legends[0].get_texts()]
    assert texts == [f"z{k}  {(clusters == k).sum()}" for k in range(count)]
    assert 600 <= pixels(fig)[0] <= 900


def test_no_global_pyplot_state():
    figures.latent_distance_heatmap(np.zeros((2, 2)))
    assert pyplot.get_fignums() == []
