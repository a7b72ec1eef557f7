"""Signs that a language model is being led astray, each as a sentence with its evidence, or None where there is none.

Of one batch: empty or identical completions, a distance from the reference above its limit, log-probabilities that are not finite.
Of a whole run: completions that have shrunk, and a learned reward that rises while the gold reward falls (Gao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EMPTY_SHARE = 0.1  # of the completions of a batch: fewer may be meant
SHRUNK_SHARE = 0.5  # of the length that completions had at first
FIRST_AND_LAST = 0.25  # of a run: what its beginning and its end are the means of
STANDARD_ERRORS = 2.0  # by which the gold reward must have fallen
EXCERPT = 80  # characters of a text that a sentence quotes

Vector = np.ndarray[Any, Any]


def empty_completions(prompts: Sequence[Any], completions: Sequence[str]) -> str | None:
    """Completions without any text, the first of them by its prompt."""
    empty = [index for index, completion in enumerate(completions) if not completion.strip()]
    if len(empty) <= EMPTY_SHARE * len(completions):
        return None
    return f"{len(empty)} of {len(completions)} completions are empty, the first of them to {quoted(prompts[empty[0]])}."


def identical_completions(prompts: Sequence[Any], completions: Sequence[str]) -> str | None:
    """One completion to prompts that differ."""
    if len(set(completions)) > 1 or len(set(map(str, prompts))) < 2:
        return None
    return f"All {len(completions)} completions are the same, {quoted(completions[0])}, although their prompts differ."


def far_from_reference(kl: Vector, completions: Sequence[str], limit: float) -> str | None:
    """A mean of the log-ratios summed over each completion, [B] in nats, above the limit."""
    mean, farthest = float(np.mean(kl)), int(np.argmax(kl))
    if not mean > limit:
        return None
    return (
        f"The policy is {mean:.3g} nats per sequence away from the reference, above the limit of {limit:g}; farthest, with "
        f"{kl[farthest]:.3g}, is {quoted(completions[farthest])}."
    )


def non_finite(log_prob: Vector, mask: Vector, completions: Sequence[str]) -> str | None:
    """Log-probabilities [B, L] that are NaN or infinite where the mask [B, L] has a token."""
    is_bad = ~np.isfinite(log_prob) & mask
    rows = np.flatnonzero(is_bad.any(axis=1))
    if len(rows) == 0:
        return None
    token = int(np.argmax(is_bad[rows[0]]))
    return (
        f"The log-probabilities of {len(rows)} of {len(completions)} completions are not finite: {log_prob[rows[0], token]} at position "
        f"{token} of {quoted(completions[rows[0]])}."
    )


def shrunk_completions(num_tokens: Vector) -> str | None:
    """Mean lengths of the iterations of a run, [T], that have fallen below half of what they were at first."""
    part = max(1, int(FIRST_AND_LAST * len(num_tokens)))
    first, last = float(np.mean(num_tokens[:part])), float(np.mean(num_tokens[-part:]))
    if last >= SHRUNK_SHARE * first:
        return None
    return f"Completions have shrunk from {first:.1f} tokens at first to {last:.1f} lately."


def over_optimised(steps: Vector, proxy: Vector, gold: Vector, gold_error: Vector) -> str | None:
    """Means [T] of the learned and of the gold reward on held-out prompts, and the standard error of the latter: one up, one down.

    Measured from where the gold reward was best.
    """
    best = int(np.argmax(gold))
    fall, rise = gold[best] - gold[-1], proxy[-1] - proxy[best]
    if fall <= STANDARD_ERRORS * np.hypot(gold_error[best], gold_error[-1]) or rise <= 0:
        return None
    return (
        f"The learned reward is over-optimised: since step {steps[best]:,} it rose from {proxy[best]:.2f} to {proxy[-1]:.2f}, while "
        f"the gold reward fell from {gold[best]:.2f} to {gold[-1]:.2f}."
    )


def quoted(value: Any) -> str:
    """A text, or the beginning of one that is long."""
    text = repr(value)
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
