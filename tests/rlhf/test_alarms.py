"""An alarm is raised beyond its threshold, with its evidence, and not before."""

import numpy as np
import pytest

from surefoot.rlhf import alarms

PROMPTS, TEXTS = [f"ask {i}" for i in range(10)], [f"say {i}" for i in range(10)]


def test_empty_completions():
    assert alarms.empty_completions(PROMPTS, [*TEXTS[:9], ""]) is None
    assert alarms.empty_completions(PROMPTS, [*TEXTS[:8], "", " \n"]) == "2 of 10 completions are empty, the first of them to 'ask 8'."


def test_identical_completions():
    assert alarms.identical_completions(PROMPTS, ["a"] * 9 + ["b"]) is None
    assert alarms.identical_completions(PROMPTS[:1] * 10, ["a"] * 10) is None
    chats = [[{"role": "user", "content": text}] for text in "ab"]
    assert alarms.identical_completions(chats, ["a", "a"]).startswith("All 2 completions are the same, 'a', although")
    sentence = alarms.identical_completions(PROMPTS, ["x" * 999] * 10)
    assert sentence.startswith("All 10 completions are the same, 'xxx")
    assert len(sentence) < 200


def test_far_from_reference():
    kl = np.array([1.0, 9.0, 2.0])
    assert alarms.far_from_reference(kl, TEXTS[:3], 4.0) is None
    assert alarms.far_from_reference(kl, TEXTS[:3], 3.9) == (
        "The policy is 4 nats per sequence away from the reference, above the limit of 3.9; farthest, with 9, is 'say 1'."
    )


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_non_finite(value):
    log_prob, mask = np.zeros((3, 4)), np.tril(np.ones((3, 4), bool), 1)
    log_prob[0, 2:] = value  # padding
    assert alarms.non_finite(log_prob, mask, TEXTS[:3]) is None
    log_prob[1, 2] = log_prob[2, 3] = value
    assert alarms.non_finite(log_prob, mask, TEXTS[:3]) == (
        f"The log-probabilities of 2 of 3 completions are not finite: {value} at position 2 of 'say 1'."
    )


def test_shrunk_completions():
    assert alarms.shrunk_completions(np.array([20.0, 20, 40, 40, 40, 10, 10, 10])) is None  # half is not below half
    assert alarms.shrunk_completions(np.array([20.0, 20, 40, 40, 40, 40, 10, 9])) == (
        "Completions have shrunk from 20.0 tokens at first to 9.5 lately."
    )
    assert alarms.shrunk_completions(np.array([5.0])) is None


def test_over_optimised():
    steps, error = np.array([0, 1000, 2000, 3000]), np.full(4, 0.05)
    proxy, gold = np.array([0.0, 0.5, 1.0, 1.5]), np.array([0.3, 0.9, 1.0, 0.8])
    assert alarms.over_optimised(steps, proxy, gold, error) == (
        "The learned reward is over-optimised: since step 2,000 it rose from 1.00 to 1.50, while the gold reward fell from 1.00 to 0.80."
    )
    assert alarms.over_optimised(steps, proxy, gold, 2 * error) is None  # the fall may be chance
    assert alarms.over_optimised(steps, np.array([0.0, 0.5, 1.0, 1.0]), gold, error) is None  # both fall
    assert alarms.over_optimised(steps, proxy, np.array([0.3, 0.9, 1.0, 1.1]), error) is None
