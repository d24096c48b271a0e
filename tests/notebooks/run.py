"""Executes the notebooks in a Jupyter kernel, whole, and checks what they claim: ``make notebooks``.

``python tests/notebooks/run.py --out FOLDER`` keeps them with their outputs, as .ipynb, and every picture as PNG.
"""

import argparse
import base64
import resource
import sys
import tempfile
import time
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CLAIMS = {
    "1_quickstart": "assert agreement > 0.9 * ceiling and last['val/controlled/alignment_one_to_one'] > 0.9 * ceiling\n"
    "assert last['val/marginal_nll'] < last['val/baseline_nll'] and last['val/rho_recon'] < 0.3",
    "2_your_own": "assert model.route(xs).exp().amax(-1).mean() > 0.9 > 0.6 > plain.route(xs).exp().amax(-1).mean()\n"
    "assert plain.log_evidence(xs, ys).mean() > model.log_evidence(xs, ys).mean()",
    "3_collapsed_run": "assert said_collapsed and not said_healthy\n"
    "assert found_collapsed['val/alignment/one_to_one'] < 0.5 < 0.8 < found_healthy['val/alignment/one_to_one']",
}
"""A last cell for each notebook: what its text says of the numbers above it."""


def execute(path, folder):
    """Run a notebook in ``folder`` and return it with its outputs."""
    import jupytext
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell

    notebook = jupytext.read(path)
    notebook.cells.append(new_code_cell(CLAIMS[path.stem]))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    notebook.cells.pop()
    return notebook


def keep(notebook, name, out):
    """Write a notebook with its outputs, and its pictures one by one."""
    import jupytext

    jupytext.write(notebook, out / f"{name}.ipynb")
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    for number, data in enumerate(data for data in shown if "image/png" in data):
        (out / f"{name}_{number}.png").write_bytes(base64.b64decode(data["image/png"]))


def cpu_seconds():
    """Return the CPU time of the kernels that have ended: what a run takes on a free core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = sorted(NOTEBOOKS.glob("*.py"))
    if {path.stem for path in found} != {*CLAIMS}:
        sys.exit(f"notebooks are {[path.stem for path in found]}, and there are claims for {sorted(CLAIMS)}")
    with tempfile.TemporaryDirectory() as folder:  # one for all: the first trains the entangled model of the others
        for path in found:
            begun, worked = time.monotonic(), cpu_seconds()
            notebook = execute(path, folder)
            seconds = time.monotonic() - begun
            print(f"{path.stem}: {seconds:.0f} s, {cpu_seconds() - worked:.0f} s of them at work", flush=True)
            if given.out is not None:
                given.out.mkdir(parents=True, exist_ok=True)
                keep(notebook, path.stem, given.out)


if __name__ == "__main__":
    main()
