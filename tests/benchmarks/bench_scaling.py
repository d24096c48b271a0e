"""C1: how time and memory of a training step grow with K, T and V, as exponents of power laws, with a figure."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
from measure import RESULTS, Figure, extra_megabytes, options, report, seconds
from setting import Sentences, artifact, build, frozen_costs, ideal_flops, plain_step

from cvae_lightning.modules import SharedDiscreteCVAE

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

AXES: dict[str, dict[str, Any]] = {
    "K": {"values": (2, 4, 8, 16, 32, 64), "time": 1.05, "memory": 0.1, "chunk": 2},
    "T": {"values": (32, 64, 128, 256, 512, 1024), "time": 1.05, "memory": None, "chunk": None},
    "V": {"values": (1000, 4000, 16000, 64000, 152000), "time": 1.05, "memory": None, "chunk": None},
}
FIXED = {"K": 4, "T": 64, "V": 8000}
BATCH, PREFIX, WIDTH, LAYERS = 2, 32, 256, 4


def step(folder: str, latents: int, length: int, vocab: int, chunk: int | None) -> Callable[[], None]:
    """Return a hand-written training step, baseline known."""
    source = artifact(folder, "gpt2", WIDTH, LAYERS, vocab)
    module = build(SharedDiscreteCVAE, source, latents, num_latent_chunk=chunk)
    batch = module.template.collate(Sentences(PREFIX, length, BATCH, vocab).all)
    costs = frozen_costs(module, batch)
    module._reference.clear()
    return plain_step(module, batch, costs)


def exponent(x: list[float], y: list[float]) -> float:
    """Return the slope of log y over log x by least squares, over the upper half of the range."""
    half = len(x) // 2 - (len(x) < 4)
    a, b = ([math.log(value) for value in values[half:]] for values in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    above = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return above / sum((p - mean_a) ** 2 for p in a)


def main() -> None:
    """Measure, report, and draw."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    figures, curves = [], {}

    def make(axis: str, value: int, chunk: int | None) -> Callable[[], None]:
        sizes = {**FIXED, axis: value}
        with tempfile.TemporaryDirectory() as folder:
            return step(folder, sizes["K"], sizes["T"], sizes["V"], chunk)

    chosen = {axis: setting for axis, setting in AXES.items() if axis.startswith(given.only)}
    values_of = {axis: setting["values"][: 3 if given.quick else None] for axis, setting in chosen.items()}
    memories_of = {  # before anything is run here: a forked process inherits the holes in the heap
        axis: [max(1e-3, extra_megabytes(partial(make, axis, value, chosen[axis]["chunk"]))) for value in values]
        for axis, values in values_of.items()
    }
    for axis, setting in chosen.items():
        values, memories = values_of[axis], memories_of[axis]
        times = [seconds({"": make(axis, value, setting["chunk"])}, given.repeat)[""] for value in values]
        curves[axis] = (values, times, memories)
        for what, measured, unit in (("time", times, "s"), ("memory", memories, "MB")):
            note = ", ".join(f"{axis}={v}: {m:.3g} {unit}" for v, m in zip(values, measured, strict=True))
            gate = setting[what]
            figures.append(Figure(f"C1 {what} in {axis}, exponent", exponent(values, measured), gate, None, note, True))
        sizes = [{**FIXED, axis: value} for value in values]
        work = [ideal_flops(BATCH, PREFIX, s["K"], s["T"], WIDTH, LAYERS, s["V"]) for s in sizes]
        note = "arithmetic alone, attention included, which is quadratic in T"
        figures.append(Figure(f"C1 FLOP of the ideal step in {axis}, exponent", exponent(values, work), note=note))
    if given.write:
        draw(curves)
    report("Growth of the training step", figures, given)


def draw(curves: dict[str, tuple[Any, list[float], list[float]]]) -> None:
    """Write the figure beside the table."""
    figure, panels = plt.subplots(2, len(curves), figsize=(3.6 * len(curves), 5.2), squeeze=False)
    for column, (axis, (values, *measured)) in enumerate(curves.items()):
        for row, (what, unit) in enumerate((("step time", "s"), ("extra memory", "MB"))):
            panel, y = panels[row][column], measured[row]
            panel.loglog(values, y, "o-")
            panel.set_xticks(values, [f"{value // 1000}k" if value % 1000 == 0 else f"{value}" for value in values])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_ylim(min(y) / 2, 2 * max(y))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.tick_params(labelsize=8)
            panel.set_xlabel(axis)
            panel.set_ylabel(f"{what} [{unit}]")
            panel.set_title(f"exponent {exponent(list(values), y):.2f}", fontsize=9)
            panel.grid(alpha=0.3, which="both")
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "bench_scaling.png", dpi=110)


if __name__ == "__main__":
    main()
