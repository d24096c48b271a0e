"""The command ``cvae-lightning sweep``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cvae_lightning.benchmark.settings import find_benchmark, positive
from cvae_lightning.recipes import recipe_folder
from cvae_lightning.sweep.settings import load_sweep

if TYPE_CHECKING:
    from optuna import Study

    from cvae_lightning.sweep.search import Search


def sweep(args: Sequence[str]) -> int:
    """Run a sweep, or go on with it, and return the exit code."""
    given = _parse(args)
    settings = load_sweep(find_benchmark(given.config, "sweep"))
    if given.results:
        settings = replace(settings, benchmark=replace(settings.benchmark, results=given.results))
    jobs = settings.benchmark.jobs if given.jobs is None else positive(given.jobs, "--jobs")
    wanted = min(settings.trials, 2) if given.smoke else settings.trials
    trials = wanted if given.trials is None else positive(given.trials, "--trials")
    if find_spec("optuna") is None:
        raise ModuleNotFoundError("cvae-lightning sweep needs Optuna: pip install 'cvae-lightning[sweep]'")
    from cvae_lightning.sweep.search import Search

    search = Search(settings, given.smoke)
    if given.report and not Path(search.journal).exists():
        raise ValueError(f"--report: there is no sweep in {search.root} yet")
    if settings.caution:
        print(f"note: {settings.caution}")
    study = search.open_study()
    words = ["cvae-lightning", "sweep", "--config", given.config, *(["--smoke"] if given.smoke else [])]
    tables = partial(write_tables, search, study, shlex.join(words))
    try:
        code = 0 if given.report else search.run(study, trials, jobs, tables)
    except KeyboardInterrupt:  # while it waited for the trials of others
        code = 130
    print(f"\ntrials   {tables()}", f"results  {search.root / 'results.jsonl'}", sep="\n")
    return code


def write_tables(search: Search, study: Study, command: str) -> Path:
    """Write trials.md, and results.jsonl and table.md of all their cells; return the path of the first."""
    from cvae_lightning.atomic_write import write_text
    from cvae_lightning.benchmark.report import write_tables as write_cells
    from cvae_lightning.sweep.table import markdown

    trials = [
        trial for trial in study.get_trials(deepcopy=False) if trial.params.keys() == search.settings.space.keys()
    ]
    possible = [trial.params for trial in trials if search.obstacle(trial.params) is None]
    cells = search.cells(possible) if possible else search.base
    write_cells(search.benchmark, cells, command)
    path = search.root / "trials.md"
    write_text(path, markdown(search, trials, command))
    return path


def _parse(args: Sequence[str]) -> argparse.Namespace:
    shipped = ", ".join(sorted(path.stem for path in recipe_folder().glob("sweep/*.yaml")))
    parser = argparse.ArgumentParser(
        prog="cvae-lightning sweep",
        description="Search for options of a recipe with Optuna, by the evidence on the validation split unless the "
        "config says otherwise. Call the same command again to go on, or in several processes and on several machines "
        "that share the results folder to share the work. Writes trials.md, results.jsonl, table.md.",
    )
    parser.add_argument("--config", required=True, help=f"YAML file, or the name of a shipped sweep: {shipped}")
    parser.add_argument("--results", metavar="DIR", help="folder of the results, in place of the config's")
    parser.add_argument("--trials", type=int, metavar="N", help="trials that are to finish, in place of the config's")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells of a trial (tasks x seeds) at a time, in place of the config's"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables anew")
    parser.add_argument("--smoke", action="store_true", help="two trials of a few tiny steps, in DIR-smoke")
    return parser.parse_args(list(args))
