"""The picture of the step audit shows the numbers of metrics.jsonl, at the steps they are about."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from support import SMALL, metrics

import surefoot as sf
from surefoot.algorithms import ALGORITHMS
from surefoot.report.audit import MAX_POINTS, PANELS, alone, draw, note, panels, plot_audit, predicted, read_audits, realised, windowed
from surefoot.report.curves import COLOURS, run_directories
from surefoot.report.page import write_report

NAN = float("nan")


def write_run(path, rows, *, seed=0, algorithm="ppo", **config):
    path.mkdir(parents=True)
    record = {"algorithm": algorithm, "environment": "CartPole-v1", "num_envs": 8, "steps": 10_000, "seed": seed, "config": config}
    (path / "run.json").write_text(json.dumps(record))
    lines = [{"step": 100 * (i + 1), "episode_return": None} | row for i, row in enumerate(rows)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def improvements(levels, errors=None, promised=0.5):
    """Lines of metrics as `Recent.take` and `step_audit` write them, for the mean discounted return of each batch."""
    previous, rows = None, []
    for index, level in enumerate(levels):
        change = None if level is None or previous is None else level - previous
        error = None if change is None else (errors[index] if errors else 0.1)
        previous = previous if level is None else level
        rows.append({"discounted_return": level, "realised_improvement": change, "realised_improvement_error": error})
        rows[-1] |= {"predicted_improvement": promised, "predicted_improvement_error": 0.25, "kl": 0.01}
    return rows


def shown(figure):
    """Every panel by its title."""
    return {axes.get_title("left"): axes for axes in figure.axes}


def audits(*runs):
    return read_audits(runs)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sf.train(SMALL, "CartPole-v1", steps=6 * 128, out=tmp_path_factory.mktemp("run"), progress=False, preset=False).path


def test_every_line_of_a_short_run_is_its_metrics(run):
    rows, drawn = metrics(run), shown(draw(*read_audits([run])))
    names = {panel.title: panel.names for panel in PANELS}
    assert len(drawn.keys() & names.keys()) == 7
    compared = set()
    for title, axes in drawn.items():
        lines = [line for line in axes.lines if line.get_marker() != "."]
        for line, name in zip(lines, [name for name in names.get(title, ()) if name in rows[0]], strict=False):
            assert line.get_xdata().tolist() == [row["step"] for row in rows]
            np.testing.assert_array_equal(line.get_ydata(), [NAN if row[name] is None else row[name] for row in rows])
            compared.add(name)
    assert compared == {
        *("kl", "ratio_min", "ratio_max", "effective_sample_size", "clip_fraction"),
        *("entropy", "explained_variance", "gradient_norm"),
    }
    (title,) = drawn.keys() - names.keys()
    lines = {line.get_label(): line.get_ydata() for line in drawn[title].lines}
    np.testing.assert_array_equal(
        lines["predicted"], [NAN if row["predicted_improvement"] is None else row["predicted_improvement"] for row in rows]
    )
    assert lines["realised"][:-1].tolist() == [row["realised_improvement"] for row in rows[1:]], "it stands at the step that brought it"
    assert np.isnan(lines["realised"][-1])


def test_the_improvement_that_was_realised_comes_with_its_error(tmp_path):
    (audit,) = audits(write_run(tmp_path / "run", improvements([1.0, 3.0, 2.0], errors=[None, 0.3, 0.4])))
    brought, promised = realised(audit.metrics), predicted(audit.metrics)
    np.testing.assert_array_equal(brought.steps, [100, 200, 300])
    np.testing.assert_array_equal(brought.mean, [2, -1, NAN])
    np.testing.assert_array_equal(brought.error, [0.3, 0.4, NAN])
    np.testing.assert_array_equal(promised.mean, [0.5] * 3)
    np.testing.assert_array_equal(promised.error, [0.25] * 3)


def test_steps_between_which_no_episode_ended_share_what_they_brought(tmp_path):
    levels = [None, 1.0, None, None, 7.0, 8.0, None]
    (audit,) = audits(write_run(tmp_path / "run", improvements(levels, errors=[None, None, None, None, 0.6, 0.2, None])))
    brought = realised(audit.metrics)
    np.testing.assert_array_equal(brought.mean, [NAN, 2, 2, 2, 1, NAN, NAN])
    np.testing.assert_allclose(brought.error, [NAN, 0.2, 0.2, 0.2, 0.2, NAN, NAN])


def test_a_long_run_is_drawn_in_windows_that_leave_nulls_out():
    value = np.arange(MAX_POINTS + 2.0)  # 40 windows of 5 and one of 2
    value[[0, 1, 2, 5, 6, 7, 8, 9]] = NAN
    line = windowed(100 * np.arange(1.0, 203.0), value)
    assert line.steps.tolist() == [*range(500, 20_001, 500), 20_200]
    np.testing.assert_array_equal(line.mean, [3.5, NAN, *range(12, 200, 5), 200.5])
    np.testing.assert_array_equal(line.low, [3, NAN, *range(10, 200, 5), 200])
    np.testing.assert_array_equal(line.high, [4, NAN, *range(14, 200, 5), 201])
    spread = np.std(range(5), ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(line.error, [0.5, NAN, *[spread] * 38, 0.5])


def test_the_windows_of_improvements_are_per_step_and_their_errors_are_those_of_noise(tmp_path):
    rng = np.random.default_rng(0)
    slope, size, number = 0.01, 5, 5 * MAX_POINTS
    rows = improvements((slope * np.arange(number) + rng.normal(size=number)).tolist())
    for row in rows:
        row["predicted_improvement"] = 0.5 + rng.normal()
    (audit,) = audits(write_run(tmp_path / "run", rows))
    brought, promised = realised(audit.metrics), predicted(audit.metrics)
    level = audit.metrics["discounted_return"].reshape(-1, size).mean(axis=1)
    np.testing.assert_allclose(brought.mean, [*np.diff(level) / size, NAN])
    for estimate, truth in ((brought, slope), (promised, 0.5)):
        known = np.isfinite(estimate.mean)
        assert known.sum() >= MAX_POINTS - 1
        score = (estimate.mean[known] - truth) / estimate.error[known]
        assert abs(score.mean()) < 0.25
        assert 0.8 < np.median(np.abs(score)) / 0.69 < 1.25  # Student's t with 4 or 8 degrees of freedom


@pytest.mark.parametrize("number", [2 * MAX_POINTS + 3, 2 * MAX_POINTS + 4])
def test_a_last_window_that_is_cut_short_does_not_change_the_slope(number, tmp_path):
    (audit,) = audits(write_run(tmp_path / "run", improvements(np.arange(float(number)).tolist())))
    np.testing.assert_allclose(realised(audit.metrics).mean[:-1], 1.0)


def test_only_metrics_with_numbers_have_a_panel(tmp_path):
    rows = [{"kl": 0.01, "step_kl": 0.02, "entropy": None, "step_scale": 0.8, "learning_rate": 1e-3, "loss": 1.0}] * 2
    (plain,) = audits(write_run(tmp_path / "plain", rows))
    assert [(panel.names, panel.dotted) for panel in panels([plain])] == [(("kl",), ("step_kl",)), (("step_scale",), ())]
    (adaptive,) = audits(
        write_run(tmp_path / "adaptive", [row | {"learning_rate": rate} for row, rate in zip(rows, (1e-3, 2e-3), strict=True)])
    )
    assert [panel.names for panel in panels([adaptive])] == [("kl",), ("step_scale",), ("learning_rate",)]
    assert panels(audits(write_run(tmp_path / "nothing", [{"loss": 1.0}]))) == []
    every = {name for panel in PANELS for name in (*panel.names, *panel.dotted)}
    assert len(panels(audits(write_run(tmp_path / "every", [dict.fromkeys(every, value) for value in (1.0, 2.0)])))) == len(PANELS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"max_kl": 0.03}, {"max_kl 0.03": 0.03}), ({"target_kl": None}, {}), ({"clip": 0.2}, {}), ({"max_kl": float("inf")}, {})],
    ids=["a bound", "unset", "another", "unbounded"],
)
def test_the_methods_own_limit_is_drawn(config, expected, tmp_path):
    figure = draw(*read_audits([write_run(tmp_path / "run", [{"kl": 0.01}] * 3, **config)]))
    drawn = shown(figure)["KL(old || new) of the step, nats"]
    assert drawn.get_yscale() == "log"
    assert {line.get_label(): line.get_ydata()[0] for line in drawn.lines if line.get_linestyle() == "--"} == expected


def test_the_clip_range_is_drawn_as_it_was_scheduled(tmp_path):
    rows = [{"ratio_min": 0.7, "ratio_max": 1.4, "clip": clip} for clip in (0.2, 0.1)]
    (axes,) = draw(*read_audits([write_run(tmp_path / "run", rows)])).axes
    dashed = [line.get_ydata().tolist() for line in axes.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed, [[1.2, 1.1], [0.8, 0.9]])


def test_in_a_long_run_the_ratios_are_the_extremes_of_each_window(tmp_path):
    rows = [{"ratio_min": 0.5 + i % 5 / 10, "ratio_max": 1.5 + i % 5 / 10} for i in range(2 * MAX_POINTS)]
    (axes,) = draw(*read_audits([write_run(tmp_path / "run", rows)])).axes
    lowest, highest = (line.get_ydata() for line in axes.lines if line.get_marker() != ".")
    assert set(lowest) == {0.5}
    assert set(highest) == {1.9}


def test_seeds_have_a_colour_each_and_their_improvements_a_panel_each(tmp_path):
    for seed in (4, 5):
        rows = [row | {"step_kl": 0.02, "ratio_max": 2.0, "clip": 0.2} for row in improvements([1.0, 2.0 + seed, 3.0])]
        write_run(tmp_path / f"seed-{seed}", rows, seed=seed, target_kl=0.03)
    figure = draw(*read_audits(run_directories(tmp_path)))
    drawn = shown(figure)
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert labels == [["predicted", "realised"]] * 2 + [["step_kl", "target_kl 0.03"], ["1 +- clip"]], "each once"
    assert [to_hex(line.get_color()) for line in drawn["KL(old || new) of the step, nats"].lines[::4]][:2] == [
        hue.lower() for hue in COLOURS[:2]
    ]
    for seed, hue in zip((4, 5), COLOURS, strict=False):
        lines = {line.get_label(): line for line in drawn[f"seed {seed}"].lines}
        assert lines["realised"].get_ydata()[:2].tolist() == [1.0 + seed, 1.0 - seed]
        assert lines["realised"].get_color() == hue
    assert "2 seeds" in figure.get_suptitle()


def test_one_seed_twice_and_seeds_of_different_lengths_are_drawn(tmp_path):
    for index, number in enumerate((2, 5, 1)):
        write_run(tmp_path / f"seed-{index}", improvements([1.0] * number), seed=0)
    assert plot_audit(tmp_path, tmp_path / "audit.png").stat().st_size > 5000


def test_a_number_between_nulls_is_a_dot(tmp_path):
    assert alone(np.array([1, NAN, 2, 3, NAN, 4])).tolist() == [True, False, False, False, False, True]
    figure = draw(*read_audits([write_run(tmp_path / "run", [{"kl": kl} for kl in (None, 0.01, None, 0.02, 0.03)])]))
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    assert [line.get_xydata().tolist() for line in dots] == [[[200, 0.01]]]


def test_the_picture_says_when_a_point_is_more_than_one_iteration(tmp_path):
    short, long = ([{"kl": 0.01}] * number for number in (MAX_POINTS, MAX_POINTS + 1))
    assert note(audits(write_run(tmp_path / "short", short))) == "one point for each iteration"
    run = write_run(tmp_path / "long", long)
    assert note(audits(run)) == "a point is the mean of 5 iterations, shaded from smallest to largest"
    assert note(audits(run)) in draw(*read_audits([run])).get_suptitle()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_is_written(suffix, run, tmp_path):
    assert plot_audit(run, tmp_path / f"audit.{suffix}") == tmp_path / f"audit.{suffix}"
    assert (tmp_path / f"audit.{suffix}").stat().st_size > 5000


def test_an_environments_name_is_not_read_as_mathematics(tmp_path):
    run = write_run(tmp_path / "run", [{"kl": 0.01}] * 2)
    (run / "run.json").write_text((run / "run.json").read_text().replace("CartPole-v1", r"$\\nonsense{$"))
    plot_audit(run, tmp_path / "audit.png")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    kl = [{"kl": 0.01}]
    with pytest.raises(ValueError, match="holds no run"):
        plot_audit(tmp_path / "nothing", tmp_path / "audit.png")
    with pytest.raises(ValueError, match=r"empty has no metrics yet; `surefoot train --resume .*empty`"):
        plot_audit(write_run(tmp_path / "empty", []), tmp_path / "audit.png")
    with pytest.raises(ValueError, match="ppo has reported nothing of the step audit"):
        plot_audit(write_run(tmp_path / "silent", [{"loss": 1.0}]), tmp_path / "audit.png")
    with pytest.raises(ValueError, match="jpgg"):
        plot_audit(write_run(tmp_path / "run", kl), tmp_path / "audit.jpgg")
    for clip in (1, 2):
        write_run(tmp_path / "two" / f"seed-{clip}", kl, clip=clip, gamma=0.9)
    with pytest.raises(ValueError, match=r"two holds runs that differ in more than the seed \(clip\); give one of them"):
        plot_audit(tmp_path / "two", tmp_path / "audit.png")
    assert not (tmp_path / "audit.png").exists()


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense", '{"step": null}', '{"step": 1, "kl": "far"}', '{"step": 1, "kl": [1]}'])
def test_a_damaged_line_is_named(line, tmp_path):
    run = write_run(tmp_path / "run", [{"kl": 0.01}])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl is not an iteration's metrics \(.*\); remove that line"):
        plot_audit(run, tmp_path / "audit.png")


SMALL_REPLAY = {"num_steps": 4, "replay_size": 1024, "learning_starts": 64, "update_to_data": 0.25, "minibatch_size": 16, "hidden": (8,)}
CONTINUOUS = "ddpg", "td3"
UNAUDITED = {"q-learning", "dqn", "rainbow", "ddpg", "td3", "sac"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_its_audit_and_its_report(name, tmp_path):
    config = ALGORITHMS[name].config
    known = {field.name for field in dataclasses.fields(config)}
    small = SMALL_REPLAY if "replay_size" in known else {"num_steps": 16, "hidden": (8,), "minibatch_size": 64}
    settings = {key: value for key, value in small.items() if key in known}
    environment = "Pendulum-v1" if name in CONTINUOUS else {"q-learning": "FrozenLake-v1"}.get(name, "CartPole-v1")
    run = sf.train(config(**settings), environment, steps=16 * 128, out=tmp_path / "run", progress=False, preset=False)
    reported = panels(audits(run.path))
    assert reported
    assert run.plot_audit().stat().st_size > 5000
    page = write_report(run.path, tmp_path / "report.html").read_text()
    assert all(panel.title in page for panel in reported)
    title = "Learning" if name in UNAUDITED else "Step audit"
    assert f"<h2>{title}</h2>" in page
    assert draw(*read_audits([run.path])).get_suptitle().startswith(f"{title}: {name} on {environment}, seed 0;")
    if title == "Learning":
        drawn = {name for panel in reported for name in panel.names}
        of_critics = {"critic_loss", "critic_gradient_norm", "action_value", "gradient_norm"}
        of_sac = of_critics | {"entropy", "temperature"}
        of_values = {"td_error", "epsilon"}
        of_networks = of_values | {"gradient_norm"}
        assert drawn == {"q-learning": of_values, "dqn": of_networks, "rainbow": of_networks, "sac": of_sac}.get(name, of_critics)
        assert "promised" not in page
