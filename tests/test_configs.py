"""Every shipped recipe parses and fits a few steps, on a model of a few thousand parameters."""

import json
import random

import pytest
import torch
import yaml
from tiny import CONFIGS

from cvae_lightning import cli
from cvae_lightning.backbones.artifact import Baseline, save_artifact
from cvae_lightning.backbones.causal_lm import build_causal_lm
from cvae_lightning.backbones.tokenizer import build_tokenizer
from cvae_lightning.recipes import find_recipe, recipe_names
from cvae_lightning.template import PromptTemplate

RECIPES = recipe_names()
SHORT = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 2,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.log_every_n_steps": 1,
    "data.init_args.batch_size": 4,
    "data.init_args.eval_batch_size": 4,
}
SYNTHETIC = {"data.init_args.train_size": 16, "data.init_args.val_size": 4, "data.init_args.test_size": 4}
ENTANGLED = {
    "model.init_args.config.hidden_size": 16,
    "model.init_args.config.intermediate_size": 32,
    "model.init_args.config.num_hidden_layers": 1,
    "model.init_args.config.num_attention_heads": 2,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*fingerprint.*", "ignore::cvae_lightning.callbacks.CollapseWarning")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An untrained entangled model that reads printable ASCII."""
    folder = tmp_path_factory.mktemp("artifact")
    template = PromptTemplate(build_tokenizer([chr(i) for i in range(10, 127)], "char"))
    torch.manual_seed(0)
    lm = build_causal_lm(CONFIGS["llama"] | {"max_position_embeddings": 1024}, len(template), template.pad_id)
    save_artifact(folder, lm, template.tokenizer, Baseline(3.0, 10, "-", template.fingerprint()))
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A JSONL file of pairs."""
    path = tmp_path_factory.mktemp("pairs") / "train.jsonl"
    rng = random.Random(0)
    rows = [{"x": f"sort {rng.sample(range(99), 4)}", "y": f"first {i}, then {i * i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(options):
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    return [word for name, text in texts.items() for word in (f"--{name}", text)]


def test_there_is_a_recipe_for_every_task():
    tasks = "sorting_algorithms grid_pathfinding multidigit_addition linear_equations base_conversion"
    for task in (*tasks.split(), "integer_multiplication", "pairs"):
        assert {f"entangled_{task}", f"discrete_{task}"} <= {*RECIPES}
    assert {"quickstart_entangled", "quickstart_discrete", "quickstart_plain_elbo"} <= {*RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_a_few_steps(name, tmp_path, monkeypatch, artifact, pairs):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(find_recipe(name).read_text())
    arguments = recipe["model"]["init_args"]
    options = dict(SHORT)
    if recipe["data"]["class_path"].endswith("SyntheticDataModule"):
        options |= SYNTHETIC
    else:
        options["data.init_args.train_path"] = pairs
    if "seeding" in arguments:
        few = {"num_inputs": 4, "num_solutions": 4, "posterior_steps": 2}
        options |= {f"model.init_args.seeding.init_args.{key}": value for key, value in few.items()}
    if "entangled" in arguments:
        options["model.init_args.entangled"] = artifact
        for i, callback in enumerate(recipe["trainer"]["callbacks"]):
            if callback["class_path"].endswith("StrategyEvaluation"):
                recipe["trainer"]["callbacks"][i]["init_args"] |= {"num_examples": 2, "max_new_tokens": 4}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": recipe["trainer"]["callbacks"]}}))
    else:
        options |= ENTANGLED
        (tmp_path / "small.yaml").write_text("{}")
    assert cli.main(["fit", "--config", name, "--config", "small.yaml", *words(options)]) == 0
    saved = torch.load(tmp_path / recipe["checkpoint"]["dirpath"] / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    root = tmp_path / recipe["trainer"]["default_root_dir"]
    assert list(root.glob("events.*"))
    if "output_dir" in arguments:
        baseline = json.loads((tmp_path / arguments["output_dir"] / "baseline.json").read_text())
        assert baseline["c_base"] > 0
        assert not arguments.get("entangled")
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert written == {"runs", "small.yaml"}
