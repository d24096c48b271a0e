"""Figures of a continuous latent."""

import numpy as np
import pytest

from cvae_lightning.callbacks.latent_figures import (
    centroid_distances,
    latent_scatter,
    principal_plane,
    router_marginal,
)

RNG = np.random.default_rng(0)


def test_principal_plane_of_a_known_cloud():
    points = RNG.normal(size=(2000, 3)) * [0.1, 5.0, 1.0] + [7.0, 0.0, 0.0]
    centre, axes, share = principal_plane(points)
    np.testing.assert_allclose(centre, [7, 0, 0], atol=0.3)
    np.testing.assert_allclose(np.abs(axes), [[0, 1, 0], [0, 0, 1]], atol=0.05)
    assert share.sum() == pytest.approx(1, abs=0.01)
    _, axes, share = principal_plane(points[:, :1])
    assert axes.shape == (2, 1)
    assert share.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_scatter_shows_every_record_and_the_centroids_way(dimensions):
    points = RNG.normal(size=(60, dimensions))
    way = [RNG.normal(size=(3, dimensions)).tolist() for _ in range(2)]
    way.append([way[-1][k] for k in (2, 0, 1)])  # the same centroids in another order: no line crosses
    fig = latent_scatter(points, points * 0.1, [-1, 0, 1] * 20, ["bubble", "merge"], way)
    left, right = fig.axes[:2]
    assert sum(len(c.get_offsets()) for c in left.collections) == 60 + 3
    assert sum(len(c.get_offsets()) for c in right.collections) == 60
    for line in left.lines:
        np.testing.assert_allclose(line.get_xydata()[-1], line.get_xydata()[-2])
    assert {text.get_text() for text in fig.legends[0].get_texts()} == {"unknown", "bubble", "merge"}
    fig.canvas.draw()


@pytest.mark.parametrize("dimensions", [1, 3, 12])
def test_router_marginal_has_a_panel_per_dimension(dimensions):
    mean, variance = np.linspace(-1, 1, dimensions), np.full(dimensions, 1e-9)
    fig = router_marginal(mean, variance, RNG.normal(size=(50, dimensions)))
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert len(titles) == min(dimensions, 8)
    assert titles[0].startswith("d0: mean")
    assert ("first 8 of 12" in fig.get_suptitle()) == (dimensions == 12)
    fig.canvas.draw()


def test_distances_are_written_into_their_cells():
    fig = centroid_distances([[0.0, 2.5], [2.5, 0.0]])
    assert [text.get_text() for text in fig.axes[0].texts] == ["0.00", "2.50", "2.50", "0.00"]


def test_names_are_shown_as_they_are_written(tmp_path):
    names = ["$\\x$", "_hidden", "cost $5_"]
    figure = latent_scatter(RNG.normal(size=(8, 3)), RNG.normal(size=(8, 3)), [0, 1, 2, -1] * 2, names)
    figure.savefig(tmp_path / "figure.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["unknown", *names]
