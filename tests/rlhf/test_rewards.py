"""Reward functions of all kinds are called as they ask, mixed by weight, and what cannot be learned from is named with its sample."""

import sys
import textwrap
import time
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from surefoot.rlhf.rewards import Reward, RewardFault, find_function, is_function, load_rewards, parse_weighted, score

PROMPTS, COMPLETIONS = ["1+1=", "2+2=", "3+3="], ["2", "five", ""]
COLUMNS = [{"answer": 2, "tags": ["a"]}, {"answer": 4, "tags": []}, {"answer": 6, "tags": ["b"]}]


def scored(*functions, weights=None, completions=COMPLETIONS, **options):
    given = [
        Reward(f"f{index}", function, None, weight)
        for index, (function, weight) in enumerate(zip(functions, weights or [1.0] * len(functions), strict=True))
    ]
    return score(given, PROMPTS, completions, COLUMNS, **options)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module, and forget it after the test."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, source):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    yield write
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


# Specifications.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.py:score", ("a.py:score", 1.0)),
        ("a.py:score=0.5", ("a.py:score", 0.5)),
        ("package.module:score=-2e-1", ("package.module:score", -0.2)),
        ("runs/reward", ("runs/reward", 1.0)),
        ("runs/reward=2", ("runs/reward", 2.0)),
        ("runs/lr=0.1/reward", ("runs/lr=0.1/reward", 1.0)),
        ("lr=3/a.py:score=4", ("lr=3/a.py:score", 4.0)),
    ],
)
def test_a_weight_follows_an_equals_sign(text, expected):
    assert parse_weighted(text) == expected
    assert is_function(text) == ("py" in text or "package" in text)


def test_a_directory_is_taken_by_its_name_whatever_is_in_it(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    assert parse_weighted(str(tmp_path / "lr=0.1")) == (str(tmp_path / "lr=0.1"), 1.0)
    assert parse_weighted(str(tmp_path / "lr=0.2")) == (str(tmp_path / "lr"), 0.2)
    (tmp_path / "12:30").mkdir()
    assert not is_function(str(tmp_path / "12:30"))


@pytest.mark.parametrize("number", ["half", "", "nan", "inf", "0", "0.0"])
def test_a_weight_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match=rf"weight of the reward 'a\.py:score={number}' is '{number}'; give a number other than 0"):
        parse_weighted(f"a.py:score={number}")


# Finding them.


def test_functions_of_files_and_modules_are_found_and_their_files_may_import_their_neighbours(module, tmp_path):
    module("neighbour_of_rewards.py", "POINTS = 7.0")
    path = module(
        "my-rewards.py", "from neighbour_of_rewards import POINTS\ndef points(completions, **_): return [POINTS] * len(completions)"
    )
    module(
        "package_of_rewards/inner.py",
        "class Length:\n    def __call__(self, completions): return [len(c) for c in completions]\nlength = Length()",
    )
    found = load_rewards([f"{path}:points=2", "package_of_rewards.inner:length"])
    assert [(reward.name, reward.weight) for reward in found] == [(f"{path}:points", 2.0), ("package_of_rewards.inner:length", 1.0)]
    result = score(found, PROMPTS, COMPLETIONS, COLUMNS)
    np.testing.assert_array_equal(result.score, [15, 18, 14])
    np.testing.assert_array_equal(result.parts["package_of_rewards.inner:length"], [1, 4, 0])


def test_what_is_not_there_is_refused_with_the_nearest(module):
    path = module("rewards_a.py", "def correct(prompts, completions): ...\nlimit = 3")
    for name in ("corect", "limit"):
        with pytest.raises(
            ValueError, match=rf"there is no function '{name}' in .*rewards_a\.py" + (", did you mean 'correct'" * (name == "corect"))
        ):
            find_function(f"{path}:{name}")
    with pytest.raises(ValueError, match=r"there is no file '.*reward_a\.py', did you mean 'rewards_a\.py'\?"):
        find_function(f"{path.parent / 'reward_a.py'}:correct")
    with pytest.raises(
        ValueError, match="No module named 'no_such_rewards'; it must be a module that Python can import from here, or a file"
    ):
        find_function("no_such_rewards:correct")
    for source in ("rewards_a.py", ":score", "rewards_a.py:"):
        with pytest.raises(ValueError, match=r"is no function; name it as module:function or file\.py:function"):
            find_function(source)


def test_a_file_that_does_not_import_is_a_fault_with_its_cause(module):
    with pytest.raises(RewardFault, match="importing it raised SyntaxError") as caught:
        find_function(f"{module('rewards_b.py', 'def score(:')}:score")
    assert isinstance(caught.value.__cause__, SyntaxError)
    with pytest.raises(RewardFault, match="importing it raised SystemExit: 3"):
        find_function(f"{module('rewards_c.py', 'raise SystemExit(3)')}:score")


def test_a_file_is_never_mistaken_for_another_module_of_its_name(module):
    for name in ("json.py", "other/rewards_d.py"):
        path = module(name, "def score(completions): return [1.0]")
        if name.startswith("other"):
            find_function(f"{module('rewards_d.py', 'def score(completions): return [2.0]')}:score")
        with pytest.raises(ValueError, match=rf"Python knows another module '{path.stem}' .*; rename the file"):
            find_function(f"{path}:score")


def test_the_same_reward_twice_is_refused(module):
    path = module("rewards_g.py", "def score(completions): return [1.0]")
    with pytest.raises(ValueError, match="given twice; give it once, with the sum of its weights"):
        load_rewards([f"{path}:score", f"{path}:score=2"])


# What they are given.


def test_a_function_receives_what_it_names_and_all_of_it_by_two_stars(module):
    path = module(
        "rewards_e.py",
        """
        seen = []
        def everything(prompts, completions, **columns):
            seen.append((prompts, completions, columns))
            return [0.0] * len(prompts)
        def some(completions, answer, bonus=0.5):
            return [float(c == str(a)) + bonus for c, a in zip(completions, answer)]
        """,
    )
    found = load_rewards([f"{path}:everything", f"{path}:some"], COLUMNS[0])
    np.testing.assert_array_equal(score(found, PROMPTS, COMPLETIONS, COLUMNS).score, [1.5, 0.5, 0.5])
    assert sys.modules["rewards_e"].seen == [(PROMPTS, COMPLETIONS, {"answer": [2, 4, 6], "tags": [["a"], [], ["b"]]})]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def score(prompts, completions, answers): ...",
            "asks for 'answers', did you mean 'answer'? .* there are prompts, completions, answer",
        ),
        ("def score(completion): ...", "asks for 'completion', did you mean 'completions'?"),
        ("def score(prompts, completions, /): ...", "asks for 'prompts'"),
        ("def score(prompts, completions, *, solution): ...", "asks for 'solution'"),
    ],
)
def test_a_function_that_asks_for_what_is_not_there_is_refused_before_the_run(module, source, message):
    path = module("rewards_f.py", source)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_rewards([f"{path}:score"], ["answer"])


def test_what_a_function_does_to_its_arguments_stays_with_it():
    def vandal(prompts, completions, **columns):
        prompts.clear(), completions.reverse(), columns["tags"][0].append("x")
        return [0.0] * 3

    seen = []
    scored(vandal, lambda **given: seen.append(given) or [0.0] * 3)
    assert seen[0] == {"prompts": PROMPTS, "completions": COMPLETIONS, "answer": [2, 4, 6], "tags": [["a"], [], ["b"]]}
    assert COLUMNS[0]["tags"] == ["a"]


# What they return.


@pytest.mark.parametrize(
    "answer",
    [
        [1, 0.25, -2],
        (np.float32(1), np.float64(0.25), np.int64(-2)),
        [Fraction(1), Fraction(1, 4), Fraction(-2)],
        np.array([1, 0.25, -2]),
        jnp.array([1, 0.25, -2]),
        [jnp.float32(1), np.array(0.25), -2.0],
        [True, 0.25, -2.0],
        [np.True_, 0.25, -2.0],
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_numbers(answer):
    result = scored(lambda **_: answer)
    np.testing.assert_array_equal(result.score, [1, 0.25, -2])
    assert result.score.dtype == result.parts["f0"].dtype == np.float32
    assert result.is_scored.all()


def test_rewards_are_mixed_by_weight_and_what_one_cannot_score_is_left_out():
    result = scored(lambda **_: [1, None, 3], lambda **_: [10, 20, 30.5], lambda **_: [0.5, None, None], weights=[1.0, -0.5, 2.0])
    np.testing.assert_array_equal(result.is_scored, [True, False, False])
    np.testing.assert_array_equal(result.score, [1 - 5 + 1, 0, 0])
    np.testing.assert_array_equal(result.parts["f0"], [1, np.nan, 3])
    np.testing.assert_array_equal(result.parts["f1"], [10, 20, 30.5])
    assert result.is_scored.dtype == np.bool_
    assert not scored(lambda **_: [None] * 3).is_scored.any()


def test_of_no_completions_nothing_is_asked():
    result = score([Reward("f", lambda **_: 1 / 0, None)], [], [], [])
    assert [array.shape for array in (result.score, result.is_scored, result.parts["f"])] == [(0,)] * 3


async def promise(**_):
    return [1.0] * 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: [1.0, 2.0], "'f0' returned 2 scores for 3 completions; return one for each"),
        (lambda **_: 1.0, r"returned float \(1\.0\), where a list of 3 numbers is expected"),
        (lambda **_: None, "returned None, where a list of 3 numbers"),
        (lambda **_: {"a": 1}, r"returned dict \({'a': 1}\)"),
        (lambda **_: np.float32(1.0), r"returned float \(1\.0\)"),
        (promise, "returned coroutine .* make it an ordinary function"),
        (lambda **_: np.ones((3, 2)), r"on completion 1 of 3, gave list \(\[1\.0, 1\.0\]\); return a number, or None"),
        (lambda **_: [1.0, "good", 2.0], r"on completion 2 of 3, gave str \('good'\).*\n  prompt: '2\+2='\n  completion: 'five'$"),
        (
            lambda **_: [1.0, 2.0, float("nan")],
            r"on completion 3 of 3, gave nan; return a finite number, or None.*\n.*'3\+3='\n  completion: ''$",
        ),
        (lambda **_: [float("-inf"), 2.0, 1.0], "on completion 1 of 3, gave -inf"),
        (lambda **_: [1.0, 1e39, 1.0], r"on completion 2 of 3, gave 1e\+39"),
        (lambda **_: [1.0, 10**400, 1.0], "on completion 2 of 3, gave 1000"),
        (lambda **_: [1.0, 1j, 1.0], r"on completion 2 of 3, gave complex \(1j\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_cannot_be_learned_from_is_named_with_its_sample(function, message):
    with pytest.raises(RewardFault, match=message):
        scored(function)


def test_a_sum_that_is_too_large_is_refused():
    with pytest.raises(RewardFault, match="weighted sum of the rewards is beyond what a float32 holds"):
        scored(lambda **_: [1e38, None, 1.0], weights=[-10.0])


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_an_exception_is_named_with_the_sample_that_raises_it_and_keeps_its_traceback(timeout):
    def integer(completions, **_):
        return [float(completion) for completion in completions]

    with pytest.raises(
        RewardFault, match=r"on completion 2 of 3, raised ValueError: could not convert .*\n.*'2\+2='\n  completion: 'five'"
    ) as caught:
        scored(integer, timeout_seconds=timeout)
    assert caught.value.__cause__.__traceback__.tb_next is not None

    def leave(completions, **_):
        sys.exit(4)

    with pytest.raises(RewardFault, match="on completion 1 of 3, raised SystemExit: 4"):
        scored(leave, timeout_seconds=timeout)

    def pairs(completions, **_):
        return [1.0] if len(completions) == 1 else completions[3]

    with pytest.raises(RewardFault, match=r"called with 3 completions, raised IndexError: .*; alone none of them does"):
        scored(pairs, timeout_seconds=timeout)


def test_a_long_text_is_quoted_in_part():
    with pytest.raises(RewardFault) as caught:
        scored(lambda **_: ["x"] * 3, completions=["a" * 10_000, "", ""])
    assert len(str(caught.value)) < 500


def test_a_slow_function_is_an_error_and_a_quick_one_is_not_slowed_down():
    begin = time.monotonic()
    with pytest.raises(
        RewardFault, match=r"'f0' took more than the 0\.2 seconds that it has for 3 completions; make it faster, .* return None"
    ):
        scored(lambda **_: time.sleep(30), timeout_seconds=0.2)
    assert scored(lambda **_: [1.0, None, 2.0], timeout_seconds=1e4).is_scored.tolist() == [True, False, True]
    assert time.monotonic() - begin < 15
