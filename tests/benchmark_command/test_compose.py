"""One config from many: by the rules of the command line, which is the oracle here."""

import sys

import pytest
import yaml

from cvae_lightning import cli
from cvae_lightning.benchmark.compose import compose, differences
from cvae_lightning.config_merge import read_config
from cvae_lightning.recipes import find_recipe

CALLBACKS = {
    "trainer": {
        "callbacks": [
            {"class_path": "cvae_lightning.callbacks.StrategyEvaluation", "init_args": {"num_examples": 64}},
            {"class_path": "cvae_lightning.callbacks.Report"},
        ]
    }
}

DERIVED = """
from cvae_lightning.data import SyntheticDataModule
class Derived(SyntheticDataModule):
    def __init__(self, extra: int = 1, **kwargs):
        super().__init__(**kwargs)
"""


def printed(capsys, *words):
    capsys.readouterr()
    assert cli.main(["fit", *words, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["discrete_sorting_algorithms"], {"model.posterior_temperature": 0.5}, ["--model.posterior_temperature=0.5"]),
        (
            ["discrete_sorting_algorithms", "benchmark/plain_elbo", "benchmark/inter_latent_jsd"],
            {"model.init_args.losses.kl_prior_loss.init_args.weight": 0.01, "trainer.max_steps": 7},
            ["--model.init_args.losses.kl_prior_loss.init_args.weight=0.01", "--trainer.max_steps=7"],
        ),
        (
            ["continuous_sorting_algorithms", "benchmark/continuous_plain", "benchmark/continuous_terms"],
            {"model.losses.posterior_variance_loss": None, "data.init_args.val_size": 9},
            ["--model.losses.posterior_variance_loss", "null", "--data.init_args.val_size=9"],
        ),
    ],
)
def test_is_what_the_command_line_makes_of_the_same_files_and_options(names, options, words, tmp_path, capsys):
    made = compose([read_config(find_recipe(name)) for name in names], options)
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    expected = printed(capsys, *[word for name in names for word in ("--config", name)], *words)
    found = printed(capsys, "--config", str(tmp_path / "made.yaml"))
    losses = {name: loss for name, loss in expected["model"]["init_args"].pop("losses").items() if loss}
    assert {name: loss for name, loss in found["model"]["init_args"].pop("losses").items() if loss} == losses
    assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"class_path": "cvae_lightning.data.PairsDataModule", "init_args": {"train_path": "a.jsonl"}}},
        {"data": {"class_path": "compose_parts.Derived", "init_args": {"val_size": 3}}},
        {"model": {"class_path": "cvae_lightning.ContinuousCVAE", "init_args": {"latent_dim": 3}}},
    ],
)
def test_another_class_keeps_the_arguments_that_it_has_too(change, tmp_path, capsys, monkeypatch):
    (tmp_path / "compose_parts.py").write_text(DERIVED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "compose_parts", raising=False)
    (tmp_path / "change.yaml").write_text(yaml.safe_dump(change))
    names = [find_recipe("discrete_sorting_algorithms"), tmp_path / "change.yaml"]
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(compose([read_config(path) for path in names], {})))
    expected = printed(capsys, *[word for path in names for word in ("--config", str(path))])
    assert printed(capsys, "--config", str(tmp_path / "made.yaml")) == expected


def test_plain_lists_and_dicts_are_replaced_and_plus_appends():
    base = {
        "trainer": {"callbacks": ["a"], "devices": 2},
        "model": {"class_path": "M", "init_args": {"config": {"a": 1}}},
    }
    more = {"trainer": {"callbacks+": ["b"]}, "model": {"init_args": {"config": {"b": 2}, "more": 1}}}
    assert compose([base, more], {}) == {
        "trainer": {"callbacks": ["a", "b"], "devices": 2},
        "model": {"class_path": "M", "init_args": {"config": {"b": 2}, "more": 1}},
    }
    assert compose([base, {"trainer": {"callbacks": []}}], {})["trainer"]["callbacks"] == []
    assert base["trainer"]["callbacks"] == ["a"]


def test_another_class_of_a_part_starts_afresh_and_the_same_class_keeps_what_it_had():
    task = {"class_path": "tasks.Sorting", "init_args": {"digits": 5}}
    base = {"data": {"class_path": "D", "init_args": {"task": task, "batch_size": 4}}}
    other = compose([base, {"data": {"init_args": {"task": {"class_path": "tasks.Addition"}}}}], {})
    assert other["data"]["init_args"] == {"task": {"class_path": "tasks.Addition"}, "batch_size": 4}
    same = compose([base, {"data": {"init_args": {"task": {"init_args": {"low": 1}}}}}], {"data.task.digits": 6})
    assert same["data"]["init_args"]["task"]["init_args"] == {"digits": 6, "low": 1}


def test_options_reach_callbacks_by_the_name_of_their_class():
    made = compose([CALLBACKS], {"callbacks.*Evaluation.num_examples": 8, "callbacks.Report.width": 3})
    assert [callback["init_args"] for callback in made["trainer"]["callbacks"]] == [{"num_examples": 8}, {"width": 3}]
    assert CALLBACKS["trainer"]["callbacks"][0]["init_args"] == {"num_examples": 64}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "callbacks.Evaluation.num_examples",
            "no callback is named 'Evaluation'; trainer.callbacks has Strat.*, Report",
        ),
        ("callbacks.Report", r"expected callbacks\.CLASS\.ARGUMENT"),
        ("trainer.max_steps.more", "trainer.max_steps is 5, which has no more"),
    ],
)
def test_options_that_lead_nowhere_are_refused(option, message):
    with pytest.raises(ValueError, match=f"option {option}: {message}"):
        compose([CALLBACKS, {"trainer": {"max_steps": 5}}], {option: 1})


def test_differences_name_every_option_that_changed():
    before, after = {"a": {"b": [1], "c": None}, "d": 1}, {"a": {"b": [1, 2], "c": None}, "e": {"f": 1}}
    assert differences(before, before) == []
    assert differences(before, after) == [
        "a.b: [1] then, [1, 2] now",
        "d: 1 then, absent now",
        "e: absent then, {'f': 1} now",
    ]
