"""Learning curves are read, grouped and averaged as they say."""

import json
from itertools import pairwise

import numpy as np
import pytest

from surefoot.report.curves import Curve, draw, experiments, label, mean_and_band, plot, read_curve, run_directories


def write_run(path, *, seed=0, returns=(10.0, 20.0, 30.0), algorithm="ppo", environment="CartPole-v1", num_envs=8, **config):
    path.mkdir(parents=True)
    record = {"algorithm": algorithm, "environment": environment, "num_envs": num_envs, "steps": 300, "seed": seed, "command": str(path)}
    (path / "run.json").write_text(json.dumps(record | {"config": {"clip": 0.2, "hidden": [64, 64]} | config}))
    rows = [{"step": 100 * (i + 1), "episode_return": value, "kl": 0.01} for i, value in enumerate(returns)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(figure):
    (axes,) = figure.axes
    return "\n".join([axes.get_title("left"), axes.get_title("right"), *(text.get_text() for text in axes.texts)])


def test_a_curve_begins_with_the_first_finished_episode_and_leaves_out_a_torn_last_line(tmp_path):
    run = write_run(tmp_path / "run", returns=(None, 20.0, 30.0))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 400, "episode_ret')
    curve = read_curve(run / "metrics.jsonl")
    np.testing.assert_array_equal(curve.steps, [200, 300])
    np.testing.assert_array_equal(curve.returns, [20, 30])


def test_runs_that_differ_in_the_seed_alone_are_one_experiment(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / "b", clip=0.1), write_run(tmp_path / "c", algorithm="trpo"), write_run(tmp_path / "d", num_envs=16)]
    found = experiments(runs)
    assert [experiment.seeds for experiment in found] == [[0, 1], [0], [0], [0]]
    assert [label(experiment, found) for experiment in found] == [
        "ppo num_envs=8 clip=0.2",
        "ppo num_envs=8 clip=0.1",
        "trpo",
        "ppo num_envs=16 clip=0.2",
    ]


def test_the_environment_is_named_where_there_are_several(tmp_path):
    found = experiments([write_run(tmp_path / "a"), write_run(tmp_path / "b", environment="Pendulum-v1")])
    assert [label(experiment, found) for experiment in found] == ["ppo CartPole-v1", "ppo Pendulum-v1"]


def test_the_band_of_two_seeds_is_the_range_and_of_equal_seeds_nothing():
    # Of the four resamples of two seeds one in four is the lower seed twice: the 2.5 % percentile is the lower seed itself.
    low, high = Curve(np.array([1.0, 2.0]), np.array([0.0, 4.0])), Curve(np.array([1.0, 2.0]), np.array([2.0, 10.0]))
    steps, mean, bottom, top = mean_and_band([low, high])
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(mean, [1, 7])
    np.testing.assert_array_equal(bottom, low.returns)
    np.testing.assert_array_equal(top, high.returns)
    for line in mean_and_band([low, low, low])[1:]:
        np.testing.assert_allclose(line, low.returns)


def test_the_band_of_many_seeds_is_two_standard_errors_of_their_mean():
    returns = np.random.default_rng(1).normal(100.0, 10.0, size=40)
    _, mean, bottom, top = mean_and_band([Curve(np.array([1.0]), np.array([value])) for value in returns])
    half_width = 1.96 * returns.std() / np.sqrt(40)
    np.testing.assert_allclose([(mean - bottom)[0], (top - mean)[0]], half_width, rtol=0.1)


def test_the_mean_covers_the_steps_that_every_seed_has_and_interpolates_between():
    short, long = Curve(np.array([2.0, 4.0]), np.array([0.0, 2.0])), Curve(np.array([1.0, 3.0, 5.0]), np.array([0.0, 4.0, 8.0]))
    steps, mean, _, _ = mean_and_band([short, long])
    np.testing.assert_array_equal(steps, [2, 3, 4])
    np.testing.assert_array_equal(mean, [(0 + 2) / 2, (1 + 4) / 2, (2 + 6) / 2])


def test_the_picture_of_one_run_is_its_curve(tmp_path):
    figure = draw(experiments([write_run(tmp_path / "run", seed=7)]))
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[100, 10], [200, 20], [300, 30]])
    assert texts(figure) == "ppo on CartPole-v1\nseed 7"


def test_seeds_are_thin_lines_under_one_mean(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"seed-{seed}", seed=seed, returns=(10.0, 20.0, 30.0 + 30 * seed))
    figure = draw(experiments(run_directories(tmp_path)))
    (axes,) = figure.axes
    assert sorted(line.get_linewidth() for line in axes.lines) == [0.7, 0.7, 0.7, 2]
    np.testing.assert_array_equal(max(axes.lines, key=lambda line: line.get_linewidth()).get_ydata(), [10, 20, 60])
    assert "3 seeds" in texts(figure)


def test_a_run_without_episodes_says_so(tmp_path):
    silent = write_run(tmp_path / "silent", returns=(None, None), clip=0.1)
    assert "no episode finished yet" in texts(draw(experiments([silent])))
    assert "clip=0.1\nno episode finished yet" in texts(draw(experiments([silent, write_run(tmp_path / "other")])))
    partly = [write_run(tmp_path / "p0", clip=0.3), write_run(tmp_path / "p1", seed=1, clip=0.3, returns=(None,))]
    assert "1 of 2 seeds; no episode yet in the others" in texts(draw(experiments(partly)))


@pytest.mark.parametrize("returns", [(10.0, 20.0, 30.0), (30.0, 20.0, 10.0)], ids=["at the top", "at the bottom"])
def test_names_of_lines_that_end_together_do_not_touch(tmp_path, returns):
    figure = draw(experiments([write_run(tmp_path / f"{clip}", clip=clip, returns=returns) for clip in (0.1, 0.2, 0.3, 0.4)]))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 and axes.bbox.y0 <= box.y0 for box in boxes)
    assert boxes[-1].y1 <= axes.bbox.y1 + boxes[-1].height


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_written_and_one_run_given_twice_counts_once(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run")
    assert plot([run], tmp_path / f"once.{suffix}") == tmp_path / f"once.{suffix}"
    plot([run, "run"], tmp_path / f"twice.{suffix}")
    once, twice = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("once", "twice"))
    assert len(once) > 5000
    assert suffix == "svg" or once == twice  # an SVG holds the time of its writing


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing here holds no run"):
        plot([tmp_path / "nothing here"], tmp_path / "curve.png")
    with pytest.raises(ValueError, match="jpgg"):
        plot([write_run(tmp_path / "run")], tmp_path / "curve.jpgg")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "\x00"])
def test_a_record_that_is_none_is_named(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is not the record of a run"):
        plot([tmp_path], tmp_path / "curve.png")
