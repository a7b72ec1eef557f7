"""The figures show what their sentences say, their numbers hold against enumeration, and nothing written on them overlaps."""

import re
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.integrate import quad
from scipy.stats import norm

from surefoot.report import figures
from surefoot.report.figures import bias_variance, cliff, clip, distance, gap, importance, ridge, surrogate, variance

DOCS = Path(__file__).parents[2] / "docs"
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SOMEWHERE = np.array([-0.4, 0.9])  # other parameters of the walker's policy


@pytest.fixture(autouse=True)
def precision():
    with jax.enable_x64(True):
        yield


@cache
def numbers(module):
    return module.compute()


@cache
def every_walk():
    return ridge.walks()


def probability(theta):
    """[N] of each walk."""
    batch = every_walk()
    log_prob = np.where(batch.valid, np.asarray(ridge.log_policy(jnp.asarray(theta)))[batch.position, batch.action], 0.0)
    return batch.slip_prob * np.exp(log_prob.sum(axis=0))


# The ridge.


def test_walks_are_all_there_is_and_no_two_are_alike():
    batch, prob = every_walk(), probability(SOMEWHERE)
    np.testing.assert_allclose(prob.sum(), 1.0, **EXACT)
    rows = np.concatenate([batch.position, batch.action, batch.valid, batch.reward])
    slipped = (batch.action[:-1] == 1) & (batch.position[1:] == batch.position[:-1])
    assert len(np.unique(rows, axis=1).T) == len(prob)
    assert slipped.any()
    np.testing.assert_array_equal(batch.terminated.sum(axis=0), 1)
    np.testing.assert_array_equal(batch.valid.sum(axis=0) - 1, batch.terminated.argmax(axis=0))
    assert (batch.reward < 0).any(axis=0).sum() > 100, "some fall"


def test_dynamic_programming_on_the_ridge_is_the_sum_over_all_walks():
    batch, prob, theta = every_walk(), probability(SOMEWHERE), jnp.asarray(SOMEWHERE)
    np.testing.assert_allclose(ridge.expected_return(theta), prob @ batch.reward.sum(axis=0), **EXACT)
    visits = [[prob @ (batch.valid[t] & (batch.position[t] == place)) for place in range(ridge.CLIFF + 1)] for t in range(ridge.HORIZON)]
    np.testing.assert_allclose(ridge.state_distribution(theta), visits, **EXACT)
    value, action_value = ridge.values(theta)
    to_go = np.cumsum(batch.reward[::-1], axis=0)[::-1]
    for time, place in ((0, 0), (3, 2), (7, 4)):
        here = batch.valid[time] & (batch.position[time] == place)
        np.testing.assert_allclose(value[time, place], prob[here] @ to_go[time, here] / prob[here].sum(), **EXACT)
        for action in (0, 1):
            taken = here & (batch.action[time] == action)
            np.testing.assert_allclose(action_value[time, place, action], prob[taken] @ to_go[time, taken] / prob[taken].sum(), **EXACT)


def test_kl_on_the_ridge_is_the_mean_over_steps():
    batch, old, new = every_walk(), ridge.TIMID, SOMEWHERE
    log_old, log_new = (np.asarray(ridge.log_policy(jnp.asarray(theta))) for theta in (old, new))
    kl = np.sum(np.exp(log_old) * (log_old - log_new), axis=-1)[batch.position]
    prob = probability(old)
    expected = prob @ np.where(batch.valid, kl, 0.0).sum(axis=0) / (prob @ batch.valid.sum(axis=0))
    np.testing.assert_allclose(ridge.expected_kl(jnp.asarray(old), jnp.asarray(new)), expected, **EXACT)


# The figures, in the order of the documentation.


def test_the_whole_step_falls_off_the_cliff_and_the_held_step_does_not():
    found = numbers(cliff)
    assert found.returns.max() > found.start_return + 5, "on the way it looks well"
    assert found.returns[-1] < found.start_return - 5
    assert (found.held_returns > found.start_return).all()
    assert (found.held_kl <= cliff.MAX_KL).all()
    too_far = found.kl > cliff.MAX_KL
    assert 20 < too_far.sum() < 80
    np.testing.assert_array_equal(found.held_returns[~too_far], found.returns[~too_far])
    np.testing.assert_allclose(found.held_kl[too_far], cliff.MAX_KL, rtol=3e-3)


def test_the_steps_are_along_the_exact_gradient():
    found, batch = numbers(cliff), every_walk()
    gradient = numbers(variance).mean[-1, 0]
    for size, after, kl in list(zip(found.step_size, found.returns, found.kl, strict=True))[::20]:
        theta = ridge.TIMID + size * gradient
        np.testing.assert_allclose(after, probability(theta) @ batch.reward.sum(axis=0), **EXACT)
        np.testing.assert_allclose(kl, ridge.expected_kl(jnp.asarray(ridge.TIMID), jnp.asarray(theta)), **EXACT)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_the_variance_of_importance_sampling(shift):
    def p(a):
        return norm.pdf(a)

    def q(a):
        return norm.pdf(a, shift)

    ends = -12.0 - shift, 12.0
    mean, _ = quad(lambda a: q(a) * (1 + a) * p(a) / q(a), *ends)
    square, _ = quad(lambda a: q(a) * ((1 + a) * p(a) / q(a)) ** 2, *ends, epsabs=0, epsrel=1e-12, limit=200)
    np.testing.assert_allclose(mean, importance.MEAN, rtol=1e-10)
    np.testing.assert_allclose(importance.variance(np.array(shift)), square - mean**2, rtol=1e-9)
    weights, _ = quad(lambda a: q(a) * (p(a) / q(a)) ** 2, *ends, epsabs=0, epsrel=1e-12, limit=200)
    index = list(numbers(importance).shift).index(shift)
    np.testing.assert_allclose(numbers(importance).expected_sample_size[index], 1 / weights, rtol=1e-9)
    error = np.sqrt((square - mean**2) / importance.NUM_SAMPLES)
    np.testing.assert_allclose(numbers(importance).standard_error[index], error, rtol=1e-9)


def test_estimates_are_good_near_and_nearly_all_wrong_far_away():
    found = numbers(importance)
    near, far = found.shift <= 1.0, found.shift == 6.0
    np.testing.assert_allclose(found.sample_size[0], 1.0, rtol=1e-12)
    assert (np.abs(found.estimate - importance.MEAN)[near] < 4 * found.standard_error[near, None]).all()
    assert (found.estimate[far] < 0.1).mean() > 0.7
    assert (found.sample_size[far] > 1000 * found.expected_sample_size[far]).all()
    assert found.standard_error[-1] > 1e6 * found.standard_error[0]
    draws, index = np.random.default_rng(0).normal(size=importance.NUM_SAMPLES), list(found.shift).index(2.0)
    action, weight = 2.0 + draws, norm.pdf(2.0 + draws) / norm.pdf(draws)
    np.testing.assert_allclose(found.estimate[index, 0], np.mean(weight * (1 + action)), **EXACT)
    np.testing.assert_allclose(found.sample_size[index, 0], weight.sum() ** 2 / (weight**2).sum() / 1000, **EXACT)


def test_the_clip_function():
    found = numbers(clip)
    for epsilon, line in zip(clip.CLIPS, found.clipped, strict=True):
        np.testing.assert_allclose(line, np.clip(found.ratio, 1 - epsilon, 1 + epsilon), **EXACT)
    assert found.ratio[0] < 1 - max(clip.CLIPS)
    assert found.ratio[-1] > 1 + max(clip.CLIPS)


def test_the_clipped_surrogate():
    found = numbers(surrogate)
    good, bad = found.clipped
    np.testing.assert_allclose(found.unclipped, [found.ratio, -found.ratio], **EXACT)
    np.testing.assert_allclose(good, np.minimum(found.ratio, 1.2), **EXACT)
    np.testing.assert_allclose(bad, np.minimum(-found.ratio, -0.8), **EXACT)
    np.testing.assert_allclose(found.dual_clipped[0], good, **EXACT)
    np.testing.assert_allclose(found.dual_clipped[1], np.maximum(bad, -2.0), **EXACT)


def test_the_same_step_goes_a_hundred_times_as_far():
    found = numbers(distance)
    wide, narrow = distance.STDS
    np.testing.assert_allclose(found.kl, distance.STEP**2 / (2 * found.std**2), **EXACT)
    assert wide == pytest.approx(10 * narrow)
    assert found.drawn_kl[1] == pytest.approx(100 * found.drawn_kl[0], rel=1e-10)
    log_ratio_mean, _ = quad(lambda a: norm.pdf(a, 0, wide) * (norm.logpdf(a, 0, wide) - norm.logpdf(a, distance.STEP, wide)), -12, 12)
    assert found.drawn_kl[0] == pytest.approx(log_ratio_mean, rel=1e-9)


def test_every_rung_is_unbiased_and_the_variance_falls():
    found = numbers(variance)
    np.testing.assert_allclose(found.mean, found.mean[:, :1].repeat(len(variance.RUNGS), axis=1), **EXACT)
    np.testing.assert_allclose(found.mean[-1, 0], jax.grad(ridge.expected_return)(jnp.asarray(ridge.TIMID)), **EXACT)
    for above, below in pairwise(found.variance.T):
        assert (below[1:] < above[1:]).all()
    one_step = found.variance[0]
    assert one_step[0] == pytest.approx(one_step[1], rel=1e-12), "with one step the return is the reward to go"
    assert one_step[1] > one_step[2] > one_step[3]


def test_an_episode_of_fewer_steps_is_the_ridge_with_a_nearer_horizon(monkeypatch):
    found = numbers(variance)
    monkeypatch.setattr(ridge, "HORIZON", 3)
    monkeypatch.setattr(variance, "HORIZON", 3)
    shorter = variance.compute()
    np.testing.assert_allclose(shorter.variance, found.variance[:3], **EXACT)
    np.testing.assert_allclose(shorter.mean, found.mean[:3], **EXACT)
    np.testing.assert_allclose(shorter.mean[-1, 0], jax.grad(ridge.expected_return)(jnp.asarray(ridge.TIMID)), **EXACT)


def test_moments_of_a_target_are_sums_over_every_walk():
    means, variances = bias_variance.exact_moments()
    size = bias_variance.NUM_STATES
    for index, num_steps in enumerate((1, 2, 4, 8)):
        steps = np.array(np.meshgrid(*[[-1, 1]] * num_steps)).reshape(num_steps, -1)
        for state in (0, 3, 9, 18):
            place = state + np.cumsum(steps, axis=0)
            left, right = (place < 0), (place >= size)
            first = [np.where(out.any(axis=0), out.argmax(axis=0), num_steps) for out in (left, right)]
            target = np.where(first[0] < first[1], -1.0, np.where(first[1] < first[0], 1.0, 0.0))
            np.testing.assert_allclose(means[index, state], target.mean(), **EXACT)
            np.testing.assert_allclose(variances[index, state], target.var(), **EXACT)


def test_monte_carlo_is_where_many_steps_lead(monkeypatch):
    monkeypatch.setattr(bias_variance, "NUM_STEPS", (4000,))
    (many, every), (many_variance, every_variance) = bias_variance.exact_moments()
    np.testing.assert_allclose(many, every, **EXACT)
    np.testing.assert_allclose(many_variance, every_variance, **EXACT)


def test_what_is_measured_is_what_is_computed():
    """Over 1900 episodes the measured means are within 0.04 of the exact ones: four standard errors of a variance of 0.7."""
    found = numbers(bias_variance)
    np.testing.assert_allclose(found.measured_bias_squared, found.bias_squared, atol=0.04)
    np.testing.assert_allclose(found.measured_variance, found.variance, atol=0.04)


def test_bias_falls_variance_rises_and_the_least_error_lies_between():
    found = numbers(bias_variance)
    assert (np.diff(found.bias_squared) < 0).all()
    assert (np.diff(found.variance) > 0).all()
    assert found.bias_squared[-1] == 0.0
    error = found.bias_squared + found.variance / bias_variance.NUM_AVERAGED
    assert error.min() < 0.5 * min(error[0], error[-1])


def test_the_performance_difference_is_exact_and_the_surrogate_is_not():
    found = numbers(gap)
    np.testing.assert_allclose(found.identity, found.realised, **EXACT)
    assert found.surrogate[-1] > 0 > found.realised[-1]


def test_the_surrogate_is_the_mean_over_walks_of_the_old_policy():
    found, batch, old = numbers(gap), every_walk(), jnp.asarray(ridge.TIMID)
    gradient = np.asarray(jax.grad(ridge.expected_return)(old))
    value, action_value = (np.asarray(table) for table in ridge.values(old))
    advantage = action_value[batch.time, batch.position, batch.action] - value[batch.time, batch.position]
    for size, promised in list(zip(found.step_size, found.surrogate, strict=True))[::12]:
        log_new, log_old = (np.asarray(ridge.log_policy(theta)) for theta in (old + size * gradient, old))
        ratio = np.exp(log_new - log_old)[batch.position, batch.action]
        gain = np.where(batch.valid, (ratio - 1) * advantage, 0.0).sum(axis=0)
        np.testing.assert_allclose(promised, probability(ridge.TIMID) @ gain, **EXACT)


def test_the_gap_shrinks_as_the_kl_and_the_promise_as_its_root():
    found = numbers(gap)
    difference = found.surrogate - found.realised
    share = difference / found.surrogate
    assert (difference > 0).all()
    assert (np.diff(share) > 0).all()
    assert share[0] < 1e-3
    near = slice(0, 8)
    for line, power in ((difference, 1.0), (found.surrogate, 0.5)):
        assert np.polyfit(np.log(found.kl[near]), np.log(line[near]), 1)[0] == pytest.approx(power, abs=0.05)


# The pictures.


def drawn(name):
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    figures.FIGURES[name].draw(figure, numbers(figures.FIGURES[name]))
    figure.suptitle("\n")
    figure.draw_without_rendering()
    return figure


def visible_texts(figure):
    hidden = {
        label
        for axes in figure.findobj(lambda artist: hasattr(artist, "get_xaxis"))
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for label in (tick.label1, tick.label2)
        if not (min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval()) and axes.axison)
    }
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible() and text not in hidden]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_nothing_written_overlaps_or_leaves_the_picture(name):
    figure = drawn(name)
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    assert len(boxes) > 10
    assert [(one[0], other[0]) for one, other in combinations(boxes, 2) if one[1].overlaps(other[1])] == []
    assert [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1] == []


def written(svg):
    """Every line of text in a picture: it stands there as a comment."""
    return re.findall(r"<!-- (.*?) -->", svg)


def lines(svg):
    """The coordinates of everything drawn."""
    return [float(number) for path in re.findall(r' d="([^"]*)"', svg) for number in re.findall(r"[-\d.]+", path)]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_picture_in_the_documentation_is_the_one_that_is_drawn(name, tmp_path):
    figures.write(name, tmp_path / "new.svg")
    new, shown = (path.read_text() for path in (tmp_path / "new.svg", DOCS / "images" / "figures" / f"{name}.svg"))
    assert len(new) > 20_000
    assert " ".join(written(new)).endswith(figures.sentence(name))
    assert written(new) == written(shown), f"draw it again: surefoot figure {name} --out docs/images/figures/{name}.svg"
    np.testing.assert_allclose(lines(new), lines(shown), atol=0.5, err_msg="in points; draw it again")


@pytest.mark.parametrize("page", ["figures.md", "figures.zh-CN.md"])
def test_the_documentation_has_every_figure(page):
    text = (DOCS / page).read_text()
    assert re.findall(r"\(images/figures/([\w-]+)\.svg\)", text) == list(figures.FIGURES)


def test_the_documentation_has_every_sentence():
    text = " ".join((DOCS / "figures.md").read_text().split())
    assert [name for name in figures.FIGURES if figures.sentence(name) not in text] == []


def test_a_figure_is_written_with_the_same_bytes_at_every_call(tmp_path):
    for name in ("one.svg", "two.svg", "one.png", "two.png"):
        figures.write("clip", tmp_path / name)
    for suffix, magic in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        one, two = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert one.startswith(magic)
        assert len(one) > 20_000
