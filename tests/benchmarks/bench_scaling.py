"""C1: how time and memory of a training step grow with K, T and V, as exponents of power laws, with a figure."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
from measure import RESULTS, Figure, extra_megabytes, options, report, seconds
from setting import Sentences, artifact, build, frozen_costs, ideal_flops, plain_step

from cvae_lightning.modules import SharedDiscreteCVAE

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator


class Sweep(NamedTuple):
    """One size that grows while the others stay.

    Args:
        axis: the size, K, T or V.
        values: what it grows through.
        time: largest exponent of the step's time that passes.
        memory: the same of its extra memory; None = for information.
        chunk: latents at a time.
        width: of the model.
    """

    axis: str
    values: tuple[int, ...]
    time: float = 1.05
    memory: float | None = None
    chunk: int | None = None
    width: int = 256

    @property
    def name(self) -> str:
        """The axis, and the width where it is not the usual one."""
        return self.axis + (f" at width {self.width}" if self.width != 256 else "")

    def sizes(self, value: int) -> dict[str, int]:
        """Return K, T and V at a value of the axis."""
        return {"K": 4, "T": 64, "V": 8000, self.axis: value}


SWEEPS = (
    Sweep("K", (2, 4, 8, 16, 32, 64), memory=0.1, chunk=2),
    Sweep("T", (32, 64, 128, 256, 512, 1024)),
    Sweep("T", (32, 64, 128, 256, 512, 1024), width=768),
    Sweep("V", (1000, 4000, 16000, 64000, 152000)),
)
BATCH, PREFIX, LAYERS = 2, 32, 4


def step(folder: str, sweep: Sweep, value: int) -> Callable[[], None]:
    """Return a hand-written training step, baseline known."""
    sizes = sweep.sizes(value)
    source = artifact(folder, "gpt2", sweep.width, LAYERS, sizes["V"])
    module = build(SharedDiscreteCVAE, source, sizes["K"], num_latent_chunk=sweep.chunk)
    batch = module.template.collate(Sentences(PREFIX, sizes["T"], BATCH, sizes["V"]).all)
    costs = frozen_costs(module, batch)
    module._reference.clear()
    return plain_step(module, batch, costs)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x by least squares."""
    a, b = ([math.log(value) for value in values] for values in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    above = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return above / sum((p - mean_a) ** 2 for p in a)


def upper(values: Sequence[float]) -> Sequence[float]:
    """Return the upper half of a range, where what every step costs weighs least; at least two values."""
    return values[min(len(values) // 2, len(values) - 2) :]


def main() -> None:
    """Measure, report, and draw."""
    warnings.filterwarnings("ignore")
    given = options(__doc__ or "")
    figures, curves = [], {}

    def make(sweep: Sweep, value: int) -> Callable[[], None]:
        with tempfile.TemporaryDirectory() as folder:
            return step(folder, sweep, value)

    sweeps = [
        s._replace(values=s.values[: 3 if given.quick else None]) for s in SWEEPS if s.name.startswith(given.only)
    ]
    memories_of = {  # before anything is run here: a forked process inherits the holes in the heap
        sweep: [max(1e-3, extra_megabytes(partial(make, sweep, value))) for value in sweep.values] for sweep in sweeps
    }
    for sweep, memories in memories_of.items():
        axis, values = sweep.axis, sweep.values
        times = [seconds({"": make(sweep, value)}, given.repeat)[""] for value in values]
        curves[sweep] = (times, memories)
        sizes = [sweep.sizes(value) for value in values]
        work = [ideal_flops(BATCH, PREFIX, s["K"], s["T"], sweep.width, LAYERS, s["V"]) for s in sizes]
        for what, measured, unit, gate in (
            ("time", times, "s", sweep.time),
            ("memory", memories, "MB", sweep.memory),
            ("FLOP of the ideal step", work, "FLOP", None),
        ):
            note = ", ".join(f"{axis}={v}: {m:.3g} {unit}" for v, m in zip(values, measured, strict=True))
            half = exponent(upper(values), upper(measured))
            label = f"C1 {what} in {sweep.name}, exponent"
            figures.append(
                Figure(label, exponent(values, measured), gate, None, f"upper half {half:.3g}; {note}", True)
            )
    if given.write:
        draw(curves)
    report("Growth of the training step", figures, given)


def draw(curves: Mapping[Sweep, tuple[list[float], list[float]]]) -> None:
    """Write the figure beside the table."""
    figure, panels = plt.subplots(2, len(curves), figsize=(3.6 * len(curves), 5.2), squeeze=False)
    for column, (sweep, measured) in enumerate(curves.items()):
        values = sweep.values
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
            panel.set_xlabel(sweep.name)
            panel.set_ylabel(f"{what} [{unit}]")
            whole, half = exponent(values, y), exponent(upper(values), upper(y))
            panel.set_title(f"exponent {whole:.2f}, upper half {half:.2f}", fontsize=9)
            panel.grid(alpha=0.3, which="both")
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "bench_scaling.png", dpi=110)


if __name__ == "__main__":
    main()
