"""The command ``cvae-lightning benchmark``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cvae_lightning.benchmark import records
from cvae_lightning.benchmark.known import take_over
from cvae_lightning.benchmark.plan import Cell, plan, select
from cvae_lightning.benchmark.progress import clock
from cvae_lightning.benchmark.settings import find_benchmark, load_settings, positive
from cvae_lightning.config_merge import read_config
from cvae_lightning.recipes import recipe_folder


def benchmark(args: Sequence[str]) -> int:
    """Run a benchmark, or show what is there, and return the exit code."""
    given = _parse(args)
    path = find_benchmark(given.config)
    settings = load_settings(path)
    if given.results:
        settings = replace(settings, results=given.results)
    jobs = settings.jobs if given.jobs is None else positive(given.jobs, "--jobs")
    cells = plan(settings, given.smoke)
    chosen = select(cells, given.only)
    if given.known:
        print(*take_over(cells, given.known, given.rerun_changed), sep="\n")
    if given.list:
        _list(chosen)
        return 0
    from cvae_lightning.benchmark.report import write_figures, write_tables

    shown = shlex.join(["cvae-lightning", "benchmark", "--config", given.config, *(["--smoke"] if given.smoke else [])])
    code = 0
    if not given.report:
        for cell in chosen:
            records.check_folder(cell)
        _refuse_changed(chosen, given.rerun_changed)
        if given.retest:
            _say("not tested again, their trained models are not here", records.forget_tests(chosen))
        wanted = _without_idle_models(chosen, given.only)
        from cvae_lightning.benchmark.runner import Runner

        code = Runner(wanted, jobs, settings.threads, partial(write_tables, settings, cells, shown)).run()
    table = write_tables(settings, cells, shown)
    pictures = write_figures(cells) if code < 128 else []
    print(f"\ntable    {table}", f"results  {table.with_name('results.jsonl')}", sep="\n")
    for picture in pictures:
        print(f"figure   {picture}")
    return code


def _parse(args: Sequence[str]) -> argparse.Namespace:
    shipped = ", ".join(sorted(path.stem for path in recipe_folder().glob("benchmark/*.yaml") if _is_benchmark(path)))
    parser = argparse.ArgumentParser(
        prog="cvae-lightning benchmark",
        description="Train and test tasks x recipes x seeds; write results.jsonl, table.md and figures. A finished "
        "cell is never run again: call the same command again to go on, or in several processes to share the work.",
    )
    parser.add_argument("--config", required=True, help=f"YAML file, or the name of a shipped benchmark: {shipped}")
    parser.add_argument("--results", metavar="DIR", help="folder of the results, in place of the config's")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="cells at a time in this process, in place of the config's"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="run only cells whose name (task/recipe/seed1), task, recipe or seed fits a pattern, and the entangled "
        "models that they need; the tables show what else is there",
    )
    parser.add_argument(
        "--known",
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of other sittings or machines (files like results.jsonl, whole or with some of their lines): "
        "cells with the same configuration and seed count as finished, and their results are copied into the results "
        "folder; the code that measured them may be another, the table names its versions and commit",
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write tables and figures anew")
    parser.add_argument("--smoke", action="store_true", help="the same path in a few tiny steps, in DIR-smoke")
    parser.add_argument("--list", action="store_true", help="print the cells and where they stand")
    parser.add_argument(
        "--rerun-changed",
        action="store_true",
        help="run finished cells anew whose configuration has changed, or take their results from --known; their old "
        "results are deleted (where only test_options have changed, the trained model is kept)",
    )
    parser.add_argument("--retest", action="store_true", help="test finished cells again, without training them again")
    return parser.parse_args(list(args))


def _is_benchmark(path: Path) -> bool:
    """Return whether a shipped file is a benchmark, and not one of the configs that its recipes merge."""
    return "recipes" in read_config(path)


def _list(cells: Sequence[Cell]) -> None:
    width = max(len(cell.name) for cell in cells)
    for cell in cells:
        state = records.state(cell)
        result = records.read_result(cell)
        note = ""
        if state in ("done", "failed") and result is not None:
            note = clock(result["fit_seconds"] + result["test_seconds"])
        elif state in ("running", "partial"):
            note = f"step {records.step(cell)}" + (f" of {cell.max_steps}" if cell.max_steps else "")
        elif state == "changed":
            note = "; ".join(records.what_changed(cell))
        print(f"{cell.name:{width}}  {state:7}  {note}".rstrip())


def _without_idle_models(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Leave out unfinished entangled models that nobody asked for and that no unfinished cell starts from."""
    models = records.needed_models(cells)
    records.forget_absent(models)
    entangled = [cell for cell in cells if cell.seed is None and cell not in models and not records.is_done(cell)]
    idle = [cell for cell in entangled if not any(cell.matches(pattern) for pattern in patterns)]
    _say("not trained, as all that starts from them is finished (--only runs them)", idle)
    return [cell for cell in cells if cell not in idle]


def _say(what: str, cells: Sequence[Cell]) -> None:
    if cells:
        print(f"{what}: {', '.join(cell.name for cell in cells)}")


def _refuse_changed(cells: Sequence[Cell], rerun: bool) -> None:
    """Stop before anything is run where finished cells belong to another configuration.

    Raises:
        ValueError: naming them and what changed.
    """
    changed = [cell for cell in cells if records.state(cell) == "changed"]
    if not changed:
        return
    reasons: dict[str, list[str]] = {}
    for cell in changed:
        reasons.setdefault("; ".join(records.what_changed(cell)), []).append(cell.name)
    text = ". ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    if rerun:
        print(f"run anew, the configuration has changed: {text}")
        return
    raise ValueError(
        f"{len(changed)} finished cells were run with another configuration: {text}. Run them anew with "
        "--rerun-changed (their results are deleted), or give another folder with --results"
    )
