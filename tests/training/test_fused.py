"""Short iterations of a device environment, fused into one call: the same bits, and the mean of what they report."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import bits

import surefoot as sf
from surefoot.envs.classic import CLASSIC
from surefoot.training.control import ControlSession

pytestmark = pytest.mark.usefixtures("optimised")


def short(num_steps: int) -> sf.A2C:
    return sf.A2C(num_steps=num_steps, hidden=(8,), optimiser="adam")


def start(config: sf.A2C, path: Path, env: Any = "CartPole-v1", steps: int = 320, *, one_by_one: bool = False) -> ControlSession:
    """By default 20 iterations of 8 steps of 2 environments."""
    session = ControlSession.start(config, env, steps=steps, seed=0, num_envs=2, preset=False, out=path)
    if one_by_one:
        session.engine.fused = 1
    return session


def test_short_iterations_are_fused_with_equal_bits(tmp_path: Path) -> None:
    """Two calls of eight iterations, and one of four."""
    for name in ("fused", "single"):
        list(start(short(8), tmp_path / name, one_by_one=name == "single").reports(checkpoint_seconds=60.0))
    (tensors, info, rows), (single_tensors, single_info, single_rows) = (bits(tmp_path / name) for name in ("fused", "single"))
    assert tensors == single_tensors
    assert [row["iteration"] for row in rows] == [8, 16, 20]
    assert [row["step"] for row in rows] == [128, 256, 320]
    assert [row["iteration"] for row in single_rows] == list(range(1, 21))
    assert sorted(info["episodes"].pop("returns")) == sorted(single_info["episodes"].pop("returns"))
    assert info["episodes"]["episodes"] == single_info["episodes"]["episodes"] > 3
    for row, begin in zip(rows, range(0, 20, 8), strict=True):
        several = single_rows[begin : begin + 8]
        assert row["episodes"] == several[-1]["episodes"]
        for name in ("kl", "entropy", "value_loss", "learning_rate", "predicted_improvement"):
            known = [each[name] for each in several if each[name] is not None]
            assert (row[name] is None) == (not known)
            np.testing.assert_allclose(row[name] or 0, np.mean(known) if known else 0, rtol=1e-5, atol=1e-9, err_msg=name)


def test_a_run_of_short_iterations_resumes_in_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 320, "num_envs": 2}
    sf.train(short(8), "CartPole-v1", out=tmp_path / "whole", progress=False, **options)
    reports = sf.iterate(short(8), "CartPole-v1", out=tmp_path / "left", **options)
    assert [next(reports).step, next(reports).step] == [128, 256]
    reports.close()
    sf.resume(tmp_path / "left", progress=False)
    assert bits(tmp_path / "left") == bits(tmp_path / "whole")


def test_an_iteration_among_several_that_is_not_finite_is_found(tmp_path: Path) -> None:
    """With the same words and the same parameters as one at a time."""

    def step(state: jax.Array, action: jax.Array) -> Any:
        state, obs, reward, terminated = cartpole.step(state, action)
        return state, obs, jnp.where(obs[0] > 0.1, jnp.nan, reward), terminated

    cartpole = CLASSIC["CartPole-v1"]
    breaks = dataclasses.replace(cartpole, step=step)

    def fails(name: str) -> tuple[str, int, list[np.ndarray[Any, Any]]]:
        session = start(short(1), tmp_path / name, breaks, 2000, one_by_one=name == "single")
        with pytest.raises(sf.NonFiniteError, match=r"^reward of environment . at step 0 of the batch is nan") as caught:
            list(session.reports(checkpoint_seconds=60.0))
        return str(caught.value), session.engine.iteration, [np.asarray(x) for x in jax.tree.leaves(session.engine.learner)]

    fused, single = fails("fused"), fails("single")
    assert fused[:2] == single[:2]
    assert fused[1] % 64 > 0  # not the first of its call
    for one, other in zip(fused[2], single[2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_long_iterations_are_calls_of_their_own(tmp_path: Path) -> None:
    for num_steps, fused in ((1, 64), (5, 12), (8, 8), (9, 1), (64, 1), (256, 1)):
        session = start(short(num_steps), tmp_path / str(num_steps))
        assert session.engine.fused == fused
        session.close()
