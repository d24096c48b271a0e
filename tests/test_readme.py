"""What the README says of the package, held against the package."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from cvae_lightning import losses

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_every_loss_has_a_row_and_every_cell_of_it_says_something():
    section = (ROOT / "README.md").read_text().split("## The losses")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert {re.findall(r"`(\w+)`", row[0])[0] for row in rows} == {*losses.__all__} - {"LossCallback"}
    assert all(len(row) == 5 and all(cell.strip() for cell in row) for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_code_parses(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for code in blocks(text, "python"):
        ast.parse(code)
    for config in blocks(text, "yaml"):
        assert isinstance(yaml.safe_load(config), dict)


def test_the_recipes_and_benchmarks_that_it_names_are_shipped():
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"--config (\w+)", text)) - {"my"}
    shipped = {path.stem for path in (ROOT / "configs").rglob("*.yaml")}
    assert named
    assert named <= shipped


def test_citations_carry_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
