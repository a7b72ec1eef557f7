"""Every algorithm is on the ladder, and what the tables of its page say of settings and metrics is what the code has."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import surefoot as sf
from surefoot.algorithms import ALGORITHMS
from surefoot.policies import ActorCriticSettings

PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
LANGUAGES = ["", ".zh-CN"]
FORMULAS, LEFT_OUT, DEFAULTS, AUDIT, TRAINING, REFERENCES = range(1, 7)  # sections of an algorithm's page
LADDER, SHARED, SHARED_DEFAULTS, SHARED_AUDIT = range(1, 5)  # and of the index
WITH_PAGE = [name for name in ALGORITHMS if (PAGES / f"{name}.md").exists()]


def table(page, section):
    """The rows of a section's table, below its head, without the backticks of their cells."""
    lines = [line for line in (PAGES / page).read_text().split("\n## ")[section].splitlines() if line.startswith("|")]
    return [[cell.strip().replace(r"\|", "|").replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def defaults(page, section):
    return {setting: ast.literal_eval(here) for setting, here, *_ in table(page, section)}


def fields(config):
    return {field.name: field.default for field in dataclasses.fields(config)}


def own(config):
    """The settings that an algorithm does not have in common with the others, and those that begin elsewhere."""
    return dict(fields(config).items() - fields(ActorCriticSettings).items())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_ladder_is_the_registry(language):
    assert [row[0].partition("]")[0].lstrip("[") for row in table(f"README{language}.md", LADDER)] == list(ALGORITHMS)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", WITH_PAGE)
def test_the_defaults_on_a_page_are_those_of_the_configuration(name, language):
    assert defaults(f"{name}{language}.md", DEFAULTS) == own(ALGORITHMS[name].config)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_shared_defaults_are_those_of_the_configuration(language):
    assert defaults(f"README{language}.md", SHARED_DEFAULTS) == fields(ActorCriticSettings)


@pytest.mark.parametrize("name", ["README", *WITH_PAGE])
def test_a_chinese_table_has_the_numbers_of_the_english_one(name):
    def numbers(language):
        rows = re.findall(r"^\|.*", (PAGES / f"{name}{language}.md").read_text(), re.MULTILINE)
        return [sorted(re.findall(r"\d[\d.,e-]*(?<![.,])", row)) for row in rows]

    assert numbers("") == numbers(".zh-CN")


@pytest.mark.parametrize("name", WITH_PAGE)
def test_an_iteration_reports_the_metrics_on_the_page(name, tmp_path):
    config = ALGORITHMS[name].config
    rows = table(f"{name}.md", AUDIT) + (table("README.md", SHARED_AUDIT) if issubclass(config, ActorCriticSettings) else [])
    explained = {metric for names, *_ in rows for metric in re.findall(r"\w+", names)}
    report = next(iter(sf.iterate(config(), "CartPole-v1", steps=1, out=tmp_path / "run")))
    assert explained <= report.metrics.keys()
