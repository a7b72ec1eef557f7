"""Every algorithm is on the ladder, and what the tables of its page say of settings and metrics is what the code has."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import surefoot as sf
from surefoot.algorithms import ALGORITHMS
from surefoot.envs import is_device, make
from surefoot.policies import ActorCriticSettings
from surefoot.training.engine import DeviceEngine
from surefoot.training.episodes import Ended, Recent

PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
LANGUAGES = ["", ".zh-CN"]
FORMULAS, LEFT_OUT, DEFAULTS, METRICS, TRAINING, REFERENCES = range(1, 7)  # sections of an algorithm's page
LADDER, SHARED, SHARED_DEFAULTS, SHARED_AUDIT = range(1, 5)  # and of the index
OF_EVERY_RUN = {"iteration", "step", *Recent().take(Ended(*5 * [np.zeros((1, 1), bool)]))}
AUDITED = {"": "What the step audit tells", ".zh-CN": "步进审计说明什么"}  # the title of METRICS, where there is an audit
UNAUDITED = {"": "What a run reports", ".zh-CN": "训练会报告什么"}  # and where there is none


def table(page, section):
    """The rows of a section's table, below its head, without the backticks of their cells."""
    lines = [line for line in (PAGES / page).read_text().split("\n## ")[section].splitlines() if line.startswith("|")]
    return [[cell.strip().replace(r"\|", "|").replace("`", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def defaults(page, section):
    return {setting: math.inf if here == "inf" else ast.literal_eval(here) for setting, here, *_ in table(page, section)}


def fields(config):
    return {field.name: field.default for field in dataclasses.fields(config)}


def learns_from_replay(config):
    return "replay_size" in fields(config)


def own(config):
    """Of a method with replay all settings, of another those that it does not have in common with the index, or that begin elsewhere."""
    return fields(config) if learns_from_replay(config) else dict(fields(config).items() - fields(ActorCriticSettings).items())


def explained(page, section):
    return [metric for names, *_ in table(page, section) for metric in re.findall(r"\w+", names)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_ladder_is_the_registry(language):
    assert [row[0].partition("]")[0].lstrip("[") for row in table(f"README{language}.md", LADDER)] == list(ALGORITHMS)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_defaults_on_a_page_are_those_of_the_configuration(name, language):
    assert defaults(f"{name}{language}.md", DEFAULTS) == own(ALGORITHMS[name].config)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_shared_defaults_are_those_of_the_configuration(language):
    assert defaults(f"README{language}.md", SHARED_DEFAULTS) == fields(ActorCriticSettings)


@pytest.mark.parametrize("name", ["README", *ALGORITHMS])
def test_a_chinese_table_has_the_numbers_of_the_english_one(name):
    def numbers(language):
        rows = re.findall(r"^\|.*", (PAGES / f"{name}{language}.md").read_text(), re.MULTILINE)
        return [sorted(re.findall(r"\d[\d.,e-]*(?<![.,])", row)) for row in rows]

    assert numbers("") == numbers(".zh-CN")


def reported(config, name, path):
    """Names of the metrics; where all is one program, of its trace, without compiling it."""
    environment, spec = make(name, 8)
    if not is_device(environment):
        return next(iter(sf.iterate(config, name, steps=1, out=path))).metrics.keys()
    engine = DeviceEngine(config, environment, spec, seed=0, total_steps=1)
    state = engine.learner, engine.stream, engine.running, (engine.acting_key, engine.updating_key), np.int32(0), np.float32(0.0)
    return {*OF_EVERY_RUN, *jax.eval_shape(engine._whole_iteration, *state)[3].metrics}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_iteration_reports_the_metrics_on_the_page(name, tmp_path):
    config = ALGORITHMS[name].config
    environment = {"ddpg": "Pendulum-v1", "td3": "Pendulum-v1", "q-learning": "FrozenLake-v1"}.get(name, "CartPole-v1")
    metrics = reported(config(), environment, tmp_path / "run")
    shared = explained("README.md", SHARED_AUDIT) if issubclass(config, ActorCriticSettings) else []
    assert {*explained(f"{name}.md", METRICS), *shared} <= metrics
    of_its_own = learns_from_replay(config) or name == "q-learning"  # nothing that the index explains
    unaudited = of_its_own and name != "off-policy-actor-critic"
    title = UNAUDITED if unaudited else AUDITED
    assert {"kl", "search_kl"}.isdisjoint(metrics) == unaudited
    for language in LANGUAGES:
        assert (PAGES / f"{name}{language}.md").read_text().split("\n## ")[METRICS].startswith(title[language] + "\n")
    if of_its_own:  # whose pages explain all that the algorithm itself reports
        own_metrics = {metric for metric in metrics if not metric.startswith("time/")} - OF_EVERY_RUN
        assert sorted(explained(f"{name}.md", METRICS)) == sorted(own_metrics)
