"""Why an entangled model's solutions are divided by strategy, or are not: what the seeding sees of them, and prefers.

A linear probe with labels says how well what is clustered shows the strategy at all. Then the true division and those
that the seeding finds are judged as it does, without labels: what each tells about y given x, less the length of its
code, and whether it holds where one half of the inputs is judged by the other. *Right* is of the solutions that one
strategy alone writes. A wrong solution has no strategy; in the true division it has the one that the probe gives it.

    python tests/benchmarks/seeding_probe.py .../grid_pathfinding/entangled/model grid_pathfinding
    ... --inputs 1024 --different    (of as many different inputs, as self-generated data have them)
"""

from __future__ import annotations

import argparse
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
from lightning import seed_everything
from sklearn.linear_model import LogisticRegression

from cvae_lightning import SharedDiscreteCVAE
from cvae_lightning.backbones.solution_features import solution_features
from cvae_lightning.data import SyntheticDataModule, tasks
from cvae_lightning.losses import FreeEnergyLoss, PosteriorDistillationLoss
from cvae_lightning.metrics.matching import clustering_scores
from cvae_lightning.modules.input_groups import environments_of, sides_of
from cvae_lightning.modules.seeding import LatentSeeding, solved_differently
from cvae_lightning.modules.solution_clusters import candidates, combine, decide, principal
from cvae_lightning.modules.solution_divisions import folds_of, holds, in_all_views, information


def main() -> None:
    """Print what was drawn, what a probe reads off it, and what the two divisions tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an entangled model")
    parser.add_argument("task", help="by its name, as grid_pathfinding")
    parser.add_argument("--inputs", type=int, default=512, help="records whose inputs are solved")
    parser.add_argument("--first", type=int, default=0, help="the first of these records")
    parser.add_argument("--different", action="store_true", help="leave out records whose input was there before")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shown", type=int, default=6, help="of the divisions found")
    given = parser.parse_args()
    seed_everything(given.seed, verbose=False)  # principal components of many features are found by random projections
    task = getattr(tasks, given.task.title().replace("_", ""))()
    count, seeding = len(task.strategies), LatentSeeding(num_inputs=given.inputs, seed=given.seed)
    objective = {"free_energy": FreeEnergyLoss(), "distillation": PosteriorDistillationLoss()}
    module = SharedDiscreteCVAE(given.model, objective, num_latents=count, seeding=seeding)
    module._trainer = SimpleNamespace(is_global_zero=True, progress_bar_callback=None)
    data = SyntheticDataModule(task=task, train_size=200000, val_size=512, test_size=512).records("train")
    every = (data[i] for i in range(given.first, len(data)))
    if given.different:
        seen: set[str] = set()
        every = (r for r in every if not (r.x in seen or seen.add(r.x)))
    records = list(islice(every, given.inputs))
    drawn = seeding.solve(module, list(dict.fromkeys(r.x for r in records)), records)
    solutions = solved_differently(drawn)
    writers = [task.compatible_strategies(s.x, s.y) for s in solutions]
    right = np.array([bool(names) for names in writers])
    own = np.array([task.strategies.index(*names) if len(names) == 1 else -1 for names in writers])
    print(f"{len(solutions)} solutions, of which {right.mean():.3f} are right, {(own >= 0).mean():.3f} of one strategy")

    group = seeding.num_solutions
    features = solution_features(module.reference(), module.template.unlimited(), solutions)
    views = combine({name: seeding.centre(view) for name, view in features.items()})
    components = {name: principal(view, count) for name, view in views.items()}
    held_out = np.arange(len(solutions)) // group % 4 == 0
    true = own
    for name, points in components.items():
        scaled = points / np.sqrt((points**2).mean(0)).clip(1e-9)
        fits, tests = (own >= 0) & ~held_out, (own >= 0) & held_out
        probe = LogisticRegression(max_iter=300, C=0.1).fit(scaled[fits], own[fits])
        print(f"strategy by a linear probe of {name}, held-out inputs: {probe.score(scaled[tests], own[tests]):.3f}")
        true = np.where(own >= 0, own, probe.predict(scaled))  # of the last view, which is all of them

    template, xs = module.template, list(dict.fromkeys(s.x for s in solutions))
    tokens = [ids[mask].tolist() for ids, mask in zip(*template.prefixes(xs), strict=True)]
    places = environments_of(seeding.of_inputs(features), tokens, given.seed)
    sides = sides_of(places[1:], given.seed)
    folds, halves = (folds_of(components, groupings, group) for groupings in (places, sides))
    judged = candidates(components, folds, count, group, given.seed, True)
    _, _, chosen = decide(judged, components, sides, count, group, True)
    found = [labels for _, _, labels in judged]
    print()
    heads = [*components, "all of them together, worst environment"]
    print("| division | right | entropy given x |", " | ".join(f"code, {head}" for head in heads), "| tells | holds |")
    print("|---|" + "---:|" * (len(heads) + 4))
    for number, labels in enumerate([true, *found[: given.shown]]):
        table = np.zeros((count, count), dtype=int)
        np.add.at(table, (labels[own >= 0], own[own >= 0]), 1)
        codes = [max(in_all_views([fold[i]], labels, count) for fold in folds) for i in range(len(components))]
        worst, entropy = max(in_all_views(fold, labels, count) for fold in folds), information(labels, group)
        figures = (clustering_scores(table)["one_to_one"], entropy, *codes, worst, entropy - worst)
        name = f"found, {number}{', chosen' * (labels is chosen)}" if number else "true"
        held = holds(halves, labels, count, group) if halves else float("nan")
        print("|", " | ".join([name, *(f"{v:.3f}" for v in (*figures, held))]), "|")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
