"""The Python door: train, iterate, resume, load, Run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from support import BATCH, SMALL, Walk, WideWalk, bits, metrics, steps_saved

import surefoot as sf
from surefoot.training.checkpoint import CheckpointError
from surefoot.training.presets import PRESETS

STEPS = 3 * BATCH


def train(env: Any, out: Path, **options: Any) -> sf.Run:
    return sf.train(SMALL, env, out=out, **{"steps": STEPS, "preset": False, "progress": False} | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    """A complete run on an environment in JAX."""
    return train("CartPole-v1", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole_on_host(tmp_path_factory: pytest.TempPathFactory) -> sf.Run:
    """A complete run on an environment stepped from Python."""
    return train("support:Walk", tmp_path_factory.mktemp("whole_on_host"))


def test_a_run_says_where_it_is_and_its_policy_acts(whole: sf.Run) -> None:
    assert repr(whole) == f"Run({str(whole.path)!r})"
    for policy in (whole.policy, sf.load(whole.path), sf.load(str(whole.path / "policy.safetensors"))):
        assert policy.act(np.zeros(4)) in (0, 1)
        assert policy.act(np.zeros((5, 4), np.float32)).shape == (5,)
        assert policy.observation_space.shape == (4,)
        assert policy.action_space == gymnasium.spaces.Discrete(2)
    obs = np.random.default_rng(0).normal(size=(100, 4))
    first, second = (sf.load(whole.path).act(obs, deterministic=False) for _ in range(2))
    assert first.tolist() == second.tolist()
    assert 0 < first.sum() < 100


@pytest.mark.parametrize("obs", [np.zeros(3), np.zeros((2, 3)), np.zeros((1, 2, 4)), "left", {"eye": np.zeros(4)}, None], ids=repr)
def test_a_policy_refuses_what_is_no_observation(obs: Any, whole: sf.Run) -> None:
    with pytest.raises(ValueError, match=r"observation|could not convert|shape"):
        whole.policy.act(obs)


@pytest.mark.parametrize("name", ["missing", "empty", "run.json"])
def test_what_is_no_policy_is_not_loaded(name: str, whole: sf.Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name):
        sf.load(whole.path / name if name == "run.json" else tmp_path / name)


def test_an_evaluation_is_the_same_at_every_call(whole: sf.Run, whole_on_host: sf.Run) -> None:
    for run in (whole, whole_on_host):
        returns = run.evaluate(7)
        assert returns.shape == (7,)
        assert returns.dtype == np.float64
        assert run.evaluate(episodes=7).tolist() == sf.Run(str(run.path)).evaluate(7).tolist() == returns.tolist()
        drawn = run.evaluate(7, deterministic=False)
        assert drawn.tolist() == run.evaluate(7, deterministic=False).tolist()
        assert drawn.tolist() != returns.tolist()


def test_a_run_draws_its_audit_and_writes_its_report(whole_on_host: sf.Run, tmp_path: Path) -> None:
    run = whole_on_host
    assert run.plot_audit() == run.path / "audit.png"
    assert run.plot_audit(str(tmp_path / "audit.svg")) == tmp_path / "audit.svg"
    assert run.report() == run.path / "report.html"
    assert run.report(tmp_path / "page.html") == tmp_path / "page.html"
    assert (tmp_path / "page.html").read_bytes() == (run.path / "report.html").read_bytes()
    assert (tmp_path / "audit.svg").stat().st_size > 5000


@pytest.mark.parametrize("episodes", [0, -1, 1.5, "all"])
def test_an_evaluation_of_no_episodes_is_refused(episodes: Any, whole: sf.Run) -> None:
    with pytest.raises(ValueError, match="episodes must be a whole number of at least 1, got "):
        whole.evaluate(episodes)


def test_a_report_says_where_the_run_stands(whole: sf.Run, tmp_path: Path) -> None:
    reports = list(sf.iterate(SMALL, "CartPole-v1", steps=STEPS, out=tmp_path, preset=False))
    assert [report.step for report in reports] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert [report.metrics for report in reports] == metrics(tmp_path)
    for index, report in enumerate(reports, start=1):
        assert report.metrics.keys() >= {"episode_return", "kl", "policy_loss", "value_loss", "entropy", "time/steps_per_second"}
        assert (report.metrics["step"], report.metrics["iteration"]) == (report.step, index)
        assert all(value is None or type(value) in (int, float) for value in report.metrics.values())
    assert bits(tmp_path) == bits(whole.path)


@pytest.mark.parametrize("env", ["CartPole-v1", "support:Walk"])
def test_a_policy_that_is_held_does_not_change_under_its_holder(env: str, tmp_path: Path) -> None:
    reports = sf.iterate(SMALL, env, steps=STEPS, out=tmp_path, preset=False)
    held = next(reports).policy
    obs = np.random.default_rng(0).normal(size=(64, *held.observation_space.shape))
    before, parameters = held.act(obs), [np.array(leaf) for leaf in jax.tree.leaves(held.acting)]
    last = list(reports)[-1].policy
    assert all(np.array_equal(old, new) for old, new in zip(parameters, jax.tree.leaves(held.acting), strict=True))
    assert held.act(obs).tolist() == before.tolist()
    assert any(not np.array_equal(old, new) for old, new in zip(parameters, jax.tree.leaves(last.acting), strict=True))
    assert sf.load(held.save(tmp_path / "held.safetensors")).act(obs).tolist() == before.tolist()


@pytest.mark.parametrize(("env", "how"), [("CartPole-v1", "break"), ("support:Walk", "exception"), ("CartPole-v1", "close")])
def test_a_loop_left_at_any_time_goes_on_to_the_same_bits(env: str, how: str, whole: sf.Run, whole_on_host: sf.Run, tmp_path: Path) -> None:
    reports = sf.iterate(SMALL, env, steps=STEPS, out=tmp_path, preset=False)
    if how == "close":
        assert [next(reports).step, next(reports).step] == [BATCH, 2 * BATCH]
        reports.close()
    else:
        try:
            for report in reports:
                if report.step == 2 * BATCH:
                    if how == "break":
                        break
                    raise RuntimeError("of the caller")
        except RuntimeError:
            pass
        del reports
    assert steps_saved(tmp_path) == [2 * BATCH]
    run = sf.resume(tmp_path, progress=False)
    assert bits(run.path) == bits((whole if env == "CartPole-v1" else whole_on_host).path)


def test_trainings_in_one_process_do_not_touch_each_other(whole: sf.Run, tmp_path: Path) -> None:
    runs = [
        sf.iterate(SMALL, "CartPole-v1", steps=STEPS, seed=seed, out=tmp_path / f"{n}", preset=False) for n, seed in enumerate([0, 1, 0])
    ]
    for _ in itertools.zip_longest(*runs):  # turn by turn
        pass
    assert bits(tmp_path / "0") == bits(tmp_path / "2") == bits(whole.path)
    assert bits(tmp_path / "0")[0] != bits(tmp_path / "1")[0]


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
def test_a_vector_environment_trains_in_each_of_its_modes_and_stays_open(mode: AutoresetMode, tmp_path: Path) -> None:
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 8, autoreset_mode=mode)
    run = train(env, tmp_path, steps=2 * BATCH)
    assert metrics(tmp_path)[-1]["episodes"] > 0
    assert run.evaluate(3).tolist() == run.evaluate(3).tolist()
    assert env.reset(seed=0)[0].shape == (8, 4)
    sf.resume(tmp_path, env, progress=False)
    env.close()


def test_the_number_of_environments_is_the_vectors_own_or_must_agree(tmp_path: Path) -> None:
    config = sf.PPO(num_steps=16, minibatch_size=16, epochs=1, hidden=(8,))
    env = SyncVectorEnv([Walk] * 3)
    report = next(sf.iterate(config, env, steps=48, out=tmp_path / "own", preset=False))
    assert report.step == 48
    with pytest.raises(ValueError, match="SyncVectorEnv holds 3 environments, and num_envs is 5; make them equal"):
        sf.train(config, env, num_envs=5, out=tmp_path / "other")
    with pytest.raises(ValueError, match="is one environment, and 8 are to run; give an id, or a function that builds a new one"):
        sf.train(config, Walk(), out=tmp_path / "one")
    one = Walk()
    with pytest.raises(ValueError, match="gives the same object at each call; return a new environment"):
        sf.train(config, lambda: one, out=tmp_path / "same")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_environment_without_a_name_is_given_again(whole_on_host: sf.Run, tmp_path: Path) -> None:
    make = lambda: Walk()  # noqa: E731
    next(sf.iterate(SMALL, make, steps=STEPS, out=tmp_path, preset=False))
    for use in (lambda: sf.resume(tmp_path), lambda: sf.Run(tmp_path).evaluate(1)):
        with pytest.raises(ValueError, match=r"The run was given test_api:.*<lambda>, .* hand it over again, as env="):
            use()
    with pytest.raises(CheckpointError, match=r"observation_space was Box\(-1.0, .* and is now Box\(-2.0, "):
        sf.resume(tmp_path, lambda: WideWalk(), progress=False)
    run = sf.resume(tmp_path, make, progress=False)
    assert bits(run.path)[2] == bits(whole_on_host.path)[2]
    assert run.evaluate(3).tolist() == sf.Run(tmp_path, make).evaluate(3).tolist() == whole_on_host.evaluate(3).tolist()


def test_without_progress_nothing_is_said_and_with_it_how_it_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train("CartPole-v1", tmp_path / "silent").evaluate(2)
    list(sf.iterate(SMALL, "CartPole-v1", steps=STEPS, out=tmp_path / "iterated", preset=False))
    assert capfd.readouterr() == ("", "")
    train("CartPole-v1", tmp_path / "told", progress=True)
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("ppo on CartPole-v1 (in JAX, compiled with the learner), 8 environments, seed 0, 384 steps -> ")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("ppo", r"Expected a configuration .*got 'ppo'; write for example sf.PPO\(clip=0.2\)"),
        (sf.PPO, "Expected a configuration"),
        (None, "Expected a configuration"),
    ],
    ids=["a name", "a class", "nothing"],
)
def test_what_is_no_configuration_is_refused(config: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=what):
        sf.train(config, "CartPole-v1", out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env", [None, 3, "", "CartPol", object(), np.zeros(3), Walk.step, "os:getcwd"], ids=lambda env: type(env).__name__)
def test_what_is_no_environment_is_refused(env: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"environment|gymnasium.Env|building it raised"):
        sf.train(SMALL, env, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_settings_are_refused_by_name_and_bound() -> None:
    with pytest.raises(ValueError, match="PPO has no setting 'gama', did you mean 'gamma'"):
        sf.PPO(gama=0.9)
    with pytest.raises(ValueError, match=r"PPO.gamma must lie in \[0, 1\], got 1.5"):
        sf.PPO(gamma=1.5)
    with pytest.raises(ValueError, match=r"PPO.clip must lie in \(0, inf\), got -1"):
        sf.PPO(clip=-1)


def test_presets_fill_in_what_is_not_set(tmp_path: Path) -> None:
    preset = PRESETS["ppo", "CartPole-v1"]
    plain = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    for name, expected in {"on": plain | {key: preset[key] for key in preset.keys() - SMALL.explicit}, "off": plain}.items():
        sf.iterate(SMALL, "CartPole-v1", steps=BATCH, out=tmp_path / name, preset=name == "on").close()
        assert json.loads((tmp_path / name / "run.json").read_text())["config"] == expected
    assert preset.keys() - SMALL.explicit, "a preset with something to fill in"


def test_importing_is_quiet_and_starts_no_backend(tmp_path: Path) -> None:
    code = "import surefoot, sys; assert 'matplotlib.pyplot' not in sys.modules; import jax; assert not jax._src.xla_bridge._backends"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:surefoot", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
