"""What a run's audit says that one should know, each with what to do about it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from ..spaces import from_json
from .audit import BOUNDS, OWN_KL
from .curves import Vector

# Beyond these a number stands out.
FAR_KL = 3.0  # times the method's own bound
LARGE_KL = 0.1  # nats, where the method has none
SMALL_SAMPLE = 0.5  # effective sample size, as a share of the batch
LOW_ENTROPY = 0.02  # of the uniform policy's, for Discrete actions
NARROW = 0.02  # standard deviation of actions in [-1, 1]
MANY_CLIPPED = 0.4  # of a batch
FEW = 0.05  # of all steps: as rare as that, it may happen


class Finding(NamedTuple):
    """One thing that stands out."""

    what: str
    advice: str


def findings(record: dict[str, Any], metrics: dict[str, Vector]) -> list[Finding]:
    """All that stands out in a run, by its run.json and its metrics [T]; "lately" is the last quarter of the iterations."""
    found = (
        far_steps(record["config"], metrics),
        small_samples(record["config"], metrics),
        refused_steps(metrics),
        much_clipped(record["config"], metrics),
        little_entropy(record["config"], metrics, from_json(record["action_space"])),
        blind_critic(record["config"], metrics),
        lost_return(record["config"], metrics),
    )
    return [finding for finding in found if finding is not None]


def lately(metrics: dict[str, Vector], name: str) -> float:
    """The median of the last quarter of the iterations; NaN where nothing is known."""
    value = metrics.get(name, np.empty(0))
    value = value[len(value) * 3 // 4 :]
    value = value[np.isfinite(value)]
    return float(np.median(value)) if len(value) else math.nan


def share(metrics: dict[str, Vector], name: str, below: float) -> float:
    """How many of a metric's numbers are below a value, from 0 to 1."""
    value = metrics.get(name, np.empty(0))
    value = value[np.isfinite(value)]
    return float(np.mean(value < below)) if len(value) else 0.0


def settings(config: dict[str, Any], *names: str) -> str:
    """Those of the names that are set in the configuration, as in "a or b"."""
    return " or ".join(name for name in names if config.get(name) is not None)


def shorter_steps(config: dict[str, Any], *bounds: str) -> str:
    return f"Shorten the steps: lower {settings(config, *bounds, 'learning_rate', 'actor_learning_rate', 'epochs') or 'the step size'}."


def far_steps(config: dict[str, Any], metrics: dict[str, Vector]) -> Finding | None:
    """KL divergence beyond the method's bound, or large where it has none."""
    kl = lately(metrics, "kl")
    name = next((name for name in BOUNDS if config.get(name) is not None), None)
    if name is None:
        return Finding(f"Steps are long: lately a KL divergence of {kl:.3g} nats.", shorter_steps(config)) if kl > LARGE_KL else None
    bound = config[name]
    if not kl > FAR_KL * bound:
        return None
    what = f"The policy moves {kl / bound:.1f} times as far as {name} = {bound:g}: lately a KL divergence of {kl:.3g} nats."
    own = [value for own in OWN_KL if not math.isnan(value := lately(metrics, own))]
    if own and own[0] <= FAR_KL * bound:
        steadier = "a longer batch (num_steps) makes them steadier, normalise_observation = false leaves them out."
        return Finding(what, f"The step itself keeps to it, and the statistics of the observations move the policy: {steadier}")
    return Finding(what, shorter_steps(config))


def small_samples(config: dict[str, Any], metrics: dict[str, Vector]) -> Finding | None:
    """Ratios so uneven that little of a batch counts."""
    often = share(metrics, "effective_sample_size", SMALL_SAMPLE)
    if often <= FEW:
        return None
    least = float(np.nanmin(metrics["effective_sample_size"]))
    what = f"In {often:.0%} of the steps less than half of the batch still counted under the new policy, once only {least:.1%}."
    return Finding(what, shorter_steps(config, *BOUNDS))


def refused_steps(metrics: dict[str, Vector]) -> Finding | None:
    """Line searches that found nothing."""
    often = share(metrics, "step_scale", np.nextafter(0.0, 1.0))
    what = f"In {often:.0%} of the iterations the line search accepted no step, and the policy stayed as it was."
    return Finding(what, "Raise cg_damping or backtrack_tries, or take longer batches (num_steps).") if often > FEW else None


def much_clipped(config: dict[str, Any], metrics: dict[str, Vector]) -> Finding | None:
    """Ratios beyond the clip range on much of the batch."""
    clipped = lately(metrics, "clip_fraction")
    what = f"Lately {clipped:.0%} of the batch leave the clip range, where the objective is flat and holds nothing back."
    return Finding(what, shorter_steps(config, *BOUNDS)) if clipped > MANY_CLIPPED else None


def little_entropy(config: dict[str, Any], metrics: dict[str, Vector], space: gymnasium.Space[Any]) -> Finding | None:
    """A policy that hardly tries anything."""
    entropy = lately(metrics, "entropy")
    if isinstance(space, gymnasium.spaces.Discrete):
        least, scale = LOW_ENTROPY * math.log(space.n), f"of at most {math.log(space.n):.2f} nats"
    elif isinstance(space, gymnasium.spaces.Box):
        least, scale = math.prod(space.shape) * (0.5 * math.log(2 * math.pi * math.e) + math.log(NARROW)), "nats"
    else:
        return None
    what = f"The policy is almost deterministic: lately an entropy of {entropy:.2g} {scale}."
    more = settings(config, "entropy_coef", *(["initial_log_std"] if isinstance(space, gymnasium.spaces.Box) else []))
    if "target_entropy" in config:
        more = settings(config, "temperature") or "target_entropy"
    advice = f"raise {more}, so that it goes on trying" if more else "take shorter steps, so that it decides later"
    return Finding(what, f"Unless the return is as good as it can be, {advice}.") if entropy < least else None


def blind_critic(config: dict[str, Any], metrics: dict[str, Vector]) -> Finding | None:
    """A critic that is worse than none."""
    explained = lately(metrics, "explained_variance")
    more = settings(config, "critic_epochs", "critic_learning_rate", "value_coef") or "the critic's step size"
    what = f"The critic foresees less than a constant would: lately an explained variance of {explained:.2f}."
    return Finding(what, f"Unless all returns have become alike, raise {more}.") if explained < 0 else None


def lost_return(config: dict[str, Any], metrics: dict[str, Vector]) -> Finding | None:
    """No return at all, or one that was much better before."""
    value = metrics["episode_return"]
    known = np.flatnonzero(np.isfinite(value))
    if len(known) == 0:
        return Finding("No episode has ended, so there is no return.", "Train for longer, or give the environment a time limit.")
    full = known[metrics["episodes"][known] >= 100]  # before that, the mean is of few episodes
    if len(full) == 0:
        return None
    best = full[np.argmax(value[full])]
    first, last, peak = value[full[0]], value[full[-1]], value[best]
    what = f"The mean return fell from {peak:.4g} at step {metrics['step'][best]:,.0f} to {last:.4g}."
    return Finding(what, shorter_steps(config, *BOUNDS)) if peak - last > max(0.25 * (peak - first), 0.1 * abs(peak)) else None
