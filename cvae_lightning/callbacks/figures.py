"""Figures of a latent-strategy model as pure functions: numbers in, one matplotlib ``Figure`` out.

They use ``Figure`` objects and never ``pyplot``, so they hold no global state and need no display. All are laid out for
600 to 900 pixels of width at 100 dpi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

MAX_ANNOTATED = 144
"""Heatmaps with more cells than this carry no numbers."""


def _latent_ticks(count: int) -> tuple[list[int], list[str]]:
    """Return tick positions and names, thinned out where they would overlap."""
    at = list(range(0, count, -(-count // 24)))
    return at, [f"z{k}" for k in at]


def _colors(count: int) -> list[Any]:
    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](i) for i in np.linspace(0.05, 0.95, count)]


def _annotate(ax: Any, shade: np.ndarray, texts: Sequence[Sequence[str]]) -> None:
    """Write ``texts`` into the cells of a heatmap, white on the dark ones; ``shade`` is in [0, 1]."""
    for (i, j), value in np.ndenumerate(shade):
        ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=9, color="white" if value > 0.55 else "black")


def latent_strategy_heatmap(
    table: ArrayLike,
    strategy_names: Sequence[str],
    title: str = "latent × strategy",
    score: float | None = None,
    ceiling: float | None = None,
) -> Figure:
    """Draw which strategy each latent stands for; the best one-to-one matching is outlined.

    Args:
        table: [K, S] counts (integers) or shares in [0, 1].
        strategy_names: S column names.
        title: first line above the picture.
        score: alignment to print in the title, in [0, 1].
        ceiling: highest reachable score, printed beside it.

    Returns:
        The figure; the colour is the share of each latent's row, so rare latents stay visible.
    """
    values = np.asarray(table)
    num_latents, num_strategies = values.shape
    counts = np.issubdtype(values.dtype, np.integer)
    totals = values.sum(1, keepdims=True)
    share = np.divide(values, totals, out=np.zeros(values.shape), where=totals > 0) if counts else np.nan_to_num(values)
    fig = Figure(
        figsize=(min(9.0, 3.0 + 0.95 * num_strategies), min(9.0, 1.9 + 0.42 * num_latents)), layout="constrained"
    )
    ax = fig.add_subplot()
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if values.size <= MAX_ANNOTATED:
        _annotate(ax, share, [[str(v) if counts else f"{v:.2f}" for v in row] for row in values])
    for k, s in zip(*linear_sum_assignment(share if not counts else values, maximize=True), strict=True):
        ax.add_patch(Rectangle((s - 0.5, k - 0.5), 1, 1, fill=False, edgecolor="tab:orange", linewidth=2.5))
    ax.set_xticks(range(num_strategies))
    slanted = num_strategies > 3
    ax.set_xticklabels(
        strategy_names, rotation=20 if slanted else 0, ha="right" if slanted else "center", parse_math=False
    )
    ax.set_yticks(*_latent_ticks(num_latents))
    ax.set_ylabel("latent")
    if score is not None:
        of = "" if ceiling is None else f" of {ceiling:.3f}"
        title += f"\none-to-one alignment {score:.3f}{of} (outlined)"
    ax.set_title(title, fontsize=11)
    fig.colorbar(image, ax=ax, label="share of the latent's row" if counts else "mean share")
    return fig


def usage_bars(
    router: ArrayLike, posterior: ArrayLike | None = None, dead_below: float | None = None, title: str = "latent usage"
) -> Figure:
    """Draw how often each latent is used by the router and by the posterior.

    Args:
        router: [K] aggregate p(z), sums to 1.
        posterior: [K] aggregate q(z).
        dead_below: share under which a latent counts as dead; drawn as a line.
        title: text above the picture.
    """
    router = np.asarray(router, dtype=float)
    count = len(router)
    at = np.arange(count)
    series = [("router p(z)", router, "tab:blue")]
    if posterior is not None:
        series.append(("posterior q(z)", np.asarray(posterior, dtype=float), "tab:orange"))
    fig = Figure(figsize=(min(9.0, 4.0 + 0.5 * count), 3.6), layout="constrained")
    ax = fig.add_subplot()
    width = 0.8 / len(series)
    for i, (label, values, color) in enumerate(series):
        bars = ax.bar(at + (i - (len(series) - 1) / 2) * width, values, width, label=label, color=color)
        if count <= 8:
            ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    ax.axhline(1 / count, color="0.5", linestyle=":", label=f"uniform 1/{count}")
    if dead_below is not None:
        ax.axhline(dead_below, color="tab:red", linestyle="--", label=f"dead below {dead_below:.3g}")
    ax.set_xticks(*_latent_ticks(count))
    ax.set_ylabel("share")
    ax.set_ylim(0, 1.15 * max(float(np.nanmax(values)) for _, values, _ in series) + 1e-3)
    ax.set_title(title, fontsize=11)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    return fig


def token_label(token: str) -> str:
    """Return a token's text as it can stand under a tick: white space made visible, long tokens cut."""
    text = "".join(
        {"\n": "↵", "\t": "→", "Ġ": "␣", "Ċ": "↵", "▁": "␣"}.get(c, "␣" if c.isspace() else c) for c in token
    )
    return text if len(text) <= 10 else text[:9] + "…"


def token_weight_strip(
    tokens: Sequence[Sequence[str]],
    token_nll: Sequence[ArrayLike],
    weights: Sequence[ArrayLike] | None = None,
    jsd: Sequence[ArrayLike] | None = None,
    titles: Sequence[str] | None = None,
    max_tokens: int = 40,
) -> Figure:
    """Draw where along y the latents differ: w_t, JSD_t and the NLL of every latent, one column per token.

    Args:
        tokens: one list of T_i token texts per sequence.
        token_nll: per sequence [K, T_i], nats.
        weights: per sequence [T_i], w_t = the entangled model's NLL, nats.
        jsd: per sequence [T_i], inter-latent divergence, nats.
        titles: one heading per sequence.
        max_tokens: longer sequences are cut to their first tokens, where strategies differ most.

    Returns:
        The figure; one colour scale per quantity, shared by all sequences: it ends at the largest value
        (NLL: 99th percentile), and at 0.01 nats at least, so that noise stays pale.
    """
    given = {"$w_t$": weights, "JSD$_t$": jsd, "NLL": token_nll}
    rows = {
        name: [np.nan_to_num(np.atleast_2d(np.asarray(v, dtype=float))[:, :max_tokens]) for v in values]
        for name, values in given.items()
        if values is not None
    }
    top = {
        name: max(
            0.01, float(np.nanpercentile(np.concatenate([v.ravel() for v in values]), 99 if name == "NLL" else 100))
        )
        for name, values in rows.items()
    }
    cmaps = {"$w_t$": "Oranges", "JSD$_t$": "Greens", "NLL": "Purples"}
    count, num_latents = len(tokens), rows["NLL"][0].shape[0]
    heights = [1.0] * (len(rows) - 1) + [float(min(num_latents, 16))]
    block_height = 0.85 + 0.27 * sum(heights)
    fig = Figure(figsize=(9.0, 0.55 + count * block_height), layout="constrained")
    blocks = fig.subfigures(count + 1, 1, squeeze=False, height_ratios=[block_height] * count + [0.55])[:, 0]
    images: dict[str, Any] = {}
    for i, block in enumerate(blocks[:count]):
        column = block.subplots(len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for ax, (name, values) in zip(column, rows.items(), strict=True):
            images[name] = ax.imshow(
                values[i], cmap=cmaps[name], vmin=0, vmax=top[name], aspect="auto", interpolation="nearest"
            )
            ax.set_yticks(*(_latent_ticks(num_latents) if name == "NLL" else ([0], [name])))
            ax.tick_params(axis="y", length=0, labelsize=8)
            ax.tick_params(axis="x", bottom=False, labelbottom=ax is column[-1], pad=1)
        shown = [token_label(t) for t in tokens[i][:max_tokens]]
        labels = column[-1].set_xticks(range(len(shown)), shown, fontsize=8, parse_math=False)
        for tick in labels:
            if len(tick.label1.get_text()) > 2:
                tick.label1.set_rotation(60)
        heading = titles[i] if titles is not None else ""
        heading = heading if len(heading) <= 100 else heading[:99] + "…"
        if len(tokens[i]) > max_tokens:
            heading += f"   (first {max_tokens} of {len(tokens[i])} tokens)"
        column[0].set_title(heading, fontsize=9, loc="left", parse_math=False)
    scales = blocks[count].subplots(1, len(images), squeeze=False)[0]
    for ax, (name, image) in zip(scales, images.items(), strict=True):
        fig.colorbar(image, cax=ax, orientation="horizontal")
        ax.set_title(f"{name} (nats)", fontsize=8)
        ax.tick_params(labelsize=7)
    return fig


def loss_contribution_stack(
    steps: Sequence[int], fractions: Mapping[str, Sequence[float]], title: str = "share of each term in the objective"
) -> Figure:
    """Draw the contribution of every loss term |weight_i L_i| / sum_j |weight_j L_j| over the run, stacked to 1.

    Args:
        steps: N optimizer steps, ascending.
        fractions: N values per term name; NaN counts as 0. Terms that never contribute are left out.
        title: text above the picture.
    """
    series = {name: np.nan_to_num(np.asarray(values, dtype=float)) for name, values in fractions.items()}
    series = {name: values for name, values in series.items() if np.any(values > 0)}
    fig = Figure(figsize=(8.4, 3.8), layout="constrained")
    ax = fig.add_subplot()
    colors = _colors(len(series))
    at = np.asarray(steps, dtype=float)
    if len(at) == 1 and series:  # one point has no area: draw it as a flat band
        at = np.array([at[0] - 0.5, at[0] + 0.5])
        series = {name: np.repeat(values, 2) for name, values in series.items()}
    if series:
        ax.stackplot(at, *series.values(), colors=colors, alpha=0.9)
        ax.set_xlim(at[0], at[-1])
    handles = [Patch(color=c, label=f"{n}  {v[-1]:.2f}") for c, (n, v) in zip(colors, series.items(), strict=True)]
    ax.set_ylim(0, 1)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("fraction of |objective|")
    ax.set_title(title, fontsize=11)
    if handles:
        fig.legend(
            handles=handles[::-1], fontsize=8, loc="outside right upper", title="term, last value", title_fontsize=8
        )
    return fig


def seed_scatter(
    points: ArrayLike, clusters: ArrayLike, title: str = "where the latents start: solutions of the entangled model"
) -> Figure:
    """Draw the solutions from which the latents start, coloured by the latent that each is a seed of.

    Args:
        points: [N, 2] first two principal components of the solutions, less the mean over those of the same input.
        clusters: [N] their clusters, numbered like the latents.
        title: text above the picture.
    """
    at, cluster = np.asarray(points, dtype=float), np.asarray(clusters)
    count = int(cluster.max()) + 1
    order = np.random.default_rng(0).permutation(len(at))  # or the last cluster would hide the others
    colors = _colors(count)
    fig = Figure(figsize=(7.2, 5.0), layout="constrained")
    ax = fig.add_subplot()
    shades = [colors[k] for k in cluster[order]]
    size = float(np.clip(20000 / len(at), 5, 40))
    ax.scatter(at[order, 0], at[order, 1], s=size, c=shades, alpha=0.6, linewidths=0)
    ax.set_xlabel("first principal component")
    ax.set_ylabel("second principal component")
    ax.set_title(title, fontsize=11)
    sizes = np.bincount(cluster, minlength=count)
    fig.legend(
        handles=[Patch(color=colors[k], label=f"z{k}  {sizes[k]}") for k in range(count)],
        ncols=-(-count // 24),
        fontsize=8,
        loc="outside right upper",
        title="latent, solutions",
        title_fontsize=8,
    )
    return fig


def latent_distance_heatmap(distance: ArrayLike, title: str = "distance between the outputs of two latents") -> Figure:
    """Draw the [K, K] mean distance, in [0, 1], between what two latents generate for the same x."""
    values = np.asarray(distance, dtype=float)
    count = len(values)
    size = min(9.0, 3.4 + 0.42 * count)
    fig = Figure(figsize=(size + 0.9, size), layout="constrained")
    ax = fig.add_subplot()
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=1)
    if values.size <= MAX_ANNOTATED:
        _annotate(ax, np.nan_to_num(values), [[f"{v:.2f}" for v in row] for row in values])
    ax.set_xticks(*_latent_ticks(count))
    ax.set_yticks(*_latent_ticks(count))
    ax.set_title(title, fontsize=10)
    fig.colorbar(image, ax=ax, label="0 same, 1 nothing in common", shrink=0.85)
    return fig
