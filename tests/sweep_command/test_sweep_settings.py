"""The config file of a sweep: what is read, what is refused, and that the shipped ones fit."""

import copy
import re

import optuna
import pytest
import yaml

from cvae_lightning import cli
from cvae_lightning.benchmark.plan import located
from cvae_lightning.recipes import recipe_folder
from cvae_lightning.sweep.search import Search, distribution
from cvae_lightning.sweep.settings import Choices, load_sweep

GOOD = {
    "results": "out",
    "tasks": {"sorting_algorithms": {"entangled": "entangled_sorting_algorithms"}},
    "recipes": {"ours": {"configs": ["discrete_{task}"]}},
    "space": {
        "model.posterior_temperature": {"low": 0.1, "high": 1, "log": True},
        "model.num_latents": {"low": 2, "high": 8, "step": 2},
        "model.seeding": {"choices": [None, {"a": 1}]},
    },
}
SWEEPS = sorted(path.stem for path in recipe_folder().glob("sweep/*.yaml"))


def load(tmp_path, change=lambda content: None):
    content = copy.deepcopy(GOOD)
    change(content)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_sweep(path)


def put(*path):
    *parts, value = path

    def change(content):
        for part in parts[:-1]:
            content = content[part]
        content[parts[-1]] = value

    return change


def test_reads_the_space_and_chooses_by_the_evidence_unless_told_otherwise(tmp_path):
    settings = load(tmp_path)
    assert [distribution(domain) for domain in settings.space.values()] == [
        optuna.distributions.FloatDistribution(0.1, 1.0, log=True),
        optuna.distributions.IntDistribution(2, 8, step=2),
        optuna.distributions.CategoricalDistribution(["null", '{"a": 1}']),
    ]
    assert (settings.objective, settings.direction, settings.prune) == ("val/marginal_nll", "minimize", False)
    assert settings.caution is None
    assert settings.benchmark.seeds == (1,)


@pytest.mark.parametrize(
    ("objective", "caution"),
    [
        ("val/marginal_nll / val/baseline_nll", None),
        ("nll_ratio", "nll_ratio chooses by the test split, on which the best trial's figures are no longer an honest"),
        (
            "val/alignment/one_to_one",
            "val/alignment/one_to_one chooses by labels or a verifier, which no training sees",
        ),
        ("alignment_one_to_one / alignment_ceiling", "by the test split, .* and by labels or a verifier"),
    ],
)
def test_says_what_an_objective_looks_at(tmp_path, objective, caution):
    found = load(tmp_path, put("objective", objective)).caution
    assert (found is None) == (caution is None)
    assert caution is None or re.search(caution, found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("trial", 3), "unknown key trial"),
        (put("recipes", {}), "recipes is missing or empty"),
        (put("recipes", {n: {"configs": ["x"]} for n in "ab"}), "recipes: expected one recipe, got a, b"),
        (put("space", {}), "space is missing or empty"),
        (put("space", ["a"]), "space: expected a mapping"),
        (put("space", "a", {"low": 1}), "space.a: expected choices, or low and high as numbers"),
        (put("space", "a", {"low": 1, "height": 2}), "unknown key space.a.height; did you mean 'high'"),
        (put("space", "a", {"low": 2, "high": 2}), "space.a: expected low < high"),
        (put("space", "a", {"low": 0, "high": 2, "log": True}), "space.a: expected log as true or false, and with log"),
        (put("space", "a", {"low": 1, "high": 3, "step": 0.5}), "space.a: expected a whole step"),
        (put("space", "a", {"low": 0.1, "high": float("inf")}), "space.a: expected choices, or low and high"),
        (put("space", "a", {"low": 1, "high": 3, "step": 3}), "space.a: expected low < high, and at least one step"),
        (put("space", "a", {"low": -1e9, "high": 3, "step": 0.1}), "space.a: expected low < high, .*at most a million"),
        (put("space", "a", {"choices": []}), "space.a: expected choices as a list"),
        (put("space", "a", {"choices": [1, 1]}), "space.a.choices: expected different values"),
        (put("objective", "val/accuracy"), "objective: 'val/accuracy' is none of val/alignment/one_to_one, "),
        (put("objective", "a / b / c"), "objective: expected KEY or 'KEY / KEY'"),
        (put("direction", "down"), "direction: expected minimize or maximize, got 'down'"),
        (put("trials", 0), "trials: expected an integer of at least 1"),
        (put("prune", 1), "prune: expected true or false, got 1"),
        (
            lambda content: content.update(prune=True, objective="rho_recon"),
            "prune: expected an objective of validation",
        ),
    ],
)
def test_refuses_what_is_wrong_and_names_file_and_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"sweep\.yaml: {message}"):
        load(tmp_path, change)


@pytest.mark.parametrize("name", SWEEPS)
def test_both_ends_of_the_shipped_sweeps_parse(name, tmp_path, capsys):
    search = Search(load_sweep(recipe_folder() / f"sweep/{name}.yaml"), smoke=False)
    for end in (0, -1):
        params = {
            key: domain.texts[end] if isinstance(domain, Choices) else (domain.low, domain.high)[end]
            for key, domain in search.settings.space.items()
        }
        cell = search.cells([params])[-1]
        path = tmp_path / "fit.yaml"
        path.write_text(yaml.safe_dump(located(cell, False), sort_keys=False))
        assert cli.main(["fit", "--config", str(path), "--print_config"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["trainer"]["default_root_dir"] == str(cell.folder)


def test_there_is_a_shipped_sweep():
    assert SWEEPS
