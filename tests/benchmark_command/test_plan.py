"""From the settings to cells, and from a cell to the config that it runs."""

import os
from dataclasses import replace

import pytest
import yaml

from cvae_lightning import cli
from cvae_lightning.benchmark.plan import digest, located, plan, select
from cvae_lightning.benchmark.settings import RecipeSettings, Settings, Source, TaskSettings, load_settings
from cvae_lightning.recipes import recipe_folder

OURS = RecipeSettings(Source(("discrete_{task}",)))
SETTINGS = Settings(
    results="out",
    tasks={
        "sorting_algorithms": TaskSettings(Source(("entangled_sorting_algorithms",)), {}),
        "base_conversion": TaskSettings(Source(("entangled_base_conversion",)), {"data.val_size": 7}),
    },
    recipes={"ours": OURS},
    seeds=(1, 2),
    test_options={"callbacks.*Evaluation.num_examples": 5},
)
BENCHMARKS = [
    p.stem for p in sorted(recipe_folder().glob("benchmark/*.yaml")) if "recipes" in yaml.safe_load(p.read_text())
]


def with_recipes(**recipes):
    return plan(replace(SETTINGS, recipes=recipes))


def only(source, **arguments):
    return RecipeSettings(source, **arguments)


def test_entangled_models_come_first_and_then_one_seed_after_the_other():
    cells = plan(SETTINGS)
    assert [cell.name for cell in cells] == [
        "sorting_algorithms/entangled",
        "base_conversion/entangled",
        "sorting_algorithms/ours/seed1",
        "base_conversion/ours/seed1",
        "sorting_algorithms/ours/seed2",
        "base_conversion/ours/seed2",
    ]
    assert [cell.entangled for cell in cells] == [None, None, *cells[:2], *cells[:2]]
    assert cells[3].config["data"]["init_args"]["val_size"] == 7
    assert cells[2].config["data"]["init_args"]["val_size"] == 512
    assert cells[1].config["data"]["init_args"]["val_size"] == 512


def test_a_recipe_may_have_its_own_tasks_seeds_and_entangled_model():
    skew = Source(options={"data.frequencies": [4, 2, 1, 1]})
    cells = with_recipes(
        ours=OURS,
        skewed=only(OURS.source, tasks=("sorting_algorithms",), seeds=(9,), entangled=skew, group="skewed"),
        more=only(Source(OURS.source.configs, {"model.num_latents": 8}), tasks=("sorting_algorithms",), entangled=skew),
    )
    by_name = {cell.name: cell for cell in cells}
    assert [name for name in by_name if "entangled" in name] == [
        "sorting_algorithms/entangled",
        "base_conversion/entangled",
        "sorting_algorithms/entangled_skewed",
    ]
    assert [name for name in by_name if "/skewed/" in name] == ["sorting_algorithms/skewed/seed9"]
    skewed = by_name["sorting_algorithms/entangled_skewed"]
    assert skewed.config["data"]["init_args"]["frequencies"] == [4, 2, 1, 1]
    assert by_name["sorting_algorithms/more/seed2"].entangled is skewed  # trained once for both recipes
    assert by_name["sorting_algorithms/skewed/seed9"].entangled is skewed


def test_the_hash_covers_all_that_the_numbers_follow_from_and_no_folder():
    def hashes(settings):
        return {cell.name: (cell.fit_hash, cell.hash) for cell in plan(settings)}

    before = hashes(SETTINGS)
    assert len({fit for fit, _ in before.values()}) == 6
    assert hashes(replace(SETTINGS, results="elsewhere", jobs=7)) == before
    option = only(Source(OURS.source.configs, {"model.num_latents": 5}))
    changed = hashes(replace(SETTINGS, recipes={"ours": option}))
    assert {name for name in before if changed[name] != before[name]} == {name for name in before if "ours" in name}
    longer = TaskSettings(Source(("entangled_base_conversion",), {"trainer.max_steps": 8000}), {"data.val_size": 7})
    changed = hashes(replace(SETTINGS, tasks={**SETTINGS.tasks, "base_conversion": longer}))
    assert {name for name in before if changed[name] != before[name]} == {n for n in before if n.startswith("base")}
    tests = hashes(replace(SETTINGS, test_options={}))
    assert all(tests[name][0] == before[name][0] and tests[name][1] != before[name][1] for name in before)


def test_an_existing_entangled_model_is_used_as_it_is(tmp_path):
    (tmp_path / "baseline.json").write_text('{"c_base": 1}')
    tasks = {"sorting_algorithms": TaskSettings(Source(folder=str(tmp_path)), {})}
    cells = plan(replace(SETTINGS, tasks=tasks))
    assert [cell.name for cell in cells] == ["sorting_algorithms/ours/seed1", "sorting_algorithms/ours/seed2"]
    assert located(cells[0], test=False)["model"]["init_args"]["entangled"] == str(tmp_path)
    (tmp_path / "baseline.json").write_text('{"c_base": 2}')
    assert plan(replace(SETTINGS, tasks=tasks))[0].hash != cells[0].hash
    (tmp_path / "baseline.json").unlink()
    with pytest.raises(ValueError, match=r"recipe ours on sorting_algorithms: entangled.folder: .* holds no entangled"):
        plan(replace(SETTINGS, tasks=tasks))


def test_all_files_of_a_cell_lie_in_its_folder():
    cells = plan(SETTINGS)
    config, test = located(cells[2], test=False), located(cells[2], test=True)
    folder = "out/sorting_algorithms/ours/seed1"
    assert config["trainer"]["default_root_dir"] == folder
    assert config["checkpoint"]["dirpath"] == f"{folder}/checkpoints"
    assert config["model"]["init_args"]["entangled"] == "out/sorting_algorithms/entangled/model"
    assert config["seed_everything"] == 1
    assert "entangled_config" not in config
    *_, report, step = config["trainer"]["callbacks"]
    assert report["init_args"]["path"] == f"{folder}/summary.json"
    assert step["init_args"]["path"] == f"{folder}/step"
    recipe = yaml.safe_load((recipe_folder() / "discrete_sorting_algorithms.yaml").read_text())
    assert config["trainer"]["callbacks"][0] == recipe["trainer"]["callbacks"][0]
    assert test["trainer"]["callbacks"][0]["init_args"]["num_examples"] == 5
    model = located(cells[0], test=False)
    assert model["model"]["init_args"]["output_dir"] == "out/sorting_algorithms/entangled/model"
    assert not [text for text in yaml.safe_dump(model).split() if text.startswith("runs/")]
    assert not [text for text in yaml.safe_dump(config).split() if text.startswith("runs/")]


def test_patterns_choose_cells_and_what_they_need():
    cells = plan(SETTINGS)
    assert [cell.name for cell in select(cells, ["base*/ours/seed2"])] == [
        "base_conversion/entangled",
        "base_conversion/ours/seed2",
    ]
    assert len(select(cells, ["seed1"])) == 4
    assert len(select(cells, ["sorting_algorithms", "base_conversion"])) == 6
    assert select(cells, []) == cells
    with pytest.raises(
        ValueError, match="--only seed3: names no cell; tasks: sorting_algorithms, base_conversion; rec"
    ):
        select(cells, ["seed3"])


def test_hashes_follow_the_content_of_data_files(tmp_path):
    options = {f"data.{split}_path": str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}

    def hashes():
        task = TaskSettings(Source(("entangled_pairs",), options), options)
        recipe = RecipeSettings(Source(("discrete_pairs",)))
        cells = plan(replace(SETTINGS, tasks={"mine": task}, recipes={"r": recipe}, seeds=(1,), test_options={}))
        return [cell.fit_hash for cell in cells], [cell.hash for cell in cells]

    found = []
    for train, test in (("1", "1"), ("2", "1"), ("2", "2"), ("1", "1")):
        (tmp_path / "train.jsonl").write_text(train)
        (tmp_path / "test.jsonl").write_text(test)
        for path in tmp_path.iterdir():
            os.utime(path, ns=(len(found) * 10**9, len(found) * 10**9))
        found.append(hashes())
    first, other_training, other_test, again = found
    assert first == again
    assert all(a != b for kinds in zip(first, other_training, strict=True) for a, b in zip(*kinds, strict=True))
    assert other_test[0] == other_training[0]
    assert all(a != b for a, b in zip(other_test[1], other_training[1], strict=True))


def test_hashes_of_tasks_that_make_their_own_records_are_those_of_finished_results():
    first, second = plan(SETTINGS)[0], plan(SETTINGS)[2]
    for cell in (first, second):
        start = "" if cell.entangled is None else cell.entangled.fit_hash
        assert cell.fit_hash == digest([cell.config, cell.seed, start])
        assert cell.hash == digest([cell.fit_hash, cell.test_config])


def test_a_training_may_be_limited_by_epochs_alone():
    cells = with_recipes(long=only(Source(OURS.source.configs, {"trainer.max_steps": -1, "trainer.max_epochs": 3})))
    assert {cell.max_steps for cell in cells if cell.seed} == {None}


def test_a_model_that_would_be_tested_before_its_last_step_is_refused():
    short = only(Source(OURS.source.configs, {"trainer.max_steps": 250}))
    with pytest.raises(ValueError, match=r"recipe short on .*max_steps 250 is no multiple of checkpoint.every_n"):
        with_recipes(short=short)
    with pytest.raises(
        ValueError, match=r"recipe wrong on sorting_algorithms: .*no shipped recipe is named 'discrete'"
    ):
        with_recipes(wrong=only(Source(("discrete",))))


def test_smoke_is_the_same_path_in_a_folder_of_its_own():
    one = only(Source(("continuous_{task}",)), tasks=("base_conversion",))
    cells = plan(replace(SETTINGS, recipes={"ours": OURS, "one": one}), smoke=True)
    assert {str(cell.root) for cell in cells} == {"out-smoke"}
    assert [cell.name for cell in cells if cell.seed] == [
        "sorting_algorithms/ours/seed1",
        "base_conversion/ours/seed1",
        "base_conversion/one/seed1",
    ]
    assert {cell.max_steps for cell in cells} == {8, 30}
    for cell in cells:
        assert cell.config["data"]["init_args"]["test_size"] < 100
        evaluation = next(c for c in cell.config["trainer"]["callbacks"] if c["class_path"].endswith("Evaluation"))
        assert evaluation["init_args"]["num_examples"] < 10


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_cell_of_the_shipped_benchmarks_parses(name, tmp_path, capsys):
    settings = load_settings(recipe_folder() / f"benchmark/{name}.yaml")
    seen = set()
    for cell in plan(settings):
        if (cell.task, cell.recipe) in seen:
            continue
        seen.add((cell.task, cell.recipe))
        for command in ("fit", "test"):
            path = tmp_path / f"{command}.yaml"
            path.write_text(yaml.safe_dump(located(cell, command == "test"), sort_keys=False))
            capsys.readouterr()
            assert cli.main([command, "--config", str(path), "--print_config"]) == 0, cell.name
            printed = yaml.safe_load(capsys.readouterr().out)
            assert printed["trainer"]["max_steps"] == cell.max_steps
            assert printed["trainer"]["default_root_dir"] == str(cell.folder)


def test_there_are_the_two_shipped_benchmarks():
    assert {"alignment", "published"} <= {*BENCHMARKS}
    alignment = plan(load_settings(recipe_folder() / "benchmark/alignment.yaml"))
    assert len({cell.task for cell in alignment}) == 6
    assert sum(cell.seed is not None for cell in alignment) == 18
