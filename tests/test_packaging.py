"""What a user gets: the wheel, its recipes without the clone, and quick commands."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from cvae_lightning import cli, recipes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, unpacked."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    path = next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_holds_package_recipes_licence_and_nothing_else(wheel):
    shipped = {path.name for path in (wheel / "cvae_lightning/configs").glob("*.yaml")}
    assert shipped == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    benchmarks = {path.name for path in (wheel / "cvae_lightning/configs/benchmark").glob("*.yaml")}
    assert benchmarks == {path.name for path in (ROOT / "configs/benchmark").glob("*.yaml")}
    assert {path.name.split("-")[0] for path in wheel.iterdir()} == {"cvae_lightning"}
    modules = {path.relative_to(wheel) for path in wheel.rglob("*.py")}
    assert modules == {path.relative_to(ROOT) for path in (ROOT / "cvae_lightning").rglob("*.py")}
    metadata = next(wheel.glob("*.dist-info"))
    assert "cvae-lightning = cvae_lightning.cli:main" in (metadata / "entry_points.txt").read_text()
    assert "Version 2.0, January 2004" in (metadata / "licenses/LICENSE").read_text()


def test_wheel_lists_recipes_without_the_clone_and_quickly(wheel, tmp_path):
    code = (
        "import sys; from cvae_lightning import cli; cli.main(['recipes']); print(cli.__file__, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert last == f"{wheel / 'cvae_lightning/cli.py'} False"


def test_every_recipe_begins_with_what_it_is_for(capsys):
    for name in recipes.recipe_names():
        path = recipes.find_recipe(name)
        assert len(recipes.describe(path)) > 20, f"{name}: the first line must be a comment that says what it is for"
        assert {"model", "data", "trainer"} <= yaml.safe_load(path.read_text()).keys()
        assert cli.main(["recipes", name]) == 0
        assert capsys.readouterr().out == path.read_text()


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_parses(name, capsys):
    assert cli.main(["fit", "--config", name, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["default_root_dir"].startswith("runs/")
    if printed["entangled_config"] is not None:
        entangled = yaml.safe_load(recipes.find_recipe(printed["entangled_config"]).read_text())
        assert entangled["model"]["init_args"]["output_dir"] == printed["model"]["init_args"]["entangled"]
        assert entangled["data"]["class_path"] == printed["data"]["class_path"]


def test_recipes_lists_names_and_first_comments(tmp_path, monkeypatch, capsys):
    (tmp_path / "b_long_name.yaml").write_text("# Trains b.\nmodel: {}\n")
    (tmp_path / "a.yaml").write_text("model: {}\n# Trains a.\n")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: tmp_path)
    monkeypatch.setattr(cli, "recipe_folder", lambda: tmp_path)
    assert cli.main(["recipes"]) == 0
    assert capsys.readouterr().out == "a            Trains a.\nb_long_name  Trains b.\n"
    assert cli.main(["recipes", "b_long_nam"]) == 1
    assert "did you mean b_long_name?" in capsys.readouterr().err


def test_commands_without_training_need_no_torch():
    code = (
        "import sys; from cvae_lightning.cli import main; main(['--help']); main(['quickstart', '--help']); "
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fit " in done.stdout


def test_constraints_pin_what_the_project_needs_and_satisfy_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    pins = {name.lower(): version for name, version in (line.split("==") for line in lines)}
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["test"]]
    for requirement in wanted:
        if requirement.name.lower() in pins:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), str(requirement)
    assert {"torch", "lightning", "transformers", "jsonargparse", "torchmetrics", "pytest"} <= pins.keys()


def test_ci_runs_the_documented_test_command():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    assert "\ntest:" in (ROOT / "Makefile").read_text()
