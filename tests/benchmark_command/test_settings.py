import copy

import pytest
import yaml

from cvae_lightning.benchmark.settings import find_benchmark, load_settings

GOOD = {
    "results": "out",
    "seeds": [3, 1],
    "jobs": 2,
    "threads": 1,
    "tasks": {
        "one": {"entangled": "entangled_one", "options": {"data.val_size": 8}},
        "two": "entangled_two",
        "three": {"entangled": {"folder": "models/three"}},
    },
    "recipes": {
        "ours": {"configs": ["discrete_{task}"], "options": {"model.num_latents": 8}, "group": "K = 8"},
        "skewed": {
            "configs": ["discrete_{task}"],
            "tasks": ["one"],
            "seeds": [7],
            "entangled": {"options": {"data.frequencies": [0.5, 0.5]}},
        },
    },
    "test_options": {"callbacks.StrategyEvaluation.num_examples": 256},
    "columns": {"purity": "alignment_purity", "router": "router_ce / true_ce"},
}


def load(tmp_path, change=lambda content: None):
    content = copy.deepcopy(GOOD)
    change(content)
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_settings(path)


def test_reads_what_is_given_and_fills_in_the_rest(tmp_path):
    settings = load(tmp_path)
    assert settings.seeds == (3, 1)
    assert settings.tasks["two"].entangled.configs == ("entangled_two",)
    assert settings.tasks["three"].entangled.folder == "models/three"
    assert settings.recipes["ours"].group == "K = 8"
    assert settings.recipes["ours"].seeds is None
    assert settings.recipes["skewed"].entangled.options == {"data.frequencies": [0.5, 0.5]}
    bare = load(tmp_path, lambda c: [c.pop(key) for key in ("seeds", "jobs", "threads", "test_options", "columns")])
    assert (bare.seeds, bare.jobs, bare.threads, bare.test_options, bare.columns) == ((1, 2, 3), 1, 1, {}, {})


def put(*path):
    *parts, value = path

    def change(content):
        for part in parts[:-1]:
            content = content[part]
        content[parts[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("recipe", {}), "unknown key recipe; did you mean 'recipes'"),
        (put("recipes", "ours", "option", {}), "unknown key recipes.ours.option; did you mean 'options'"),
        (put("tasks", "one", "recipe", 1), "unknown key tasks.one.recipe; expected some of entangled, options"),
        (put("recipes", {}), "recipes is missing or empty"),
        (put("recipes", "ours", "configs", []), "recipes.ours.configs is missing or empty"),
        (put("recipes", "ours", "configs", [{}]), r"recipes.ours.configs: expected a text, got \{\}"),
        (put("tasks", "one", {"options": {}}), "tasks.one.entangled is missing"),
        (put("tasks", "one", "entangled", {"folder": "a", "configs": ["b"]}), "tasks.one.entangled: expected either"),
        (put("tasks", ["one"]), r"tasks: expected a mapping, got \['one'\]"),
        (put("seeds", [1, 1]), "seeds: expected a list of different integers"),
        (put("seeds", "1"), "seeds: expected a list of different integers"),
        (put("recipes", "ours", "seeds", []), "recipes.ours.seeds: expected a list of different integers"),
        (put("jobs", 0), "jobs: expected an integer of at least 1, got 0"),
        (put("threads", True), "threads: expected an integer of at least 1, got True"),
        (put("recipes", "ours", "tasks", ["four"]), "recipes.ours.tasks: 'four' is none of the tasks one, two, three"),
        (put("recipes", "a/b", {"configs": ["x"]}), "recipes: a name becomes a folder.*got 'a/b'"),
        (put("recipes", "entangled", {"configs": ["x"]}), "recipes.entangled: names that begin with 'entangled'"),
        (put("columns", "purity", "a / b / c"), "columns.purity: expected KEY or 'KEY / KEY'"),
        (put("results", 3), "results: expected a text, got 3"),
    ],
)
def test_refuses_what_is_wrong_and_names_file_and_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"bench\.yaml: {message}"):
        load(tmp_path, change)


def test_finds_files_and_shipped_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_benchmark("alignment") == find_benchmark("benchmark/alignment.yaml")
    assert find_benchmark("alignment").name == "alignment.yaml"
    (tmp_path / "alignment").write_text("mine: 1")
    assert find_benchmark("alignment").read_text() == "mine: 1"
    with pytest.raises(FileNotFoundError, match="no config file and no shipped recipe is named 'nothing'"):
        find_benchmark("nothing")
    with pytest.raises(FileNotFoundError):
        find_benchmark("../configs/quickstart_discrete")
