"""Trials: asked of an Optuna study that several processes share, run as cells of a benchmark, told their objective."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cvae_lightning.benchmark import records, runner
from cvae_lightning.benchmark.claims import is_claimed
from cvae_lightning.benchmark.compose import differences
from cvae_lightning.benchmark.plan import Cell, combine, digest, plan
from cvae_lightning.benchmark.settings import Settings
from cvae_lightning.sweep.objective import Pruning, check_keys_of, objective
from cvae_lightning.sweep.settings import Choices, Range, SweepSettings

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

FRESH = 10.0
"""Seconds that may pass between a trial's being asked for, each claim of its cells, and its being told."""
FAILURES = 3
"""Trials that fail one after the other before a process gives up."""
IMPOSSIBLE = 50
"""Trials whose options do not fit one another, one after the other, before it does."""
Params = Mapping[str, Any]


class Search:
    """One process's part in a sweep.

    What is known about the trials lies in the study's journal, what they train and measure in folders that are named
    by their options. So a trial whose process died is asked for again, and goes on where it was broken off.

    Args:
        settings: the checked config.
        smoke: a few tiny steps, in a folder of their own.

    Raises:
        ValueError: if a config or an option does not fit.
    """

    def __init__(self, settings: SweepSettings, smoke: bool) -> None:
        self.settings, self.smoke = settings, smoke
        self.benchmark = _of_tasks(settings.benchmark)
        self._obstacles: dict[str, str | None] = {}
        self.base = plan(self.benchmark, smoke)
        self.root = self.base[0].root
        first = {name: d.texts[0] if isinstance(d, Choices) else d.low for name, d in settings.space.items()}
        cells = self.cells([first])  # refuses options that lead nowhere before anything is trained
        if settings.prune and sum(cell.seed is not None for cell in cells) > 1:
            raise ValueError("prune: expected one task and one seed, got more: trials are compared by a single curve")

    @property
    def journal(self) -> str:
        """The file that all processes share."""
        return str(self.root / "journal.jsonl")

    def options(self, params: Params) -> dict[str, Any]:
        """Return the options of a trial as they stand in a config."""
        space = self.settings.space
        return {name: json.loads(v) if isinstance(space[name], Choices) else v for name, v in params.items()}

    def name(self, params: Params) -> str:
        """Return the name of a trial's recipe, and so of its folders: it follows from the options alone."""
        (recipe,) = self.benchmark.recipes
        return f"{recipe}_{digest(self.options(params))[:8]}"

    def cells(self, trials: Sequence[Params]) -> list[Cell]:
        """Return the cells of trials, and the entangled models that they start from.

        Raises:
            ValueError: if the options of a trial do not fit one another.
            FileNotFoundError: if one of them names a file that is not there.
        """
        (recipe,) = self.benchmark.recipes.values()
        recipes = {}
        for params in trials:
            source = replace(recipe.source, options={**recipe.source.options, **self.options(params)})
            recipes[self.name(params)] = replace(recipe, source=source)
        return plan(replace(self.benchmark, recipes=recipes), self.smoke)

    def obstacle(self, params: Params) -> str | None:
        """Return why a trial cannot be run, None if it can: its options may be right one by one and not together."""
        name = self.name(params)
        if name not in self._obstacles:
            try:
                self.cells([params])
            except (ValueError, FileNotFoundError) as error:
                self._obstacles[name] = str(error)
            else:
                self._obstacles[name] = None
        return self._obstacles[name]

    def open_study(self) -> Study:
        """Return the study in the journal, which is begun if there is none.

        Raises:
            ValueError: if the journal is broken, or that of a sweep with another base, space or objective.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.root.mkdir(parents=True, exist_ok=True)
        pruner = optuna.pruners.MedianPruner() if self.settings.prune else optuna.pruners.NopPruner()
        try:
            # a lock that is a file, not a link to one: only then does Optuna notice that its owner has died
            backend = JournalFileBackend(self.journal, JournalFileOpenLock(self.journal))
            study = optuna.create_study(
                storage=JournalStorage(backend),
                study_name="sweep",
                direction=self.settings.direction,
                sampler=optuna.samplers.TPESampler(constant_liar=True),  # other processes' trials count as bad ones
                pruner=pruner,
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.journal}: not a whole journal of Optuna: {error}; move it away to begin a new sweep "
                "(what its trials have trained is found again by their options)"
            ) from error
        now = self._description()
        before = study.user_attrs.get("sweep")
        if before is None:
            study.set_user_attr("sweep", now)
        elif before != now:
            changed = "; ".join(differences(before, now))
            raise ValueError(f"{self.journal} is that of another sweep: {changed}. Give another folder with --results")
        return study

    def _description(self) -> dict[str, Any]:
        """Return all that the objective of a trial follows from, besides its options."""
        settings = self.settings
        configs = {f"{c.task}/{c.recipe}": {"fit": c.config, "test": c.test_config} for c in self.base}
        content = {
            "objective": settings.objective,
            "direction": settings.direction,
            "space": {name: vars(domain) for name, domain in settings.space.items()},
            "seeds": sorted({cell.seed for cell in self.base if cell.seed is not None}),
            "configs": configs,
        }
        described: dict[str, Any] = json.loads(json.dumps(content, default=str))
        return described

    def run(self, study: Study, trials: int, jobs: int, finished: Callable[[], object]) -> int:
        """Run trials until so many have finished, here or elsewhere, and return the exit code.

        Args:
            study: what :meth:`open_study` returned.
            trials: number of trials that are to finish.
            jobs: cells of a trial that run at a time.
            finished: called after every trial.
        """
        from optuna.trial import TrialState

        threads = self.benchmark.threads
        models = [cell for cell in self.base if cell.seed is None]
        failures, impossible, waits = 0, 0, False
        while failures < FAILURES and impossible < IMPOSSIBLE:
            self._revive(study)
            states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
            ended = states[TrialState.COMPLETE] + states[TrialState.PRUNED]
            if ended >= trials:
                return 0
            if ended + states[TrialState.RUNNING] >= trials:
                if not waits:
                    print(
                        "waiting for the last trials, which others run (should they die, they go on here)", flush=True
                    )
                waits = True
                time.sleep(runner.SCAN)
                continue
            code = self._train(models, jobs)  # first, so that whoever has asked for a trial claims it at once
            if code:
                return code
            trial = study.ask(self._distributions())
            if obstacle := self.obstacle(trial.params):
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                print(f"trial {trial.number}: failed: {obstacle}", flush=True)
                impossible += 1
                finished()
                continue
            impossible = 0
            cells = self.cells([trial.params])
            pruning = Pruning(trial, self.settings.keys) if self.settings.prune else None
            for cell in cells:
                records.check_folder(cell)
            code = runner.Runner(cells, jobs, threads, watch=pruning).run()
            if code >= 128:
                return code  # the trial stays open, and is asked for again by the next call
            failures = 0 if self._tell(study, trial, cells, pruning) else failures + 1
            finished()
        said = f"{failures} trials failed" if failures == FAILURES else f"{impossible} trials could not be run"
        print(f"stopped: {said} one after the other; see their errors above", flush=True)
        return 1

    def _train(self, models: Sequence[Cell], jobs: int) -> int:
        for cell in models:
            records.check_folder(cell)
        records.forget_absent(models)
        return runner.Runner(models, jobs, self.benchmark.threads).run()

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {name: distribution(domain) for name, domain in self.settings.space.items()}

    def _tell(self, study: Study, trial: Trial, cells: Sequence[Cell], pruning: Pruning | None) -> bool:
        """Tell the study how a trial has ended; return False if it failed."""
        from optuna.trial import TrialState

        if pruning is not None and pruning.said:
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            print(f"trial {trial.number}: pruned", flush=True)
            return True
        number = objective(cells, self.settings.keys)
        if number is None:
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            check_keys_of(cells, self.settings.keys)
            print(f"trial {trial.number}: failed, or without {self.settings.objective}", flush=True)
            return False
        study.tell(trial, number, skip_if_finished=True)
        print(f"trial {trial.number}: {number:.6g}{_best(study)}", flush=True)
        return True

    def _revive(self, study: Study) -> None:
        """Ask again for the trials whose processes have died: nobody claims their cells."""
        import optuna

        running = optuna.trial.TrialState.RUNNING
        for trial in study.get_trials(deepcopy=False, states=(running,)):
            if self._is_alive(trial):
                continue
            try:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            except (ValueError, optuna.exceptions.OptunaError):
                continue  # another process was quicker, and asks for it
            if trial.params.keys() == self.settings.space.keys() and self.obstacle(trial.params) is None:
                study.enqueue_trial(trial.params, user_attrs={"goes_on": trial.number})

    def _is_alive(self, trial: FrozenTrial) -> bool:
        now = time.time()
        if trial.datetime_start is not None and now - trial.datetime_start.timestamp() < FRESH:
            return True
        if trial.params.keys() != self.settings.space.keys() or self.obstacle(trial.params) is not None:
            return False
        cells = self.cells([trial.params])
        return any(is_claimed(cell.folder) or now - records.ended(cell) < FRESH for cell in cells)


def _of_tasks(benchmark: Settings) -> Settings:
    """Return a benchmark of one recipe in which the tasks say what its entangled models are: all trials share them."""
    ((name, recipe),) = benchmark.recipes.items()
    tasks = {
        key: replace(task, entangled=combine(task.entangled, recipe.entangled)) for key, task in benchmark.tasks.items()
    }
    return replace(benchmark, tasks=tasks, recipes={name: replace(recipe, entangled=None)})


def _best(study: Study) -> str:
    """Return which trial is the best; nothing where others have told that all have failed."""
    try:
        best = study.best_trial
    except ValueError:
        return ""
    return f" (best: {best.value:.6g}, trial {best.number})"


def distribution(domain: Range | Choices) -> BaseDistribution:
    """Return what Optuna calls a range or choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choices):
        return CategoricalDistribution(domain.texts)
    if domain.whole:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
